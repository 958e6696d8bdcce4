"""How long ``make test`` takes, as last measured, and that it stays bearable."""

from __future__ import annotations

import json
from pathlib import Path

TESTS = Path(__file__).parents[1]
LIMIT_S = 28 * 60
"""On two cores, after the set-up; CONTRIBUTING.md names it, too. One case a kind, on engines that
run already; what takes longer gets a ``make test-NAME`` of its own."""


def test_make_test_took_no_longer_than_it_may_when_it_was_measured_last() -> None:
    table = json.loads((TESTS / "durations.json").read_text())
    assert table["runs_s"].keys() == {"unit", "engines"}
    assert sum(table["runs_s"].values()) <= LIMIT_S


def test_every_module_of_engine_tests_was_measured() -> None:
    table = json.loads((TESTS / "durations.json").read_text())
    there = {str(path.relative_to(TESTS.parent)) for path in TESTS.glob("engines/**/test_*.py")}
    measured = {name for name in table["modules_s"] if name.startswith("tests/engines/")}
    assert measured == there
