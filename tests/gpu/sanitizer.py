"""Stage: compute-sanitizer over a few cases of every op: bad accesses, races in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.gpu.build import cuda_home, library_in
from tests.gpu.notes import Notes, NotTriedError

TOOLS = ("memcheck", "racecheck")
LIMIT_S = 50.0
"""Of all tools together."""

_UNABLE = ("Device not supported", "Unable to find", "LibraryNotLoaded")


def run(notes: Notes) -> None:
    if notes.is_stand_in:
        raise NotTriedError("stand-in device: csrc/cpu runs under sanitizers in `make check`")
    library_in(notes.work)
    tool = find()
    if tool is None:
        raise NotTriedError("compute-sanitizer is not there")
    ends_at = time.monotonic() + LIMIT_S
    tried = False
    for kind in TOOLS:
        left_s = ends_at - time.monotonic()
        if left_s < 10:
            notes.skip(kind, "no time was left")
            continue
        why_not = _run(notes, [str(tool), "--tool", kind], left_s)
        if why_not:
            notes.skip(kind, why_not)
        tried = tried or not why_not
    if not tried:
        raise NotTriedError("compute-sanitizer cannot be used here")


def find() -> Path | None:
    """Return where compute-sanitizer is: on the PATH, or beside nvcc."""
    if found := shutil.which("compute-sanitizer"):
        return Path(found)
    beside = cuda_home() / "bin" / "compute-sanitizer"
    return beside if beside.exists() else None


def _run(notes: Notes, tool: list[str], limit_s: float) -> str:
    """Run a few cases under a tool; return why that could not be done, if it could not."""
    command = [*tool, sys.executable, "-m", "tests.gpu.few_ops", "--work", str(notes.work)]
    # Each tensor gets an allocation of its own, so that what is read beside it is seen.
    environ = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        told = subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {limit_s:.0f} s"
    text = told.stdout + told.stderr
    print(text, flush=True)
    if found := next((words for words in _UNABLE if words in text), None):
        return found
    errors = errors_in(text)
    is_well = told.returncode == 0 and errors == 0
    shown = f"exit status {told.returncode}, {errors} errors"
    notes.check(is_well, f"{' '.join(tool[1:])}: {shown}: {text[-1500:]}")
    return ""


def errors_in(text: str) -> int | None:
    """Return how many errors a tool has reported; None where it has not said."""
    # memcheck: "ERROR SUMMARY: 0 errors"; racecheck: "RACECHECK SUMMARY: 0 hazards displayed (".
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", text)
    return sum(map(int, found)) if found else None
