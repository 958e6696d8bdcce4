"""Where vLLM's tests come from, and which of them run."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.conformance import plan
from tests.conformance.source import installed_version, is_kept, link_in

LISTING = """\
  Found link https://host/a/vllm-0.32.0-cp38-abi3-x86_64.whl (from https://x), version: 0.32.0
  Found link https://host/b/vllm-0.32.0.tar.gz (from https://x) (requires-python:>=3), version: 0.32
  Found link https://host/c/vllm-0.32.0.1.tar.gz (from https://x), version: 0.32.0.1
"""


def test_the_address_is_that_of_the_source_of_exactly_this_version() -> None:
    assert link_in(LISTING, "0.32.0") == "https://host/b/vllm-0.32.0.tar.gz"
    assert link_in(LISTING, "0.32") is None
    assert link_in(LISTING, "0.31.0") is None


def test_the_version_is_asked_for_without_the_builds_mark() -> None:
    assert installed_version().count(".") == 2
    assert "+" not in installed_version()


@pytest.mark.parametrize(
    ("member", "kept"),
    [
        ("vllm-1/tests/utils.py", True),
        ("vllm-1/examples/template_chatml.jinja", True),
        ("vllm-1/pyproject.toml", True),
        ("vllm-1/vllm/__init__.py", False),
        ("vllm-1/vllm/tests/x.py", False),
        ("vllm-1", False),
        ("other/tests/utils.py", False),
    ],
)
def test_the_tests_are_unpacked_and_the_package_is_not(member: str, kept: bool) -> None:
    assert is_kept(member, "vllm-1") is kept


def write(source: Path, path: str, text: str) -> None:
    (source / path).parent.mkdir(parents=True, exist_ok=True)
    (source / path).write_text(text)


def test_a_module_that_starts_a_server_has_to_be_decided_on(tmp_path: Path) -> None:
    write(tmp_path, plan.PLAN[0].path, "RemoteOpenAIServer")
    write(tmp_path, "tests/entrypoints/pooling/test_x.py", "RemoteOpenAIServer")
    write(tmp_path, "tests/entrypoints/openai/test_pure.py", "nothing of the kind")
    write(tmp_path, "tests/v1/new/test_direct.py", "RemoteOpenAIServer")
    write(tmp_path, "tests/entrypoints/new/conftest.py", "RemoteOpenAIServer")
    write(tmp_path, "tests/entrypoints/new/test_by_fixture.py", "def test_x(\n    a, server): ...")
    write(tmp_path, "tests/entrypoints/new/test_without.py", "def test_x(a): server")
    assert plan.undecided(tmp_path) == [
        "tests/entrypoints/new/test_by_fixture.py",
        "tests/v1/new/test_direct.py",
    ]


def test_no_module_is_both_in_the_plan_and_left_out() -> None:
    paths = [module.path for module in plan.PLAN]
    assert len(set(paths)) == len(paths)
    assert not [path for path in paths if any(fnmatch(path, pattern) for pattern in plan.LEFT_OUT)]


def test_modules_are_chosen_by_a_part_of_their_path() -> None:
    assert plan.chosen("") == list(plan.PLAN)
    assert [module.path for module in plan.chosen("test_chat.py")] == [
        "tests/entrypoints/openai/chat_completion/test_chat.py"
    ]
    assert plan.chosen("no such module") == []
