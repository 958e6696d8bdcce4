"""What a race for blocks must have shown."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.chaos.race import is_as_expected

HARD: dict[str, Any] = {
    "arm": "pdplugin", "committed": 1200, "reused": 120, "granted": 0, "wrong": 0, "hung": 0,
    "reused_by_answer": {"heartbeat: lease_expired": 110, "commit: lease_expired": 10},
    "leaked_blocks": 0, "preemptions": [3, 0],
}  # fmt: skip
TAKEN_OUT = HARD | {"arm": "check-taken-out", "wrong": 3, "granted": 9}


def test_a_hard_race_without_a_wrong_answer_is_as_expected() -> None:
    assert is_as_expected(HARD)
    assert is_as_expected(TAKEN_OUT)


@pytest.mark.parametrize(
    "change",
    [
        {"wrong": 1},
        {"hung": 1},
        {"leaked_blocks": 1},
        {"committed": 900},
        {"reused": 90},
        {"reused_by_answer": {"heartbeat: lease_expired": 120}},
        {"preemptions": [0, 3]},
    ],
    ids=str,
)
def test_an_easy_race_or_a_wrong_answer_is_not(change: dict[str, Any]) -> None:
    assert not is_as_expected(HARD | change)


@pytest.mark.parametrize("change", [{"wrong": 0}, {"granted": 0}], ids=str)
def test_without_the_check_it_must_have_gone_wrong_for_that_reason(change: dict[str, Any]) -> None:
    assert not is_as_expected(TAKEN_OUT | change)
