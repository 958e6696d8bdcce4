"""Engines suited to a small machine, or of another release: what ``sitecustomize`` here does in
each of their processes."""

from __future__ import annotations

import atexit
import functools
import json
import os
import tempfile
from importlib.metadata import packages_distributions
from pathlib import Path

Changes = dict[str, dict[str, str]]
"""By module: what to look for (a regular expression, to be found once) and what to put there."""


ONE_PROCESS = ("--distributed-executor-backend", "uni")
"""An engine of one rank computes in the process that schedules, as vLLM has it on a GPU. Nor do its
processes look for each other's messages in a loop then."""

_FORKED: Changes = {
    "vllm.platforms.cpu": {r'os\.environ\["VLLM_WORKER_MULTIPROC_METHOD"\] = "spawn"': "pass"}
}
"""Where a user of a GPU may choose ``fork``, vLLM's CPU backend chooses ``spawn``. OpenMP is why,
of which engines of tests have one thread."""


@functools.cache
def _distributions() -> str:
    """Return a file that says which distributions have which packages."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(packages_distributions(), file)
    atexit.register(os.unlink, file.name)
    return file.name


def environ_of(changes: Changes | None = None) -> dict[str, str]:
    """Return the environment of an engine with these changes.

    It starts in less than half the time, for what takes so long is that each process imports vLLM.
    It may be given ``ONE_PROCESS``, and is a fork of its API server.
    """
    return {
        "PYTHONPATH": str(Path(__file__).parent),
        "PD_TEST_SUBSTITUTE": json.dumps(_FORKED | (changes or {})),
        "PD_TEST_DISTRIBUTIONS": _distributions(),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",
        "OMP_NUM_THREADS": "1",
    }
