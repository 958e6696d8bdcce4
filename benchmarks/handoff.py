"""What a handoff costs: one engine alone, vLLM's NixlConnector behind vllm-router, and pdplugin.

Arms: `alone` (one engine, no connector), `nixl` (NixlConnector behind vllm-router), `pdplugin`
(behind the same router: serial; and behind examples/concurrent_proxy.py: concurrent). Producer and
consumer are in two network namespaces, joined by a link whose rate is set. All arms are measured in
one run, interleaved. Needs root, iproute2, two cores and some 16 GB of memory.

    python -m benchmarks.handoff --prompts 512 --link-mbit 0 --repeat 7
    python -m benchmarks.handoff --prompts 512,2048 --link-mbit 0,300,1000 \\
      --json benchmarks/results/handoff-links.json
    python -m benchmarks.handoff --prompts 128,512,2048,8192 --link-mbit 0,1000,300,100
    python -m benchmarks.handoff --undisturbed --json benchmarks/results/handoff-undisturbed.json

`--json FILE` also writes the tables (FILE with .md) and, without --undisturbed, a plot (.png). The
JSON and the tables grow while the benchmark runs.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

from benchmarks import cluster, report
from benchmarks.client import Prompts, RequestFailed, ask, session, stream
from benchmarks.cluster import Cores, Route
from benchmarks.network import Network, NetworkError, two_hosts, what_is_missing
from benchmarks.rows import (
    Disturbance,
    Key,
    Row,
    Sample,
    latency_row,
    percentile,
    undisturbed_row,
    with_hidden_shares,
)
from tests import models
from tests.engine import EngineError, say

T = TypeVar("T")

ARMS = ("alone", "nixl", "pdplugin")
DISPATCHES = ("serial", "concurrent")
CODECS = ("raw",)

MIN_PROMPT, MAX_PROMPT = 128, 8192
ANSWER_TOKENS = 16
COUNTERS_S = 0.2
"""How long after a request its last bytes and counts may still come."""

RUNNING_DECODES = 8
RUNNING_PROMPT = 128
RUNNING_TOKENS = 3000
STARTED_TOKENS = 8
QUIET_S = 2.0
HANDOFF_TOKENS = 4


def main() -> int:
    args = parse_arguments()
    missing = what_is_missing()
    if missing:
        say(f"benchmarks.handoff: {missing}")
        return 1
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"
    signal.signal(signal.SIGTERM, interrupt)
    stack = ExitStack()
    try:
        run(args, stack)
    except (NetworkError, EngineError, RequestFailed) as error:
        say(f"benchmarks.handoff: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        with suppress(OSError):  # whoever read our output may have gone
            say("stopping everything")
        stack.close()
    return 0


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.handoff",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--prompts",
        type=whole_numbers(MIN_PROMPT, MAX_PROMPT),
        metavar="N,...",
        help=f"prompt lengths, {MIN_PROMPT} to {MAX_PROMPT} (512; with --undisturbed 2048)",
    )
    parser.add_argument(
        "--link-mbit",
        type=whole_numbers(0, 100_000),
        default=[0],
        metavar="N,...",
        help="rates of the link, 0 for unlimited (0)",
    )
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of each (%(default)s)")
    parser.add_argument(
        "--arms", type=some_of(ARMS), default=ARMS, metavar="ARM,...",
        help=f"some of {', '.join(ARMS)} (all)",
    )  # fmt: skip
    parser.add_argument(
        "--dispatch", type=some_of(DISPATCHES), default=DISPATCHES, metavar="WAY,...",
        help="of pdplugin: serial, concurrent (both)",
    )  # fmt: skip
    parser.add_argument(
        "--codec", type=some_of(CODECS), default=CODECS, metavar="CODEC,...",
        help=f"of pdplugin: some of {', '.join(CODECS)} ({CODECS[0]})",
    )  # fmt: skip
    parser.add_argument(
        "--undisturbed",
        action="store_true",
        help="measure ITL of eight running decodes while handoffs arrive",
    )
    parser.add_argument(
        "--handoffs", type=int, default=5, help="with --undisturbed: how many arrive (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the servers' logs here")
    args = parser.parse_args()
    if args.repeat < 1 or args.handoffs < 1:
        parser.error("--repeat and --handoffs must be 1 or more")
    args.prompts = args.prompts or ([2048] if args.undisturbed else [512])
    if args.undisturbed:
        args.arms = [arm for arm in args.arms if arm != "alone"]
    if not args.arms:
        parser.error("--undisturbed needs nixl or pdplugin among --arms")
    return args


def whole_numbers(low: int, high: int) -> Callable[[str], list[int]]:
    """Return a parser of a comma list of numbers in that range."""

    def parse(text: str) -> list[int]:
        parts = text.split(",")
        if not all(part.isdecimal() and low <= int(part) <= high for part in parts):
            raise argparse.ArgumentTypeError(
                f"{text!r}: allowed are whole numbers from {low} to {high}, with commas between"
            )
        return list(dict.fromkeys(map(int, parts)))

    return parse


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a parser of a comma list of known names; the order is that of ``known``."""

    def parse(text: str) -> list[str]:
        parts = text.split(",")
        unknown = [part for part in parts if part not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)}: allowed are {', '.join(known)}, with commas between"
            )
        return [name for name in known if name in parts]

    return parse


def run(args: argparse.Namespace, stack: ExitStack) -> None:
    """Start everything, measure, print and write. ``stack`` gets what ends it all."""
    facts = report.machine()
    model = models.bench_llama()
    folder = args.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
    folder.mkdir(parents=True, exist_ok=True)
    cores = Cores.choose()
    network = stack.enter_context(two_hosts())
    routes = cluster.start(args.arms, args.dispatch, model, network, folder, stack)
    notes = report.UNDISTURBED_NOTES if args.undisturbed else report.LATENCY_NOTES
    facts += [
        note.format(compute=cores.compute, other=cores.other, running=RUNNING_PROMPT)
        for note in (*report.SHARED_NOTES, *notes)
    ]
    facts.append(f"Engines: {' '.join(cluster.ENGINE_FLAGS)}; model {model.name}, float32.")
    bench = Bench(network, routes, args.repeat, args.handoffs)
    rows: list[Row] = []
    tables: list[tuple[str, str]] = []
    for link in args.link_mbit:
        network.limit(link)
        for prompt in args.prompts:
            if args.undisturbed:
                rows += bench.undisturbed(prompt, link)
                tables = report.undisturbed_tables(rows)
            else:
                rows = with_hidden_shares([*rows, *bench.latency(prompt, link)])
                tables = report.latency_tables(rows)
            if args.json:
                report.write(args.json, rows, tables, facts)
    print(report.as_text(tables, facts))
    if args.json and not args.undisturbed:
        report.plot(args.json.with_suffix(".png"), rows)


@dataclasses.dataclass(slots=True)
class Bench:
    """The measurements, on engines that are up. One route is awake at a time."""

    network: Network
    routes: Sequence[Route]
    repeat: int
    handoffs: int
    prompts: Prompts = dataclasses.field(default_factory=lambda: Prompts(2))
    seen: set[tuple[str, int]] = dataclasses.field(default_factory=set)

    def latency(self, prompt_tokens: int, link_mbit: int) -> list[Row]:
        """Return a row for each route, from ``repeat`` single requests to each."""
        samples: dict[str, list[Sample | None]] = {route.name: [] for route in self.routes}
        where = f"{prompt_tokens} tokens, link {report.shown_link(link_mbit)}"
        for repetition in range(self.repeat):
            for route in rotated(self.routes, repetition):
                sample = self._turn(route, prompt_tokens, self._one_request)
                samples[route.name].append(sample)
            last = ", ".join(
                f"{name} {taken[-1].ttft_ms:.0f}" if taken[-1] else f"{name} failed"
                for name, taken in samples.items()
            )
            say(f"{where}, {repetition + 1} of {self.repeat}: TTFT ms: {last}")
        return [
            latency_row(key_of(route, prompt_tokens, link_mbit), samples[route.name])
            for route in self.routes
            if self._any(route, samples[route.name])
        ]

    def undisturbed(self, prompt_tokens: int, link_mbit: int) -> list[Row]:
        """Return a row for each route, from ``repeat`` times eight decodes and some handoffs."""
        runs: dict[str, list[Disturbance | None]] = {route.name: [] for route in self.routes}
        where = f"{prompt_tokens} tokens, link {report.shown_link(link_mbit)}"
        for repetition in range(self.repeat):
            for route in rotated(self.routes, repetition):
                runs[route.name].append(self._turn(route, prompt_tokens, self._disturb))
            last = ", ".join(
                f"{name} {percentile(taken[-1].during_ms, 99)}" if taken[-1] else f"{name} failed"
                for name, taken in runs.items()
            )
            say(f"{where}, {repetition + 1} of {self.repeat}: ITL p99 ms: {last}")
        return [
            undisturbed_row(
                key_of(route, prompt_tokens, link_mbit), self.handoffs, runs[route.name]
            )
            for route in self.routes
            if self._any(route, runs[route.name])
        ]

    def _turn(
        self, route: Route, prompt_tokens: int, measure: Callable[[Route, int], T]
    ) -> T | None:
        """Wake a route, measure, and pause it; None if a request failed, which is said."""
        warm_up = cluster.WARM_UP_TOKENS
        if (route.name, prompt_tokens) not in self.seen:
            # The first prompt of a length touches memory that later ones find there.
            self.seen.add((route.name, prompt_tokens))
            warm_up = prompt_tokens
        try:
            route.wake(self.prompts, warm_up)
            return measure(route, prompt_tokens)
        except RequestFailed as error:
            say(f"{route.name}: {error}\n{route.tails()}")
            return None
        finally:
            route.arm.pause()

    def _one_request(self, route: Route, prompt_tokens: int) -> Sample:
        prompt = self.prompts.next(prompt_tokens)
        descriptors = route.arm.descriptors()
        wire_bytes = self.network.wire_bytes()
        cpu = route.cpu_seconds()
        sent, arrivals = ask(route.url, route.model, prompt, ANSWER_TOKENS)
        used = {label: s - cpu.get(label, 0.0) for label, s in route.cpu_seconds().items()}
        time.sleep(COUNTERS_S)
        if len(arrivals) < 2:
            raise RequestFailed(f"{ANSWER_TOKENS} tokens came in one piece")
        alone = route.front is None
        after = route.arm.descriptors()
        return Sample.of(
            sent,
            arrivals,
            0 if alone else self.network.wire_bytes() - wire_bytes,
            None if after is None else after - (descriptors or 0.0),
            used,
        )

    def _disturb(self, route: Route, prompt_tokens: int) -> Disturbance:
        return asyncio.run(self._decode_and_disturb(route, prompt_tokens))

    async def _decode_and_disturb(self, route: Route, prompt_tokens: int) -> Disturbance:
        arrivals: list[list[float]] = [[] for _ in range(RUNNING_DECODES)]
        handoff_prompts = [self.prompts.next(prompt_tokens) for _ in range(self.handoffs)]
        async with session() as opened:
            decodes = [
                asyncio.create_task(
                    stream(
                        opened, route.url, route.model, self.prompts.next(RUNNING_PROMPT),
                        RUNNING_TOKENS, taken,
                    )
                )
                for taken in arrivals
            ]  # fmt: skip
            try:
                while any(len(taken) < STARTED_TOKENS for taken in arrivals):
                    check_running(decodes)
                    await asyncio.sleep(0.01)
                quiet_from = time.perf_counter()
                await asyncio.sleep(QUIET_S)
                quiet_to = time.perf_counter()
                ttft_ms = []
                for prompt in handoff_prompts:
                    got: list[float] = []
                    sent = await stream(opened, route.url, route.model, prompt, HANDOFF_TOKENS, got)
                    ttft_ms.append(1e3 * (got[0] - sent))
                ended = time.perf_counter()
                check_running(decodes)
            finally:
                for decode in decodes:
                    decode.cancel()
                await asyncio.gather(*decodes, return_exceptions=True)
        return Disturbance(
            gaps_between(arrivals, quiet_from, quiet_to),
            gaps_between(arrivals, quiet_to, ended),
            tuple(ttft_ms),
        )

    @staticmethod
    def _any(route: Route, taken: Sequence[object | None]) -> bool:
        """Say whether a route has any sample; the report leaves one out that has none."""
        found = any(sample is not None for sample in taken)
        if not found:
            say(f"{route.name}: every request failed; no row")
        return found


def check_running(decodes: Sequence[asyncio.Task[float]]) -> None:
    """Raise RequestFailed if one of the running decodes has ended, for whatever reason."""
    for decode in decodes:
        if decode.done():
            decode.result()  # raises what ended it
            raise RequestFailed(f"a decode of {RUNNING_TOKENS} tokens ended before the handoffs")


def gaps_between(
    arrivals: Sequence[Sequence[float]], start: float, end: float
) -> tuple[float, ...]:
    """Return the gaps, in milliseconds, that ended in that time."""
    return tuple(
        1e3 * (later - earlier)
        for taken in arrivals
        for earlier, later in zip(taken, taken[1:], strict=False)
        if start < later <= end
    )


def key_of(route: Route, prompt_tokens: int, link_mbit: int) -> Key:
    return Key(route.arm.name, route.dispatch, "raw", prompt_tokens, link_mbit)


def rotated(routes: Sequence[Route], by: int) -> list[Route]:
    by %= len(routes)
    return [*routes[by:], *routes[:by]]


if __name__ == "__main__":
    sys.exit(main())
