"""What `benchmarks.handoff` measured, as rows, and the ratios between rows. Pure.

Only this module, `report` and `handoff_criterion` know the rows' keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.common.statistics import Row, median, percentile, quartiles


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """What a row is about."""

    arm: str
    dispatch: str
    codec: str
    prompt_tokens: int
    link_mbit: int


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One measured request. ``counts``: what the consumer counted of it, by name."""

    ttft_ms: float
    ttst_ms: float
    itl_ms: tuple[float, ...]
    wire_bytes: int
    counts: Mapping[str, float]
    cpu_s: Mapping[str, float]

    @classmethod
    def of(
        cls,
        sent: float,
        arrivals: Sequence[float],
        wire_bytes: int,
        counts: Mapping[str, float],
        cpu_s: Mapping[str, float],
    ) -> Sample:
        """Build it from when the request was sent and when its tokens came (at least two)."""
        gaps = [1e3 * (b - a) for a, b in zip(arrivals, arrivals[1:], strict=False)]
        return cls(1e3 * (arrivals[0] - sent), gaps[0], tuple(gaps[1:]), wire_bytes, counts, cpu_s)


@dataclasses.dataclass(frozen=True, slots=True)
class Disturbance:
    """One repetition of the undisturbed mode: gaps of the running decodes, in milliseconds."""

    quiet_ms: tuple[float, ...]
    during_ms: tuple[float, ...]
    handoff_ttft_ms: tuple[float, ...]


def latency_row(key: Key, samples: Sequence[Sample | None]) -> Row:
    """Return the row of one arm at one prompt and link.

    samples: by repetition, None where the request failed; at least one did not.
    """
    good = [sample for sample in samples if sample is not None]
    ttft = [sample.ttft_ms for sample in good]
    low, high = quartiles(ttft)
    gaps = [gap for sample in good for gap in sample.itl_ms]
    labels = sorted({label for sample in good for label in sample.cpu_s})
    return dataclasses.asdict(key) | {
        "n": len(good),
        "failed": len(samples) - len(good),
        "ttft_ms": round(median(ttft), 2),
        "ttft_iqr_ms": round(high - low, 2),
        "ttst_ms": round(median([sample.ttst_ms for sample in good]), 2),
        "itl_p50_ms": percentile(gaps, 50),
        "itl_p99_ms": percentile(gaps, 99),
        "wire_bytes": int(median([sample.wire_bytes for sample in good])),
        "descriptors": _median_count(good, "descriptors"),
        "control_bytes": _median_count(good, "control_bytes"),
        "stretches": _median_count(good, "stretches"),
        "packed": _median_count(good, "packed"),
        "over_control_budget": sum(map(_is_over_budget, good)),
        "cpu_s": {
            label: round(median([sample.cpu_s.get(label, 0.0) for sample in good]), 3)
            for label in labels
        },
        "hidden_share": None,
        "hidden_reference": None,
        "ttft_samples_ms": [round(s.ttft_ms, 2) if s else None for s in samples],
        "ttst_samples_ms": [round(s.ttst_ms, 2) if s else None for s in samples],
    }


def control_budget_bytes(stretches: float, packed: float) -> float:
    """Return how many bytes of control messages a handoff may take at the most."""
    return 2048 + 128 * stretches + 512 * packed


def _is_over_budget(sample: Sample) -> bool:
    counts = sample.counts
    if "control_bytes" not in counts:
        return False
    budget = control_budget_bytes(counts["stretches"], counts["packed"])
    return counts["control_bytes"] > budget


def _median_count(samples: Sequence[Sample], name: str) -> float | None:
    found = [sample.counts[name] for sample in samples if name in sample.counts]
    return median(found) if found else None


def undisturbed_row(key: Key, handoffs: int, runs: Sequence[Disturbance | None]) -> Row:
    """Return the row of one arm; ``runs`` by repetition, None where it failed."""
    good = [run for run in runs if run is not None]

    def over_runs(share: float, gaps: Callable[[Disturbance], Sequence[float]]) -> list[float]:
        return [float(np.percentile(gaps(run), share)) for run in good]

    p99 = over_runs(99, lambda run: run.during_ms)
    low, high = quartiles(p99)
    by_repetition = iter(p99)
    return dataclasses.asdict(key) | {
        "n": len(good),
        "failed": len(runs) - len(good),
        "handoffs": handoffs,
        "gaps": sum(len(run.during_ms) for run in good),
        "itl_p50_ms": round(median(over_runs(50, lambda run: run.during_ms)), 3),
        "itl_p99_ms": round(median(p99), 3),
        "itl_p99_iqr_ms": round(high - low, 3),
        "quiet_itl_p50_ms": round(median(over_runs(50, lambda run: run.quiet_ms)), 3),
        "quiet_itl_p99_ms": round(median(over_runs(99, lambda run: run.quiet_ms)), 3),
        "handoff_ttft_ms": round(median([t for run in good for t in run.handoff_ttft_ms]), 2),
        "itl_p99_samples_ms": [round(next(by_repetition), 3) if run else None for run in runs],
    }


def with_hidden_shares(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with ``hidden_share`` where there is a limited link and a reference.

    ``hidden_reference`` is "unlimited" for the same arm over the unlimited link, or "alone":
    then the share is a lower bound.
    """
    return [row | _hidden(row, rows) for row in rows]


def _hidden(row: Row, rows: Sequence[Row]) -> Row:
    if row["arm"] == "alone" or not row["link_mbit"] or not row["wire_bytes"]:
        return {}
    unlimited = find(rows, row, link_mbit=0)
    reference = unlimited or find(rows, row, arm="alone", dispatch="serial")
    if reference is None:
        return {}
    transfer_ms = row["wire_bytes"] * 8 / (row["link_mbit"] * 1e6) * 1e3
    visible_ms = max(0.0, row["ttft_ms"] - reference["ttft_ms"])
    return {
        "hidden_share": round(1 - min(1.0, visible_ms / transfer_ms), 3),
        "hidden_reference": "unlimited" if unlimited else "alone",
    }


def find(rows: Sequence[Row], like: Row, **different: Any) -> Row | None:
    """Return the row with the same key but for what is given."""
    wanted = {field.name: like[field.name] for field in dataclasses.fields(Key)} | different
    if wanted["arm"] == "alone":
        wanted["codec"] = "raw"
    return next(
        (row for row in rows if all(row[name] == value for name, value in wanted.items())), None
    )
