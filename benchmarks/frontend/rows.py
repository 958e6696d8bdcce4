"""What `benchmarks.frontend` makes of what it measured: rows, and tables made from them. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from benchmarks.common.output import markdown
from benchmarks.common.statistics import (
    Row,
    median,
    percentile,
    quartiles,
    ratio,
)
from benchmarks.frontend.answer_rows import ANSWERS, answers_table
from benchmarks.frontend.load import Window

CANNED, STREAMS, SOAK, SCALE = "canned", "streams", "soak", "scale"
"""Arms without engines; the others are named after what answers."""

NOTES = {
    CANNED: (
        "Canned: `vllm-pd serve --local-below 0` over one prefill and one decode engine that "
        "compute nothing. The prefill engine gives its token at once, the decode engine one token "
        "to every request in each step, as fast as it can. Every request has {prompt} random "
        "tokens in and {answer} out, streamed over /v1/completions.",
        "Closed loop: each of so many connections sends its next request when the last has ended; "
        "{repeat} repetitions of {seconds:g} s, after a warm-up. Medians; in brackets the "
        "quartiles of the repetitions.",
        "Frontend, both canned engines and client share the machine's two cores; `cores` is how "
        "much of a core each has used. The frontend is what limits only where its share is near 1 "
        "for each of its processes.",
        "Added is the time from sending to the first token. The canned engines' own part is not "
        "taken off: a step takes them some 0.1 ms.",
        "CPU of the frontend is user and system time of its process and all its children.",
    ),
    STREAMS: (
        "Streams: the decode engine takes a step every {step:g} ms and gives each stream a token. "
        "When all have their first token they are watched for a while, and then broken off. A gap "
        "is the time in which one stream got nothing, and of it the longest.",
    ),
    SOAK: (
        "Soak: resident memory of the frontend's processes after a warm-up of {warm_up} requests, "
        "and after all; growth is the slope of a straight line through {samples} samples.",
    ),
    SCALE: (
        "Scale: canned engines in two processes, each with a control channel of its own; one of "
        "five prefills. Every stream gets a token in {step:g} s. When all have their first they "
        "are watched for a while; share is that of the tokens which the stream that got fewest "
        "could have had. Memory is the frontend's; a stream's is what came on top from before the "
        "first was opened.",
        "Time of a choice: the frontend's own pool, prefix index and rules in one process, with as "
        "many engines and streams and no connections (`benchmarks.frontend.routing`).",
    ),
    "engines": (
        "Whole path: tiny-llama on a prefill and a decode engine, {prompt} random tokens in, "
        "{answer} out, closed loop of {concurrency}, {requests} requests in each of {repeat} "
        "repetitions; the arms take turns, the one that does not is stopped (SIGSTOP).",
        "CPU a request is user and system time of every process but engine cores, workers and the "
        "client: router or frontend, and the engines' API servers. pdplugin's control channel and "
        "both connectors' threads live in the engine cores' processes, as do NIXL's progress "
        "threads, which spin as shipped: that is the column of the engine cores.",
        "Cores: the thread that computes of the prefill engine is on core {first}, that of the "
        "decode engine on core {second}, all other threads and the client run on both. "
        "NixlConnector's pinning is undone.",
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One repetition of a closed loop. cpu_s: by what used it."""

    requests: int
    tokens: int
    elapsed_s: float
    first_ms: Sequence[float]
    whole_ms: Sequence[float]
    cpu_s: Mapping[str, float]
    resident_mib: float | None = None

    def cpu_ms(self, *, of_cores: bool) -> float:
        """Return CPU a request, of the engine cores or of all that stands before them."""
        wanted = [s for label, s in self.cpu_s.items() if _is_counted(label, of_cores)]
        return 1e3 * sum(wanted) / self.requests


def _is_counted(label: str, of_cores: bool) -> bool:
    if label in ("client", "canned engines"):
        return False
    return label.endswith(("core", "worker")) is of_cores


def load_row(arm: str, workers: int | None, concurrency: int, runs: Sequence[Run | None]) -> Row:
    """Return the row of one arm and concurrency.

    workers: processes of the frontend. runs: by repetition, None where it failed; at least one has
    not.
    """
    good = [run for run in runs if run is not None]
    cpu = [None if run is None else round(run.cpu_ms(of_cores=False), 3) for run in runs]
    rates = [run.requests / run.elapsed_s for run in good]
    low, high = quartiles([each for each in cpu if each is not None])
    rate_low, rate_high = quartiles(rates)
    first = [ms for run in good for ms in run.first_ms]
    whole = [ms for run in good for ms in run.whole_ms]
    labels = sorted({label for run in good for label in run.cpu_s})
    resident = [run.resident_mib for run in good if run.resident_mib is not None]
    return {
        "arm": arm,
        "workers": workers,
        "concurrency": concurrency,
        "n": len(good),
        "failed": len(runs) - len(good),
        "requests": sum(run.requests for run in good),
        "requests_per_s": round(median(rates), 2),
        "requests_per_s_low": round(rate_low, 2),
        "requests_per_s_high": round(rate_high, 2),
        "tokens_per_s": round(median([run.tokens / run.elapsed_s for run in good]), 1),
        "added_p50_ms": percentile(first, 50),
        "added_p99_ms": percentile(first, 99),
        "request_p50_ms": percentile(whole, 50),
        "request_p99_ms": percentile(whole, 99),
        "cpu_ms_per_request": round(median([run.cpu_ms(of_cores=False) for run in good]), 3),
        "cpu_ms_per_request_low": round(low, 3),
        "cpu_ms_per_request_high": round(high, 3),
        "cpu_ms_samples": cpu,
        "engine_cpu_ms_per_request": round(median([run.cpu_ms(of_cores=True) for run in good]), 3),
        "cores": {
            label: round(median([run.cpu_s.get(label, 0.0) / run.elapsed_s for run in good]), 3)
            for label in labels
        },
        "resident_mib": round(median(resident), 1) if resident else None,
    }


def streams_row(
    workers: int,
    step_ms: float,
    seconds: float,
    opening_s: float,
    tokens: Sequence[int],
    longest_gap_ms: Sequence[float],
    resident_mib: Mapping[str, float],
    cpu_s: Mapping[str, float],
) -> Row:
    """Return the row of streams that were open at once.

    tokens, longest_gap_ms: of each stream. resident_mib: of the frontend, ``before`` they were
    opened, at the ``start`` and at the ``end`` of the time, and ``after`` they were broken off.
    """
    return {
        "arm": STREAMS,
        "workers": workers,
        "concurrency": len(tokens),
        "step_ms": step_ms,
        "seconds": round(seconds, 2),
        "opening_s": round(opening_s, 2),
        "tokens_per_s": round(sum(tokens) / seconds, 1),
        "expected_tokens": round(1e3 * seconds / step_ms, 1),
        "min_tokens": min(tokens),
        "max_tokens": max(tokens),
        "longest_gap_ms": round(max(longest_gap_ms), 1),
        "longest_gap_p50_ms": percentile(longest_gap_ms, 50),
        "resident_mib": round(resident_mib["end"], 1),
        "resident_before_mib": round(resident_mib["before"], 1),
        "resident_start_mib": round(resident_mib["start"], 1),
        "resident_after_mib": round(resident_mib["after"], 1),
        "cores": {label: round(s / seconds, 3) for label, s in cpu_s.items()},
    }


def soak_row(
    workers: int, concurrency: int, samples: Sequence[tuple[int, float]], growth_mib: float
) -> Row:
    """Return the row of a soak. samples: requests done, from 0 on, and MiB of the frontend."""
    requests = samples[-1][0]
    return {
        "arm": SOAK,
        "workers": workers,
        "concurrency": concurrency,
        "requests": requests,
        "resident_before_mib": round(samples[0][1], 1),
        "resident_mib": round(samples[-1][1], 1),
        "growth_mib": round(growth_mib, 2),
        "growth_bytes_per_request": round(growth_mib * 2**20 / requests, 1),
        "samples_mib": [[count, round(mib, 2)] for count, mib in samples],
    }


def scale_row(
    num_engines: int,
    step_ms: float,
    window: Window,
    attached_s: float,
    resident_mib: tuple[float, float],
    cpu_s: Mapping[str, float],
    chosen: Row,
) -> Row:
    """Return the row of many streams over many engines.

    attached_s: until all engines were up, since the frontend answered. resident_mib: before the
    first stream, and with all. chosen: how long choices took.
    """
    before, after = resident_mib
    streams, expected = len(window.marks), 1e3 * window.seconds / step_ms
    return {
        "arm": SCALE,
        "engines": num_engines,
        "streams": streams,
        **{name: chosen[name] for name in ("route_ms_p50", "route_ms_p99", "admit_ms_p50")},
        "rss_mib": round(after, 1),
        "rss_before_mib": round(before, 1),
        "stream_kib": round(1024 * (after - before) / streams, 2),
        "slowest_stream_share": round(min(window.marks) / expected, 3),
        "longest_gap_ms": round(max(window.longest_gap_ms), 1),
        "tokens_per_s": round(sum(window.marks) / window.seconds, 1),
        "seconds": round(window.seconds, 2),
        "attached_s": round(attached_s, 2),
        "opening_s": round(window.opening_s, 2),
        "step_ms": step_ms,
        "cores": {label: round(s / window.seconds, 3) for label, s in cpu_s.items()},
    }


def tables(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return title and text of each table that there are rows for."""
    by_kind: dict[str, list[Row]] = {}
    for row in rows:
        kind = row["arm"] if row["arm"] in (CANNED, STREAMS, SOAK, SCALE, ANSWERS) else "engines"
        by_kind.setdefault(kind, []).append(row)
    known = (
        (CANNED, "The frontend alone, over canned engines", _canned_table),
        (STREAMS, "Streams open at once", _streams_table),
        (SOAK, "Memory over many requests", _soak_table),
        (SCALE, "Many engines, many streams", _scale_table),
        (ANSWERS, "CPU of an answer in the process that faces clients", answers_table),
        ("engines", "CPU of all that stands before the engine cores", _engines_table),
    )
    return [(title, make(by_kind[kind])) for kind, title, make in known if kind in by_kind]


def _spread(row: Row, name: str, form: str = ".2f") -> str:
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _shares(cores: Mapping[str, float]) -> str:
    return ", ".join(f"{label} {share:.2f}" for label, share in cores.items() if share >= 0.005)


def _canned_table(rows: Sequence[Row]) -> str:
    head = (
        "concurrency", "frontend processes", "n", "requests/s", "tokens/s", "added p50 ms",
        "added p99 ms", "request p50 ms", "request p99 ms", "CPU ms a request", "cores", "MiB",
    )  # fmt: skip
    times = ("added_p50_ms", "added_p99_ms", "request_p50_ms", "request_p99_ms")
    lines = [
        [
            str(row["concurrency"]), str(row["workers"]), _shown_n(row),
            _spread(row, "requests_per_s", ".1f"), f"{row['tokens_per_s']:.0f}",
            *(_ms(row[name]) for name in times), _spread(row, "cpu_ms_per_request"),
            _shares(row["cores"]), _ms(row["resident_mib"]),
        ]
        for row in rows
    ]  # fmt: skip
    return markdown(head, lines)


def _streams_table(rows: Sequence[Row]) -> str:
    head = (
        "streams", "frontend processes", "step ms", "s", "all open after s", "tokens/s",
        "tokens of a stream (possible)", "longest gap ms", "median stream's ms", "cores",
        "MiB before", "MiB open", "MiB after",
    )  # fmt: skip
    lines = [
        [
            str(row["concurrency"]), str(row["workers"]), f"{row['step_ms']:g}",
            f"{row['seconds']:.0f}", f"{row['opening_s']:.1f}", f"{row['tokens_per_s']:.0f}",
            f"{row['min_tokens']} to {row['max_tokens']} ({row['expected_tokens']:.0f})",
            _ms(row["longest_gap_ms"]), _ms(row["longest_gap_p50_ms"]), _shares(row["cores"]),
            _ms(row["resident_before_mib"]), _ms(row["resident_mib"]),
            _ms(row["resident_after_mib"]),
        ]
        for row in rows
    ]  # fmt: skip
    return markdown(head, lines)


def _soak_table(rows: Sequence[Row]) -> str:
    head = (
        "requests", "concurrency", "frontend processes", "MiB before", "MiB after", "growth MiB",
        "growth, bytes a request",
    )  # fmt: skip
    lines = [
        [
            str(row["requests"]), str(row["concurrency"]), str(row["workers"]),
            _ms(row["resident_before_mib"]), _ms(row["resident_mib"]),
            f"{row['growth_mib']:.2f}", f"{row['growth_bytes_per_request']:.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    return markdown(head, lines)


def _scale_table(rows: Sequence[Row]) -> str:
    head = (
        "engines", "streams", "choice p50 ms", "choice p99 ms", "slowest stream's share",
        "longest gap ms", "tokens/s", "all open after s", "cores", "MiB before", "MiB open",
        "KiB a stream",
    )  # fmt: skip
    lines = [
        [
            str(row["engines"]), str(row["streams"]), f"{row['route_ms_p50']:.3f}",
            f"{row['route_ms_p99']:.3f}", f"{row['slowest_stream_share']:.2f}",
            _ms(row["longest_gap_ms"]), f"{row['tokens_per_s']:.0f}", f"{row['opening_s']:.0f}",
            _shares(row["cores"]), _ms(row["rss_before_mib"]), _ms(row["rss_mib"]),
            f"{row['stream_kib']:.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    return markdown(head, lines)


def _engines_table(rows: Sequence[Row]) -> str:
    head = (
        "arm", "n", "CPU ms a request", "÷ nixl", "CPU ms of the engine cores", "requests/s",
        "TTFT p50 ms", "TTFT p99 ms", "cores",
    )  # fmt: skip
    nixl = next((row for row in rows if row["arm"] == "nixl"), None)
    lines = []
    for row in rows:
        to_nixl = ratio(row, nixl, "cpu_ms_samples") if nixl and nixl is not row else None
        lines.append(
            [
                row["arm"], _shown_n(row), _spread(row, "cpu_ms_per_request"),
                str(to_nixl or ""), f"{row['engine_cpu_ms_per_request']:.1f}",
                _spread(row, "requests_per_s"), _ms(row["added_p50_ms"]), _ms(row["added_p99_ms"]),
                _shares(row["cores"]),
            ]
        )  # fmt: skip
    return markdown(head, lines)


def _shown_n(row: Row) -> str:
    return f"{row['n']}" + (f" ({row['failed']} failed)" if row["failed"] else "")
