"""What is said of all modules."""

from __future__ import annotations

from tests.conformance.arms import THEIRS
from tests.conformance.inside.launch import OURS
from tests.conformance.outcomes import Outcome, Run
from tests.conformance.report import only_ours, rows, tables

PASSED, FAILED, SKIPPED = Outcome.PASSED, Outcome.FAILED, Outcome.SKIPPED

ARMS = {
    THEIRS: [
        Run(
            {"a": PASSED, "b": PASSED, "c": FAILED, "d": SKIPPED, "e": PASSED, "f": PASSED},
            num_servers=2,
        ),
        Run({"b": PASSED, "c": FAILED, "e": PASSED, "f": PASSED}, seconds=30.0),
    ],
    OURS: [
        Run(
            {"a": PASSED, "b": FAILED, "c": FAILED, "d": SKIPPED, "f": FAILED},
            {"b": "assert 1 | 2 == <x>"},
            "not done in 60 s",
            60.0,
            3,
        ),
        Run({"b": FAILED, "c": FAILED, "f": PASSED}),
        Run({"f": PASSED}, num_servers=1),
    ],
}


def test_only_ours_is_what_passes_there_and_does_not_here() -> None:
    """Not c, which fails on both, nor f, which failed here once in three runs."""
    assert only_ours(ARMS) == ["b", "e"]


def test_each_module_has_a_row_for_each_arm() -> None:
    theirs, ours = rows({"tests/m.py": ARMS})
    assert theirs == {
        "module": "tests/m.py",
        "arm": THEIRS,
        "passed": 4,
        "failed": 1,
        "skipped": 1,
        "not_run": 0,
        "only_ours": [],
        "flaky": [],
        "trouble": "",
        "servers": 2,
        "seconds": 30.0,
    }
    assert ours == {
        "module": "tests/m.py",
        "arm": OURS,
        "passed": 2,
        "failed": 2,
        "skipped": 1,
        "not_run": 1,
        "only_ours": ["b", "e"],
        "flaky": ["f"],
        "trouble": "not done in 60 s",
        "servers": 4,
        "seconds": 60.0,
    }


def test_the_page_counts_names_the_differences_and_says_why() -> None:
    page = tables({"tests/m.py": ARMS, "tests/n.py": ARMS}, 2)
    assert "| `m.py` | 4 / 1 / 1 / 0 | 2 / 2 / 1 / 1 | 2 | 2 + 4 | 1.5 |" in page
    assert "| all | 8 / 2 / 2 / 0 | 4 / 4 / 2 / 2 | 4 |  |  |" in page
    assert "| `b` | assert 1 \\| 2 == &lt;x> |" in page
    assert "| `e` | not reached |" in page
    assert "| `m.py` | vllm-pd up | not done in 60 s |" in page


def test_without_a_difference_the_page_says_so() -> None:
    same = [Run({"a": PASSED})]
    page = tables({"tests/m.py": {THEIRS: same, OURS: same}}, 1)
    assert "No test passes on `vllm serve` and fails on `vllm-pd up`." in page
    assert "have been run" not in page
    assert "did not end" not in page


def test_until_all_modules_have_run_the_page_speaks_of_those_that_have() -> None:
    same = [Run({"a": PASSED})]
    page = tables({"tests/m.py": {THEIRS: same, OURS: same}}, 3)
    assert page.startswith("1 of 3 modules have been run.\n")
    assert "Of these, no test passes on `vllm serve` and fails on `vllm-pd up`." in page
    assert "No test" not in page


def test_modules_without_servers_are_told_apart() -> None:
    """They say nothing of a frontend."""
    alone = {arm: [Run({"a": PASSED})] for arm in (THEIRS, OURS)}
    page = tables({"tests/m.py": ARMS, "tests/n.py": alone}, 2)
    with_servers, _, without = page.partition("that start none")
    assert "`m.py`" in with_servers
    assert "`n.py`" not in with_servers
    assert "| `n.py` | 1 / 0 / 0 / 0 | 1 / 0 / 0 / 0 | 0 | 0 + 0 |" in without
    assert "| without | with |" in without
