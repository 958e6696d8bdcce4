"""The interval of a median, by order statistics."""

from __future__ import annotations

import random

import pytest

from benchmarks.common.statistics import MIN_PAIRS, median_interval


@pytest.mark.parametrize(
    ("number", "low", "high"),
    # From the tables of the binomial distribution at a half: ranks of the interval's ends.
    [(MIN_PAIRS, 1, 6), (8, 1, 8), (9, 2, 8), (15, 4, 12), (25, 8, 18)],
)
def test_the_interval_has_the_ranks_of_the_tables(number: int, low: int, high: int) -> None:
    values = [float(rank) for rank in range(1, number + 1)]
    random.Random(number).shuffle(values)
    assert median_interval(values) == ((number + 1) / 2, low, high)
