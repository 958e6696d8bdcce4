"""A plug-in of pytest, given with ``-p`` to vLLM's tests: names them in the results, chooses among
them, and sends servers that are not started as `vllm serve` the same way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import launch
import pytest

ONLY_VARIABLE = "PD_CONFORMANCE_ONLY"
"""A JSON file with the ids of the tests to run; without it, all."""


def pytest_configure() -> None:
    # In a job of the background it is ignored, and could not end a run at its deadline.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    subprocess.Popen = _Popen  # type: ignore[misc]


def pytest_collection_finish() -> None:
    """Load vLLM's plug-ins, ours among them or not, for tests that start no engine."""
    if plugins := sys.modules.get("vllm.plugins"):
        plugins.load_general_plugins()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.user_properties.append(("nodeid", item.nodeid))
    if path := os.environ.get(ONLY_VARIABLE):
        chosen = set(json.loads(Path(path).read_text()))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
        items[:] = [item for item in items if item.nodeid in chosen]


class _Popen(subprocess.Popen[Any]):
    def __init__(self, args: Any, *rest: Any, **more: Any) -> None:
        words = launch.entry_arguments(args) if isinstance(args, list) else None
        super().__init__(args if words is None else ["vllm", *words], *rest, **more)
