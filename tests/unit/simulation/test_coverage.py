"""What a run of the simulated world has reached, and what it must."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.simulation import coverage


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    reached: Counter[str] = Counter()
    monkeypatch.setattr(coverage, "reached", reached)
    return reached


def test_a_transition_that_is_followed_is_counted_once_and_one_that_is_asked_for_is_not(
    counts: Counter[str],
) -> None:
    table = coverage.Counted("door", {("open", "push"): "shut"})
    assert ("open", "push") in table
    assert not counts
    assert table["open", "push"] == "shut"
    assert table.get(("open", "push")) == "shut"
    assert table.get(("shut", "push")) is None
    assert counts == {"door: open, push": 2}


def test_a_run_that_has_reached_nothing_misses_all_that_a_prefill_can_reach() -> None:
    missing = coverage.missing(Counter())
    assert {
        "export: sealed, committed",
        "export: growing, withdrawn",
        "fetch: draining, reads ended",
        "want: asked, doubt",
        "attempt elsewhere: offered -> fetching",
        "request: trying -> finished",
        "reason: lease_expired",
    } <= set(missing)
    assert coverage.missing(Counter(missing)) == []


def test_what_a_prefill_cannot_reach_is_in_the_tables_and_is_no_loss() -> None:
    assert set(coverage.UNREACHABLE) <= set(coverage.expected())
    assert not set(coverage.UNREACHABLE) & set(coverage.missing(Counter()))


def test_what_is_reached_although_it_cannot_be_is_named() -> None:
    one = next(iter(coverage.UNREACHABLE))
    assert coverage.surprises(Counter({one: 1, "export: sealed, committed": 1})) == [one]


def test_the_table_says_why_a_prefill_cannot_reach_a_transition() -> None:
    rows = coverage.table(Counter({"export: sealed, committed": 7})).splitlines()
    assert "        7  export: sealed, committed" in rows
    assert (
        "        0  export: queued, sealed  "
        "(not by a prefill: a prefill has blocks, and so is opened, before it ends)"
    ) in rows
