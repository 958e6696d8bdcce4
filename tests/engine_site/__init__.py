"""Engines suited to a small machine, or of another release: what ``sitecustomize`` here does in
each of their processes."""

from __future__ import annotations

import atexit
import functools
import json
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

Changes = Mapping[str, Mapping[str, str]]
"""By module: what to look for (a regular expression, to be found once) and what to put there."""


@functools.cache
def _distributions() -> str:
    """Return a file that says which distributions have which packages."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(packages_distributions(), file)
    atexit.register(os.unlink, file.name)
    return file.name


ONE_PROCESS = ("--distributed-executor-backend", "uni")
"""An engine of one rank computes in the process that schedules, as vLLM has it on a GPU: it starts
in two thirds of the time, and its processes do not look for each other's messages in a loop."""


def environ_of(changes: Changes | None = None) -> dict[str, str]:
    """Return the environment of an engine with these changes, that may be given ``ONE_PROCESS``."""
    return {
        "PYTHONPATH": str(Path(__file__).parent),
        "PD_TEST_SUBSTITUTE": json.dumps({k: dict(v) for k, v in (changes or {}).items()}),
        "PD_TEST_DISTRIBUTIONS": _distributions(),
        # vLLM's CPU backend would choose another process all the same; it has OpenMP in mind.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
    }
