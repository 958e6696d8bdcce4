"""The measurements of `benchmarks.handoff`, on engines that are up."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from benchmarks.common.client import Prompts, RequestFailed, ask, session, stream
from benchmarks.common.network import Network
from benchmarks.common.statistics import Row, percentile, rotated
from benchmarks.handoff.report import shown_link
from benchmarks.handoff.routes import WARM_UP_TOKENS, Route
from benchmarks.handoff.rows import Disturbance, Key, Sample, latency_row, undisturbed_row
from tests.engine import say

T = TypeVar("T")

ANSWER_TOKENS = 16
COUNTERS_S = 0.2
"""How long after a request its last bytes and counts may still come."""

RUNNING_DECODES = 8
RUNNING_PROMPT = 128
RUNNING_TOKENS = 3000
STARTED_TOKENS = 8
QUIET_S = 2.0
HANDOFF_TOKENS = 4


@dataclasses.dataclass(slots=True)
class Bench:
    """One route is awake at a time."""

    network: Network
    routes: Sequence[Route]
    repeat: int
    handoffs: int
    prompts: Prompts = dataclasses.field(default_factory=lambda: Prompts(2))
    seen: set[tuple[str, int]] = dataclasses.field(default_factory=set)

    def latency(self, prompt_tokens: int, link_mbit: int) -> list[Row]:
        """Return a row for each route, from ``repeat`` single requests to each."""
        samples: dict[str, list[Sample | None]] = {route.name: [] for route in self.routes}
        where = f"{prompt_tokens} tokens, link {shown_link(link_mbit)}"
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
        where = f"{prompt_tokens} tokens, link {shown_link(link_mbit)}"
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
        warm_up = WARM_UP_TOKENS
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
            route.pause()

    def _one_request(self, route: Route, prompt_tokens: int) -> Sample:
        prompt = self.prompts.next(prompt_tokens)
        counts = route.arm.counts()
        wire_bytes = self.network.wire_bytes()
        cpu = route.cpu_seconds()
        sent, arrivals = ask(route.url, route.model, prompt, ANSWER_TOKENS, route.codec)
        used = {label: s - cpu.get(label, 0.0) for label, s in route.cpu_seconds().items()}
        time.sleep(COUNTERS_S)
        if len(arrivals) < 2:
            raise RequestFailed(f"{ANSWER_TOKENS} tokens came in one piece")
        after = route.arm.counts()
        return Sample.of(
            sent,
            arrivals,
            0 if route.router is None else self.network.wire_bytes() - wire_bytes,
            {name: count - counts.get(name, 0.0) for name, count in after.items()},
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
    return Key(route.arm.name, route.dispatch, route.codec, prompt_tokens, link_mbit)
