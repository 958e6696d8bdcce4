"""What the stage of compute-sanitizer makes of what the tool says; the tools are made up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.gpu import sanitizer, stage
from tests.gpu.notes import Notes

CLEAN = {
    "memcheck": "========= ERROR SUMMARY: 0 errors",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
}


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        (CLEAN["memcheck"], 0),
        (CLEAN["racecheck"], 0),
        ("========= ERROR SUMMARY: 3 errors", 3),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", 1),
        ("a Python program's last words", None),
    ],
)
def test_errors_are_counted_where_the_tool_counts_them(text: str, errors: int | None) -> None:
    assert sanitizer.errors_in(text) == errors


def run(notes: Notes, folder: Path, monkeypatch: pytest.MonkeyPatch, **says: str) -> None:
    """Run the stage as on a GPU, with a tool that says something of each kind and ends well."""
    tool = folder / "compute-sanitizer"
    tool.write_text(f"#!{sys.executable}\nimport sys\nprint({says!r}[sys.argv[2]])\n")
    tool.chmod(0o755)
    (folder / "libpd_kernels.so").touch()
    monkeypatch.setattr(sanitizer, "find", lambda: tool)
    gpu = Notes(folder / "stage.json", "cuda", folder)
    stage.run("sanitizer", gpu)
    notes.found = gpu.found


def test_a_clean_run_of_both_tools_passes(
    notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(notes, tmp_path, monkeypatch, **CLEAN)
    assert (notes.found["outcome"], notes.found["checks"]) == ("passed", 2)


def test_an_error_of_one_tool_fails(
    notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(notes, tmp_path, monkeypatch, **CLEAN | {"memcheck": "ERROR SUMMARY: 2 errors"})
    assert notes.found["outcome"] == "failed"
    assert "memcheck: exit status 0, 2 errors" in notes.found["failures"][0]


def test_a_tool_that_says_nothing_fails(
    notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(notes, tmp_path, monkeypatch, **CLEAN | {"memcheck": "killed"})
    assert notes.found["outcome"] == "failed"


def test_a_gpu_that_the_tool_refuses_is_not_tried(
    notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(notes, tmp_path, monkeypatch, **dict.fromkeys(CLEAN, "Error: Device not supported."))
    assert notes.found["outcome"] == "not tried"
    assert set(notes.found["not_tried"]) == {"memcheck", "racecheck"}
