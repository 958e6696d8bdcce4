"""Engines whose source differs in some lines: of another release, or suited to a small machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

Changes = Mapping[str, Mapping[str, str]]
"""By module: what to look for (a regular expression, to be found once) and what to put there."""

ASLEEP: Changes = {
    "vllm.distributed.device_communicators.shm_broadcast": {
        r"busy_loop_s: float = 1,": "busy_loop_s: float = 0.0005,"
    }
}
"""vLLM's processes look for messages in a loop for a second after each one. On two cores the
engines of a test would spend most of the machine on looking; so they wait for the notification,
as idle ones do."""


def substituting(*changes: Changes) -> dict[str, str]:
    """Return the environment of an engine with these changes."""
    everything = {module: dict(each) for some in changes for module, each in some.items()}
    return {
        "PYTHONPATH": str(Path(__file__).parent),
        "PD_TEST_SUBSTITUTE": json.dumps(everything),
    }
