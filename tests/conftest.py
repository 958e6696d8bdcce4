"""Which tests run beside each other, in what order, and how long each module takes.

With ``-n 2 --dist loadgroup`` a worker takes a whole group: the tests that share engines. Groups
that take longest begin first.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LLAMA = "llama"
GROUPS = {
    "ray": ("test_ray",),
    LLAMA: (
        # First: it wants engines that have just started.
        "test_parity[tiny-llama]",
        "test_small_consumer",
        "test_codecs[tiny-llama]",
        "test_routers",
        "test_identity",
        "test_compositions",
        "test_command_line",
        "test_versions",
        "test_roles",
    ),
    "frontend_failures": ("test_frontend_failures",),
    "failures": ("test_failures",),
    "smollm2": ("test_parity[smollm2]", "test_openai"),
    "tiny-mla": ("test_parity[tiny-mla]", "test_codecs[tiny-mla]"),
    "tiny-gemma3": ("test_parity[tiny-gemma3]",),
}
"""Modules of ``tests/engines`` that share engines, in the order in which they run."""

PLACES = {
    place: (group, number)
    for group, places in GROUPS.items()
    for number, place in enumerate(places)
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", type=Path, help="write how long each module took to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    table: Path | None = config.getoption("--table")
    if table is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Durations(table))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests of engines by group, after all others."""
    ordered: list[tuple[int, int, int, pytest.Item]] = []
    names = list(GROUPS)
    for at, item in enumerate(items):
        if item.path.parent.name != "engines":
            ordered.append((-1, 0, at, item))
            continue
        group, number = place_of(item)
        item.add_marker(pytest.mark.xdist_group(group))
        ordered.append((names.index(group), number, at, item))
    items[:] = [entry[-1] for entry in sorted(ordered, key=lambda entry: entry[:-1])]


def place_of(item: pytest.Item) -> tuple[str, int]:
    """Return the group of a test of engines, and its module's number there."""
    module = item.path.stem
    if module in PLACES:
        return PLACES[module]
    inside = item.name.partition("[")[2].rstrip("]")
    for place, found in PLACES.items():
        name, _, model = place.rstrip("]").partition("[")
        if name == module and model and inside.startswith(model):
            return found
    raise pytest.UsageError(f"{item.nodeid} is in no group of {Path(__file__).name}")


class Durations:
    """Adds up the seconds of each module: its tests and the engines that started for them."""

    def __init__(self, table: Path) -> None:
        self._table = table
        self._seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid.partition("::")[0]] += report.duration

    def pytest_sessionfinish(self) -> None:
        modules = {name: round(each, 1) for name, each in sorted(self._seconds.items())}
        self._table.write_text(json.dumps({"modules_s": modules}, indent=1) + "\n")
