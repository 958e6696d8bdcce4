"""In which order tests run, so that they share engines, and how long each module takes."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parent.parent
ENGINES = ROOT / "tests" / "engines"
GROUPS = {
    "ray": ("test_ray",),
    "frontend_failures": ("frontend_failures/test_streams", "frontend_failures/test_pool"),
    "smollm2": ("test_parity[smollm2]", "openai_api/test_openai"),
    "llama": (
        # First: it wants engines that have just started.
        "test_parity[tiny-llama]",
        "test_small_consumer",
        "test_codecs[tiny-llama]",
        "test_routers",
        "test_tensor_parallel",
        "test_unequal",
        "test_identity",
        "test_compositions",
        "test_command_line",
        "test_versions",
        "test_role_both",
    ),
    "failures": ("failures/test_requests", "failures/test_peers"),
    "alike": ("test_alike",),
    "tiny-mla": ("test_parity[tiny-mla]", "test_codecs[tiny-mla]"),
    "tiny-gemma3": ("test_parity[tiny-gemma3]", "test_wheel"),
}
"""Modules of ``tests/engines`` that share engines, in the order in which they run. With several
workers (`pytest -n 2 --dist loadgroup`) each takes the next group."""

PLACES = {
    place: (group, number)
    for group, places in GROUPS.items()
    for number, place in enumerate(places)
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", type=Path, help="write how long each module took to this JSON file")
    parser.addoption("--run-name", default="all", help="what the table calls this run")


def pytest_configure(config: pytest.Config) -> None:
    table: Path | None = config.getoption("--table")
    if table is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Durations(table, config.getoption("--run-name")))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests of engines by group, after all others."""
    names = list(GROUPS)

    def place(item: pytest.Item) -> tuple[int, int]:
        if ENGINES not in item.path.parents:
            return -1, 0
        group, number = place_of(item.nodeid)
        return names.index(group), number

    items.sort(key=place)


def place_of(nodeid: str) -> tuple[str, int]:
    """Return the group of a test of engines, and its module's number there."""
    file, _, test = nodeid.partition("::")
    module = file.removeprefix("tests/engines/").removesuffix(".py")
    if module in PLACES:
        return PLACES[module]
    inside = test.partition("[")[2].rstrip("]")
    for place, found in PLACES.items():
        name, _, model = place.rstrip("]").partition("[")
        if name == module and model and inside.startswith(model):
            return found
    raise pytest.UsageError(f"{nodeid} is in no group of {Path(__file__).name}")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    if config.getoption("dist") != "loadgroup":
        return None
    config.option.loadscopereorder = False
    return Groups(config, log)


class Groups(LoadScopeScheduling):
    """A worker runs all tests of a group, in their order."""

    def _split_scope(self, nodeid: str) -> str:
        return place_of(nodeid)[0]


class Durations:
    """Adds up the seconds of each module: its tests and the engines that started for them."""

    def __init__(self, table: Path, run: str) -> None:
        self._table, self._run = table, run
        self._began_at = time.monotonic()
        self._seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid.partition("::")[0]] += report.duration

    def pytest_sessionfinish(self) -> None:
        """Write the table; what another run has measured stays."""
        table: dict[str, dict[str, float]] = {"runs_s": {}, "modules_s": {}}
        if self._table.exists():
            table = json.loads(self._table.read_text())
        table["runs_s"][self._run] = round(time.monotonic() - self._began_at, 1)
        seconds = {**table["modules_s"], **self._seconds}
        names = sorted(name for name in seconds if (ROOT / name).exists())
        table["modules_s"] = {name: round(seconds[name], 1) for name in names}
        self._table.parent.mkdir(exist_ok=True)
        self._table.write_text(json.dumps(table, indent=1) + "\n")
