"""The client of `benchmarks.goodput`: open loop. Requests are sent when they are due, however many
are still under way."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import time
from collections.abc import Sequence

import aiohttp

from benchmarks.common.client import RequestFailed, session, stream
from benchmarks.goodput.plan import Request, Workload
from benchmarks.goodput.rows import Answer
from tests.engine import say


@dataclasses.dataclass(frozen=True, slots=True)
class Taken:
    """What one rate gave. answers: of the requests that count, in the order they were due.

    cut_off: how many of all requests were still under way when it was given up.
    latest_ms: by how much the client was late with a request at the most.
    """

    answers: list[Answer]
    cut_off: int
    latest_ms: float


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """Where requests go: to each URL in turn."""

    urls: Sequence[str]
    model: str


def load(target: Target, workload: Workload, requests: Sequence[Request], drain_s: float) -> Taken:
    """Send the requests when they are due; no more once all that count are over.

    drain_s: how long after that what is still under way may take, before it is broken off.
    """
    # A collection of everything that was ever imported would hold all streams up.
    gc.collect()
    gc.freeze()
    try:
        return asyncio.run(_Load(target, workload).run(requests, drain_s))
    finally:
        gc.unfreeze()


class _Load:
    def __init__(self, target: Target, workload: Workload) -> None:
        self._urls = itertools.cycle(target.urls)
        self._model = target.model
        self._workload = workload
        self._latest_s = 0.0
        self._failures = 0

    async def run(self, requests: Sequence[Request], drain_s: float) -> Taken:
        answers: dict[int, asyncio.Task[Answer]] = {}
        counted: list[asyncio.Task[Answer]] = []
        async with session() as opened:
            start = time.perf_counter()
            for number, request in enumerate(requests):
                await _sleep_until(start + request.due_s)
                if counted and not request.is_counted and all(task.done() for task in counted):
                    break
                task = asyncio.create_task(
                    self._ask(opened, next(self._urls), start + request.due_s, request.prompt)
                )
                answers[number] = task
                if request.is_counted:
                    counted.append(task)
            if not answers:
                return Taken([], 0, 0.0)
            _, late = await asyncio.wait(answers.values(), timeout=drain_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*answers.values(), return_exceptions=True)
        return Taken([task.result() for task in counted], len(late), 1e3 * self._latest_s)

    async def _ask(
        self, opened: aiohttp.ClientSession, url: str, due: float, prompt: Sequence[int]
    ) -> Answer:
        """Return what became of a request; TTFT is from when it was due, whenever it was sent."""
        arrived: list[float] = []
        tokens = self._workload.answer_tokens
        self._latest_s = max(self._latest_s, time.perf_counter() - due)
        try:
            await stream(opened, url, self._model, prompt, tokens, arrived)
        except RequestFailed as error:
            self._failures += 1
            if self._failures <= 3:
                say(f"a request failed: {error}")
            return Answer.failed()
        except asyncio.CancelledError:
            return Answer.failed()  # broken off, as `run` does with all that take too long
        return Answer.of(due, arrived, tokens)


async def _sleep_until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - time.perf_counter()))  # others run in any case
