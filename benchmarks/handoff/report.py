"""The report of `benchmarks.handoff`: tables and plot, made from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.output import markdown
from benchmarks.common.statistics import MIN_PAIRS, Ratio, Row, median_interval, quartiles, ratio
from benchmarks.handoff.rows import control_budget_bytes, find
from tests.engine import say

ARM_ORDER = ("alone", "nixl", "before", "pdplugin", "frontend")

SHARED_NOTES = (
    "All arms are measured in one run, interleaved: in each repetition every arm has its turn, "
    "in an order that rotates. Each prompt is new, so nothing is found in a prefix cache.",
    "Cores: the worker's main thread of every engine, the one that computes, is on core "
    "{compute}; every other thread (transfer and progress threads, EngineCore, API servers), "
    "router, proxy and client are on core {other}. The same for every arm.",
    "vLLM's NixlConnector pins the thread that computes to the last core of a NUMA node; that is "
    "undone. Its progress threads spin, as shipped; they are on core {other}, and the engines of "
    "arms that are not being measured are stopped (SIGSTOP), so they do not disturb the others.",
    "After each resume a request that is not measured is sent first.",
    "Producer and consumer are in two network namespaces; only KV and control messages between "
    "them cross the link (veth; where limited, tbf with a burst of 512 kB in each direction). "
    "UCX uses TCP on it. HTTP goes over links of its own, neither limited nor counted.",
)

LATENCY_NOTES = (
    "One request at a time, so prefill and decode never compute together.",
    "TTFT, TTST (first to second token) and CPU are medians; IQR is the distance of the quartiles. "
    "ITL is taken over the gaps after the second token, of all repetitions together.",
    "Ratios are ratios of medians; in brackets the quartiles of the ratios of the single "
    "repetitions.",
    "Added TTFT is TTFT less that of `alone` at the same prompt and link.",
    "Control messages are both directions between consumer and producer, of the consumer's "
    "scheduler and ranks together, as pd_control_bytes_total has them: without encryption and TCP. "
    "A handoff may take 2 KiB, 128 bytes a stretch, and 512 more where it is packed. Heartbeats "
    "count, one a second and its answer while a handoff is open; introductions do not: they come "
    "with the warm-up.",
    "Hidden is the share of the transfer that prefill hid: 1 - (TTFT - reference) / (bytes on the "
    "wire / link rate), not below 0. The reference is the TTFT of the same arm over the unlimited "
    "link if the run has it; else (marked >=) that of `alone`, which counts every other cost "
    "of the handoff as transfer that was not hidden.",
)

UNDISTURBED_NOTES = (
    "Eight requests of {running} tokens are handed off and decode on the consumer. Then handoffs "
    "arrive one after another; ITL is that of the eight, from the first of these requests' "
    "start to the last one's end. Quiet is the time just before.",
    "ITL p50 and p99 are taken in each repetition; shown are their medians and quartiles.",
    "The consumer's decode and the producer's prefill compute on the same core {compute}, for "
    "every arm: ITL has that in it, and only the ratio between the arms means anything.",
)


def by_key(row: Row) -> tuple[int, int, int, str, str]:
    arm = ARM_ORDER.index(row["arm"])
    return (
        row["prompt_tokens"],
        row["link_mbit"],
        arm,
        row["dispatch"] == "concurrent",
        row["codec"],
    )


def shown_link(mbit: int) -> str:
    return f"{mbit} Mbit/s" if mbit else "unlimited"


def shown_arm(row: Row) -> str:
    if row["arm"] == "alone":
        return "alone"
    codec = "" if row["codec"] == "raw" else f", {row['codec']}"
    return f"{row['arm']}, {row['dispatch']}{codec}"


def cell(value: float | Ratio | None, form: str = ".1f") -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, Ratio) else format(value, form)


def latency_tables(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return title and text of each table of the latency mode."""
    rows = sorted(rows, key=by_key)
    return [
        ("Latency", _latency_table(rows)),
        ("Against NixlConnector behind vllm-router, and against one engine alone", _ratios(rows)),
        ("Control messages of a handoff, median, and what they may take", _control_table(rows)),
        ("CPU seconds of each process during a request, median", _cpu_table(rows)),
    ]


def paired_table(rows: Sequence[Row]) -> tuple[str, str]:
    """Return what `pdplugin` costs by `before`: the ratios of requests of the same repetition."""
    head = ("Prompt", "Link", "Dispatch", "Of", "Pairs", "Median of ratios", "95 % interval")
    lines = []
    for row in rows:
        before = find(rows, row, arm="before")
        if row["arm"] != "pdplugin" or before is None:
            continue
        for name in ("ttft", "ttst"):
            samples = zip(row[f"{name}_samples_ms"], before[f"{name}_samples_ms"], strict=True)
            ratios = [now / then for now, then in samples if now and then]
            if len(ratios) < MIN_PAIRS:
                continue
            middle, low, high = median_interval(ratios)
            lines.append(
                (
                    str(row["prompt_tokens"]), shown_link(row["link_mbit"]), row["dispatch"],
                    name.upper(), str(len(ratios)), f"{middle:.3f}", f"{low:.3f} to {high:.3f}",
                )
            )  # fmt: skip
    return "pdplugin over before, pair by pair", markdown(head, lines)


def _latency_table(rows: Sequence[Row]) -> str:
    head = (
        "prompt", "link", "arm", "n", "TTFT ms (IQR)", "TTST ms", "ITL p50 ms", "ITL p99 ms",
        "MB on the wire", "descriptors", "hidden",
    )  # fmt: skip
    lines = []
    for row in rows:
        failed = f" ({row['failed']} failed)" if row["failed"] else ""
        bound = ">= " if row["hidden_reference"] == "alone" else ""
        hidden = "" if row["hidden_share"] is None else f"{bound}{100 * row['hidden_share']:.0f} %"
        lines.append(
            [
                str(row["prompt_tokens"]), shown_link(row["link_mbit"]), shown_arm(row),
                f"{row['n']}{failed}", f"{row['ttft_ms']:.1f} ({row['ttft_iqr_ms']:.1f})",
                cell(row["ttst_ms"]), cell(row["itl_p50_ms"]), cell(row["itl_p99_ms"]),
                cell(row["wire_bytes"] / 1e6, ".2f"), cell(row["descriptors"], ".0f"), hidden,
            ]
        )  # fmt: skip
    return markdown(head, lines)


def _ratios(rows: Sequence[Row]) -> str:
    head = (
        "prompt", "link", "arm", "added TTFT ms", "added TTFT ÷ nixl", "TTFT ÷ nixl",
        "TTFT ÷ alone", "TTST ÷ nixl", "bytes ÷ nixl", "bytes ÷ raw",
    )  # fmt: skip
    lines = []
    for row in rows:
        if row["arm"] == "alone":
            continue
        alone = find(rows, row, arm="alone", dispatch="serial")
        nixl = find(rows, row, arm="nixl", dispatch="serial", codec="raw")
        ttft, ttst = "ttft_samples_ms", "ttst_samples_ms"
        added = row["ttft_ms"] - alone["ttft_ms"] if alone else None
        to_nixl: list[Ratio | None] = [None, None, None]
        raw = find(rows, row, codec="raw")
        to_raw = row["wire_bytes"] / raw["wire_bytes"] if raw and raw is not row else None
        wire = None
        if nixl and nixl is not row:
            to_nixl = [
                ratio(row, nixl, ttft, alone) if alone else None,
                ratio(row, nixl, ttft),
                ratio(row, nixl, ttst),
            ]
            wire = row["wire_bytes"] / nixl["wire_bytes"] if nixl["wire_bytes"] else None
        lines.append(
            [
                str(row["prompt_tokens"]), shown_link(row["link_mbit"]), shown_arm(row),
                cell(added), cell(to_nixl[0]), cell(to_nixl[1]),
                cell(ratio(row, alone, ttft) if alone else None), cell(to_nixl[2]),
                cell(wire, ".2f"),
                cell(to_raw, ".3f"),
            ]
        )  # fmt: skip
    return markdown(head, lines)


def _control_table(rows: Sequence[Row]) -> str:
    head = ("prompt", "link", "arm", "bytes", "stretches", "budget bytes", "handoffs beyond it")
    lines = [
        [
            str(row["prompt_tokens"]), shown_link(row["link_mbit"]), shown_arm(row),
            cell(row["control_bytes"], ".0f"), cell(row["stretches"], ".0f"),
            cell(control_budget_bytes(row["stretches"], row["packed"]), ".0f"),
            f"{row['over_control_budget']} of {row['n']}",
        ]
        for row in rows
        if row["control_bytes"] is not None
    ]  # fmt: skip
    return markdown(head, lines)


def _cpu_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        used = ", ".join(f"{name} {s:.2f}" for name, s in row["cpu_s"].items() if s >= 0.005)
        total = sum(row["cpu_s"].values())
        where = [str(row["prompt_tokens"]), shown_link(row["link_mbit"]), shown_arm(row)]
        lines.append([*where, f"{total:.2f}", used])
    return markdown(("prompt", "link", "arm", "all", "by process"), lines)


def undisturbed_tables(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return title and text of the table of the undisturbed mode."""
    head = (
        "handoffs of", "link", "arm", "n", "quiet ITL p50 ms", "quiet ITL p99 ms", "ITL p50 ms",
        "ITL p99 ms (IQR)", "ITL p99 ÷ nixl", "TTFT of the handoffs ms",
    )  # fmt: skip
    rows = sorted(rows, key=by_key)
    lines = []
    for row in rows:
        nixl = find(rows, row, arm="nixl", dispatch="serial", codec="raw")
        to_nixl = ratio(row, nixl, "itl_p99_samples_ms") if nixl and nixl is not row else None
        failed = f" ({row['failed']} failed)" if row["failed"] else ""
        lines.append(
            [
                f"{row['prompt_tokens']} tokens", shown_link(row["link_mbit"]), shown_arm(row),
                f"{row['n']}{failed}", cell(row["quiet_itl_p50_ms"]), cell(row["quiet_itl_p99_ms"]),
                cell(row["itl_p50_ms"]),
                f"{row['itl_p99_ms']:.1f} ({row['itl_p99_iqr_ms']:.1f})", cell(to_nixl),
                cell(row["handoff_ttft_ms"]),
            ]
        )  # fmt: skip
    return [("ITL of eight running decodes while handoffs arrive", markdown(head, lines))]


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw TTFT by prompt for each link and arm; without matplotlib only say so."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        say(f"no plot ({path.name}): matplotlib is not installed; pip install matplotlib")
        return
    rows = sorted(rows, key=by_key)
    links = sorted({row["link_mbit"] for row in rows})
    prompts = sorted({row["prompt_tokens"] for row in rows})
    figure = Figure(figsize=(4.2 * len(links) + 0.8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    plots = figure.subplots(1, len(links), sharey=True, squeeze=False)[0]
    for axes, link in zip(plots, links, strict=True):
        for arm in dict.fromkeys(map(shown_arm, rows)):
            own = [row for row in rows if row["link_mbit"] == link and shown_arm(row) == arm]
            if own:
                lengths = [row["prompt_tokens"] for row in own]
                heights = [row["ttft_ms"] for row in own]
                axes.errorbar(lengths, heights, _bars(own), marker="o", capsize=3, label=arm)
        axes.set(title=f"link: {shown_link(link)}", xlabel="prompt tokens")
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(prompts, [str(prompt) for prompt in prompts])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
    plots[0].set_ylabel("TTFT, ms (median, quartiles)")
    plots[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _bars(rows: Sequence[Row]) -> list[list[float]]:
    """Return how far the quartiles of TTFT are below and above each median."""
    spans = [quartiles([t for t in row["ttft_samples_ms"] if t is not None]) for row in rows]
    medians = [row["ttft_ms"] for row in rows]
    return [
        [max(0.0, middle - low) for middle, (low, _) in zip(medians, spans, strict=True)],
        [max(0.0, high - middle) for middle, (_, high) in zip(medians, spans, strict=True)],
    ]
