"""What `benchmarks.handoff --frontend` is judged by: rows with the verdict, and their table. Pure.

A frontend's first token comes from the prefill engine, before the KV has been handed over; the
wait for that is between the first token and the second. So both are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.output import markdown
from benchmarks.common.statistics import Row
from benchmarks.handoff.report import by_key, cell, shown_arm, shown_link
from benchmarks.handoff.rows import find

MAX_ADDED_TTFT_MS = 25.0

NOTES = (
    "Arm `frontend`: engines with pdplugin behind `vllm-pd serve --local-below 0 --no-prefill "
    "queue`, so that every prompt is handed off. It asks both engines at once over their control "
    "channels; the first token comes from the prefill engine. It runs where router and proxy of "
    "the other arms run, and is stopped (SIGSTOP) together with its engines.",
    "The control channel is reached from outside by the engine's HTTP address, and over the link "
    "by the other engine; only that is counted.",
    f"Criterion: TTFT at most {MAX_ADDED_TTFT_MS:g} ms above that of `alone`, and TTST at most "
    "what `nixl` takes from the first token of `alone` to its own second token: "
    "(TTFT of nixl - TTFT of alone) + TTST of nixl.",
)


def with_criterion(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with ``added_ttft_ms``, and those of the frontend with ``ttst_limit_ms`` and
    ``missed``: what is not as it should be. None where the arm to compare with is not there."""
    return [row | _verdict(row, rows) for row in rows]


def _verdict(row: Row, rows: Sequence[Row]) -> Row:
    alone = find(rows, row, arm="alone", dispatch="serial")
    nixl = find(rows, row, arm="nixl", dispatch="serial", codec="raw")
    added = round(row["ttft_ms"] - alone["ttft_ms"], 2) if alone and alone is not row else None
    found: Row = {"added_ttft_ms": added}
    if row["arm"] != "frontend":
        return found
    if added is None or nixl is None or alone is None:
        return found | {"ttst_limit_ms": None, "missed": None}
    limit = round(nixl["ttft_ms"] - alone["ttft_ms"] + nixl["ttst_ms"], 2)
    too_much = {"TTFT": added > MAX_ADDED_TTFT_MS, "TTST": row["ttst_ms"] > limit}
    missed = [name for name, is_missed in too_much.items() if is_missed]
    return found | {"ttst_limit_ms": limit, "missed": missed}


def table(rows: Sequence[Row]) -> tuple[str, str]:
    """Return title and text of the table; the rows are those of ``with_criterion``."""
    head = (
        "prompt", "link", "arm", "n", "TTFT ms (IQR)", "added TTFT ms", "TTST ms",
        "TTST at most ms", "criterion",
    )  # fmt: skip
    lines = [
        [
            str(row["prompt_tokens"]), shown_link(row["link_mbit"]), shown_arm(row), str(row["n"]),
            f"{row['ttft_ms']:.1f} ({row['ttft_iqr_ms']:.1f})", cell(row["added_ttft_ms"]),
            cell(row["ttst_ms"]), cell(row.get("ttst_limit_ms")), _shown_verdict(row),
        ]
        for row in sorted(rows, key=by_key)
    ]  # fmt: skip
    return "The first two tokens behind a frontend", markdown(head, lines)


def _shown_verdict(row: Row) -> str:
    if row["arm"] != "frontend":
        return ""
    if row["missed"] is None:
        return "unknown: needs alone and nixl"
    return f"missed: {', '.join(row['missed'])}" if row["missed"] else "met"
