"""Stages: contained, with deadlines, and nothing that was found is lost."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import runner, stage
from tests.gpu.notes import Notes, NotTriedError
from tests.gpu.results import Results, page
from tests.gpu.runner import STAGES, TOTAL_S, Stage, Surroundings

LONG_S, SHORT_S = 20.0, 1.5
WELL = 'notes.check(True, "")'


class Trial:
    """Stages that are small programs, by their names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, dict[str, Any]] = {}

    def run(self, total_s: float = TOTAL_S, **programs: str) -> bool:
        """Run stages; whose name begins with ``optional`` are not required, with ``short`` have
        little time."""
        stages = [
            Stage(name, "", SHORT_S if "short" in name else LONG_S, "optional" not in name)
            for name in programs
        ]
        around = Surroundings(self.folder, self.folder / "log", dict(os.environ))
        head = (
            "from tests.gpu.notes import Notes\nfrom pathlib import Path\nimport os, sys, time\n"
            f"notes = Notes(Path({str(self.folder)!r}) / 'NAME.json', 'cpu', Path('.'))\n"
        )

        def launch(one: Stage) -> list[str]:
            code = head.replace("NAME", one.name) + programs[one.name]
            return [sys.executable, "-c", f"{code}\nsys.exit(0 if notes.finish() else 1)"]

        def keep(one: Stage, found: dict[str, Any]) -> None:
            self.found[one.name] = found

        return runner.run(stages, launch, around, keep, total_s)

    def outcomes(self) -> dict[str, str]:
        return {name: found["outcome"] for name, found in self.found.items()}


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(tmp_path)


def test_a_stage_that_fails_or_dies_does_not_stop_the_next(trial: Trial) -> None:
    assert not trial.run(
        fails="notes.check(False, 'two is three')", dies="notes.note(seen=1); os.abort()", well=WELL
    )
    assert trial.outcomes() == {"fails": "failed", "dies": "died", "well": "passed"}
    assert trial.found["fails"]["failures"] == ["two is three"]
    assert trial.found["dies"]["seen"] == 1


def test_a_stage_that_takes_too_long_is_ended_with_all_that_it_started(trial: Trial) -> None:
    child = trial.folder / "child"
    program = (
        "notes.note(seen=1)\nimport subprocess\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"Path({str(child)!r}).write_text(str(child.pid))\ntime.sleep(60)"
    )
    began = time.monotonic()
    assert not trial.run(short=program, well=WELL)
    assert time.monotonic() - began < LONG_S
    assert trial.outcomes() == {"short": "timed out", "well": "passed"}
    assert trial.found["short"]["seen"] == 1
    assert is_gone(int(child.read_text()))


def is_gone(pid: int) -> bool:
    """Whether a process has ended, or is about to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_what_is_not_required_may_fail_and_what_cannot_be_tried_is_no_failure(
    trial: Trial,
) -> None:
    assert trial.run(
        optional_fails="notes.check(False, '')",
        nothing="notes.finish('no pyzmq'); sys.exit(0)",
    )
    assert trial.outcomes() == {"optional_fails": "failed", "nothing": "not tried"}
    assert trial.found["nothing"]["reason"] == "no pyzmq"


def test_where_no_time_is_left_that_is_said_and_is_a_failure(trial: Trial) -> None:
    assert not trial.run(total_s=0.5, well=WELL)
    assert trial.found["well"]["reason"] == "no time was left"
    assert trial.run(total_s=0.5, optional=WELL)


def test_all_stages_together_have_five_minutes() -> None:
    assert TOTAL_S < 300
    assert {one.name for one in STAGES if not one.is_required} == {"extension"}


# --- a stage ---------------------------------------------------------------------------------


def test_whatever_a_stage_raises_is_its_outcome(
    notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.gpu.facts.run", lambda notes: 1 / 0)
    assert not stage.run("facts", notes)
    assert notes.found["outcome"] == "failed"
    assert notes.found["failures"][0].startswith("ZeroDivisionError: division by zero (")


def test_a_stage_says_why_it_cannot_be_tried(notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(notes: Notes) -> None:
        raise NotTriedError("no tool")

    monkeypatch.setattr("tests.gpu.facts.run", run)
    assert stage.run("facts", notes)
    assert (notes.found["outcome"], notes.found["reason"]) == ("not tried", "no tool")


@pytest.mark.parametrize("name", [one.name for one in STAGES[2:]])
def test_every_other_stage_needs_the_kernels_or_a_gpu(name: str, notes: Notes) -> None:
    """In an empty work folder, on the stand-in."""
    assert stage.run(name, notes)
    assert notes.found["outcome"] == "not tried"


# --- results ---------------------------------------------------------------------------------

RATE = {
    "op": "pack", "codec": "raw", "dtype": "bfloat16", "cache": "MLA", "block_bytes": 4096,
    "gb_per_s": [1.0, 2.0, 3.0], "copy_gb_per_s": [4.0, 4.0, 4.0], "to_copy": 0.5,
}  # fmt: skip


def test_results_are_written_after_each_stage(tmp_path: Path) -> None:
    results = Results(tmp_path, "cuda")
    seen = []
    for name in ("facts", "ops"):
        results.add(Stage(name, "", 1), {"outcome": "passed", "seconds": 1.0})
        seen.append(list(json.loads((tmp_path / "gpu.json").read_text())["stages"]))
    assert seen == [["facts"], ["facts", "ops"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]


def test_the_page_says_what_was_wrong_what_was_not_tried_and_how_fast_it_is() -> None:
    text = page(
        "cuda",
        {
            "ops": {"about": "", "outcome": "failed", "seconds": 1.0, "failures": ["a\nline"]},
            "handoff": {
                "about": "", "outcome": "passed", "seconds": 1.0, "checks": 3,
                "not_tried": {"NIXL": "it is not there"}, "facts": {"raw": "15 reads"},
            },
            "speed": {"about": "", "outcome": "passed", "seconds": 1.0, "rates": [RATE]},
        },
    )  # fmt: skip
    assert "- wrong: a line" in text
    assert "- not tried: NIXL: it is not there" in text
    assert "- raw: 15 reads" in text
    row = "| pack | raw | bfloat16 | MLA | 4096 | 2.0 (1.0 to 3.0) | 4.0 (4.0 to 4.0) | 0.50 |"
    assert row in text
    assert "rehearsal" not in text


def test_the_page_of_a_rehearsal_says_so() -> None:
    assert "nothing here was seen on a GPU" in page("cpu", {})
