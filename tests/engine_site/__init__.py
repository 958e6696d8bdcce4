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

PATIENT: Changes = {
    "vllm.distributed.device_communicators.shm_broadcast": {
        r"            sched_yield\(\)\n        else:\n            events": (
            "            time.sleep(0.0002)\n        else:\n            events"
        )
    }
}
"""For a second after each message vLLM's processes look for the next one in a loop. On two cores
the engines of a test would spend most of the machine on that; so they look five thousand times a
second."""


@functools.cache
def _distributions() -> str:
    """Return a file that says which distributions have which packages."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(packages_distributions(), file)
    atexit.register(os.unlink, file.name)
    return file.name


def environ_of(*changes: Changes) -> dict[str, str]:
    """Return the environment of an engine with these changes."""
    everything = {module: dict(each) for some in changes for module, each in some.items()}
    return {
        "PYTHONPATH": str(Path(__file__).parent),
        "PD_TEST_SUBSTITUTE": json.dumps(everything),
        "PD_TEST_DISTRIBUTIONS": _distributions(),
    }
