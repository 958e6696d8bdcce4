"""The plot of `benchmarks.autoscale`: replicas, queues and attainment over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.statistics import Row
from tests.engine import say

_SMOOTH = 10
"""Samples that a point of attainment is the mean of."""


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw the simulated part; without matplotlib only say so."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        say(f"no plot ({path.name}): matplotlib is not installed; pip install matplotlib")
        return
    rows = [row for row in rows if row["part"] == "simulated"]
    if not rows:
        return
    figure = Figure(figsize=(8, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    engines, queue, share = figure.subplots(3, 1, sharex=True)
    for row in rows:
        times, prefills, decodes, prompts, running, good = zip(*row["timeline"], strict=True)
        if row["arm"] == "autoscaling":
            engines.step(times, prefills, where="post", label="prefill engines")
            engines.step(times, decodes, where="post", label="decode engines", linestyle="--")
        queue.plot(times, [p + r for p, r in zip(prompts, running, strict=True)], label=row["arm"])
        share.plot(times, _smooth(good), label=row["arm"])
    engines.set(title="A step of load, simulated engines", ylabel="engines that are up")
    queue.set(ylabel="requests there", yscale="symlog")
    share.set(ylabel="within the SLO, %", xlabel="seconds", ylim=(-3, 103))
    for axes in (engines, queue, share):
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _smooth(shares: Sequence[float | None]) -> list[float | None]:
    smooth: list[float | None] = []
    for i in range(len(shares)):
        known = [each for each in shares[max(0, i - _SMOOTH) : i + 1] if each is not None]
        smooth.append(100 * sum(known) / len(known) if known else None)
    return smooth
