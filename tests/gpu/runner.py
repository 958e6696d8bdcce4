"""Runs the stages one after the other, each in a process of its own, and keeps what they find.

A stage that fails, dies or takes too long does not stop the next.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tests.gpu.notes import FAILED, NOT_TRIED, PASSED, RUNNING

TIMED_OUT, DIED = "timed out", "died"


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """limit_s: how long it may take. is_required: whether its failure fails the whole."""

    name: str
    about: str
    limit_s: float
    is_required: bool = True


STAGES = (
    Stage("facts", "what the machine is", 40),
    Stage("build", "nvcc compiles the kernels", 90),
    Stage("ops", "every op against its reference", 60),
    Stage("streams", "stream order", 40),
    Stage("handoff", "a handoff between two processes", 70),
    Stage("speed", "GB/s of every op", 50),
    Stage("sanitizer", "compute-sanitizer over a few ops", 60),
    Stage("extension", "the extension for this PyTorch", 120, is_required=False),
)
TOTAL_S = 285.0
"""Of all stages together: the whole is to take five minutes at the most."""

Launch = Callable[[Stage], Sequence[str]]
"""Returns the command of a stage, which writes ``STAGE.json`` to the work folder; see ``Notes``."""


@dataclasses.dataclass(frozen=True, slots=True)
class Surroundings:
    """work: where stages write. log: gets what they print. environ: theirs."""

    work: Path
    log: Path
    environ: dict[str, str]


def run(
    stages: Sequence[Stage],
    launch: Launch,
    around: Surroundings,
    on_found: Callable[[Stage, dict[str, Any]], None],
    total_s: float = TOTAL_S,
) -> bool:
    """Run the stages; ``on_found`` gets what each has found as soon as it has ended.

    Returns whether no required stage has failed.
    """
    ends_at = time.monotonic() + total_s
    is_well = True
    for stage in stages:
        limit_s = min(stage.limit_s, ends_at - time.monotonic())
        if limit_s > 1:
            found = _run_stage(stage, launch(stage), around, limit_s)
        else:
            found = {"outcome": NOT_TRIED, "reason": "no time was left", "seconds": 0.0}
            is_well = is_well and not stage.is_required
        if stage.is_required and found["outcome"] not in (PASSED, NOT_TRIED):
            is_well = False
        on_found(stage, found)
    return is_well


def _run_stage(
    stage: Stage, command: Sequence[str], around: Surroundings, limit_s: float
) -> dict[str, Any]:
    began = time.monotonic()
    path = around.work / f"{stage.name}.json"
    path.unlink(missing_ok=True)
    with around.log.open("a") as log:
        print(f"--- {stage.name}", file=log, flush=True)
        status = _wait(command, around, log, limit_s)
    found: dict[str, Any] = {"outcome": RUNNING}
    with suppress(FileNotFoundError):
        found = json.loads(path.read_text())
    if status is None:
        found |= {"outcome": TIMED_OUT, "reason": f"it took longer than {limit_s:.0f} s"}
    elif found["outcome"] == RUNNING or (status and found["outcome"] != FAILED):
        found |= {"outcome": DIED, "reason": f"exit status {status}"}
    return found | {"seconds": round(time.monotonic() - began, 1)}


def _wait(command: Sequence[str], around: Surroundings, log: IO[str], limit_s: float) -> int | None:
    """Return a command's exit status, None if it did not end in time; nothing of its process group
    is left."""
    process = subprocess.Popen(
        command, env=around.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        process_group=0,
    )  # fmt: skip
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
