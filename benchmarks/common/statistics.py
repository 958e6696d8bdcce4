"""Medians, spreads and ratios of what was measured. Pure."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

Row = dict[str, Any]
"""One row of a benchmark's JSON."""

MIB = 2**20

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio, and the quartiles of the single repetitions' ratios."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [25, 75])
    return float(low), float(high)


def percentile(values: Sequence[float], share: float) -> float | None:
    return round(float(np.percentile(values, share)), 3) if values else None


def ratio(over: Row, under: Row, samples: str, base: Row | None = None) -> Ratio | None:
    """Return the ratio of the medians of two lists of samples, each less ``base``'s if given.

    None where the denominator is not positive, or no repetition has both.
    """

    def value(row: Row) -> float:
        less = 0.0 if base is None else _median_of(base[samples])
        return _median_of(row[samples]) - less

    if value(under) <= 0:
        return None
    none_less = [0.0] * len(over[samples])
    single = [
        (a - c) / (b - c)
        for a, b, c in zip(
            over[samples], under[samples], base[samples] if base else none_less, strict=True
        )
        if a is not None and b is not None and c is not None and b > c
    ]
    if not single:
        return None
    return Ratio(value(over) / value(under), *quartiles(single))


MIN_PAIRS = 6
"""Fewer have no 95 % interval of their median."""


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, and the two values between which it lies with 95 % confidence at least.

    By order statistics (Conover, Practical Nonparametric Statistics, 3.2): no distribution is
    assumed. Takes ``MIN_PAIRS`` values or more.
    """
    ordered, n = sorted(values), len(values)
    tail, rank = 0.0, 0
    while (tail := tail + math.comb(n, rank) / 2**n) <= 0.025:
        rank += 1
    return median(ordered), ordered[rank - 1], ordered[n - rank]


def _median_of(samples: Sequence[float | None]) -> float:
    return median([sample for sample in samples if sample is not None])


def growth(counts: Sequence[int], values: Sequence[float]) -> float:
    """Return by how much a straight line through the values rises from the first to the last."""
    slope = np.polyfit(counts, values, 1)[0]
    return float(slope) * (counts[-1] - counts[0])


def rotated(things: Sequence[T], by: int) -> list[T]:
    """Return the things in another order for each repetition: none is always the first."""
    by %= len(things)
    return [*things[by:], *things[:by]]
