"""What an answer costs, and an idle second: rows, and the table made from them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.output import markdown
from benchmarks.common.statistics import MIN_PAIRS, Row, median, median_interval, quartiles

ANSWERS = "answers"

_COMMON = (
    "Answers: tiny-llama, {prompt} random tokens in, 64 out, streamed, closed loop of 8, "
    "{number} answers a turn; the servers take turns, in an order that rotates. The frontends "
    "are over the same prefill and decode engine and hand everything off; ",
    " CPU is user and system time of the process that faces clients, without the engines'. "
    "`before` is another checkout's frontend over these engines. An idle second is the mean of "
    "{idle:g} s in which nobody asked anything.",
)
ON_ENGINES = "`vllm serve` answers alone.".join(_COMMON)
ON_CANNED = "these compute nothing, and decode a token in {step:g} ms.".join(_COMMON)


def answers_row(server: str, samples: Sequence[float], idle_ms: float) -> Row:
    """samples: CPU of an answer in ms, of each turn. idle_ms: CPU of an idle second."""
    low, high = quartiles(samples)
    return {
        "arm": ANSWERS, "server": server, "n": len(samples), "cpu_ms": median(samples),
        "cpu_ms_low": low, "cpu_ms_high": high, "samples_ms": list(samples),
        "idle_ms_per_s": idle_ms,
    }  # fmt: skip


def answers_table(rows: Sequence[Row]) -> str:
    """Compare the first server with each other one, turn by turn."""
    ours = rows[0]["samples_ms"]
    lines = []
    for row in rows:
        over = ""
        if row is not rows[0]:
            ratios = [mine / its for mine, its in zip(ours, row["samples_ms"], strict=True)]
            middle, low, high = quartiles_or_interval(ratios)
            over = f"{middle:.3f} ({low:.3f} to {high:.3f})"
        spread = f"{row['cpu_ms']:.2f} ({row['cpu_ms_low']:.2f} to {row['cpu_ms_high']:.2f})"
        idle = f"{row['idle_ms_per_s']:.1f}"
        lines.append((row["server"], str(row["n"]), spread, over, idle))
    head = (
        "server", "n", "CPU ms an answer (quartiles)", f"{rows[0]['server']} ÷ it (95 %)",
        "CPU ms an idle second",
    )  # fmt: skip
    return markdown(head, lines)


def quartiles_or_interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of ratios with its 95 % interval, or quartiles where they are too few."""
    if len(ratios) >= MIN_PAIRS:
        return median_interval(ratios)
    return (median(ratios), *quartiles(ratios))
