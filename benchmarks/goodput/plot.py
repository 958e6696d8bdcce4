"""The plot of `benchmarks.goodput`: what share of the requests met the SLO, by rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.statistics import Row
from benchmarks.goodput.plan import HEADLINE
from benchmarks.goodput.rows import TARGET
from tests.engine import say


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw the headline SLO, or the first there is; without matplotlib only say so."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        say(f"no plot ({path.name}): matplotlib is not installed; pip install matplotlib")
        return
    if not rows:
        return
    slos = dict.fromkeys(row["slo"] for row in rows)
    slo = HEADLINE if HEADLINE in slos else next(iter(slos))
    rows = [row for row in rows if row["slo"] == slo]
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    figure = Figure(figsize=(4.2 * len(workloads) + 0.8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    plots = figure.subplots(1, len(workloads), sharey=True, squeeze=False)[0]
    for axes, workload in zip(plots, workloads, strict=True):
        for row in rows:
            if row["workload"] == workload:
                rates, shares = zip(*row["attainment"], strict=True)
                axes.plot(rates, [100 * s for s in shares], marker="o", label=row["arm"])
        axes.axhline(100 * TARGET, color="grey", linestyle="--", linewidth=1)
        axes.set(title=workload, xlabel="requests a second", ylim=(0, 103))
        axes.grid(alpha=0.3)
    limits = f"TTFT {rows[0]['slo_ttft_ms']:g} ms, TPOT {rows[0]['slo_tpot_ms']:g} ms"
    plots[0].set_ylabel(f"requests within {limits}, %")
    plots[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
