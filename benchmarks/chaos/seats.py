"""One engine's place through a chaos run: killed, stopped, started again, and watched."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import httpx

from benchmarks.chaos.account import Ending, Life, failure_counts, num_blocks, used_blocks
from benchmarks.common.engines import Place
from tests.engine import START_TIMEOUT_S, Engine, EngineError, say

MAX_FAILED_STARTS = 3


class Seat:
    """An engine's place: the place stays, the process behind it may change.

    ``up`` is set while an engine is there and ready. ``lives`` is its history, for the account.
    """

    def __init__(self, place: Place, launch: Callable[[int], Engine]) -> None:
        self.place = place
        self._launch = launch
        self._failed_starts = 0
        self._num_blocks = 0
        self.up = asyncio.Event()
        self.lives: list[Life] = []
        self.engine = self._begin_life()

    @property
    def life(self) -> Life:
        return self.lives[-1]

    async def tend(self) -> None:
        """See the engine come up, read its counts once a second, restart it if it dies.

        Runs until cancelled. Raises EngineError if it dies at start again and again.
        """
        while True:
            life = self.life
            if life.ending is None:
                if self.engine.process.poll() is not None:
                    self._bury()
                elif self.up.is_set():
                    await self.read_counts()
                else:
                    await self._look_whether_up()
            await asyncio.sleep(1.0)

    async def wait_until_up(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Raises EngineError when that takes too long."""
        try:
            await asyncio.wait_for(self.up.wait(), timeout_s)
        except TimeoutError:
            raise EngineError(
                f"{self.engine.name} was not ready after {timeout_s:.0f} s:\n"
                f"{self.engine.log_tail()}"
            ) from None

    async def kill_and_restart(self, is_counted: bool = True) -> None:
        """Kill the engine as a power cut does, and start another at the same address.

        is_counted: read first what failures it has counted, which has it do a step more.
        """
        life = self.life
        if is_counted:
            await self._step()  # counts leave an engine with its steps
            await self.read_counts()
        if self.life is not life or life.ending is not None:  # it died meanwhile, and is tended to
            return
        self._end_life(Ending.KILLED)
        await asyncio.to_thread(self.engine.kill)
        self.engine = self._begin_life()

    async def stop_for(self, seconds: float) -> None:
        """Stop the engine (SIGSTOP), and let it go on after a while, whatever happens."""
        engine, life, since = self.engine, self.life, time.monotonic()
        try:
            engine.signal_all(signal.SIGSTOP)
            await asyncio.sleep(seconds)
        finally:
            engine.signal_all(signal.SIGCONT)
            life.stops.append((since, time.monotonic()))

    async def read_counts(self) -> None:
        """Read the failures that this life has counted; keep the last if it does not answer."""
        life = self.life
        with suppress(httpx.HTTPError):
            life.failures = failure_counts(await asyncio.to_thread(self.engine.metrics))

    async def is_at_rest(self) -> bool:
        """Say whether the engine holds nothing, by gauges that a step has brought up to date."""
        if not await self._step():
            return False
        try:
            return await asyncio.to_thread(self.engine.is_at_rest)
        except httpx.HTTPError:
            return False

    async def used_blocks(self) -> int | None:
        """Return the blocks in use by the engine's gauges; None if it does not tell."""
        try:
            now = await asyncio.to_thread(self.engine.metrics)
            return used_blocks(now["vllm:kv_cache_usage_perc"], self._num_blocks)
        except (httpx.HTTPError, LookupError):
            return None

    def close(self) -> None:
        """End the engine and whatever it started."""
        try:
            self.engine.stop()
        finally:
            self._kill_group()

    async def _step(self) -> bool:
        """Make the engine step, by a tiny request of its own; say whether it answered."""
        try:
            await asyncio.to_thread(self.engine.complete, [5, 6, 7, 8], 2, timeout_s=10.0)
        except httpx.HTTPError:
            return False
        await asyncio.sleep(0.2)
        return True

    async def _look_whether_up(self) -> None:
        life = self.life
        with suppress(httpx.HTTPError):
            metrics = await asyncio.to_thread(self._metrics_if_healthy)
            if metrics is not None:
                self._num_blocks = num_blocks(metrics)
                self._failed_starts = 0
                life.ready_s = time.monotonic()
                self.up.set()

    def _metrics_if_healthy(self) -> dict[str, float] | None:
        if httpx.get(f"{self.engine.url}/health", timeout=5).status_code != 200:
            return None
        return self.engine.metrics()

    def _begin_life(self) -> Engine:
        self.lives.append(Life(started_s=time.monotonic()))
        return self._launch(len(self.lives) - 1)

    def _end_life(self, ending: Ending) -> None:
        self.up.clear()
        self.life.ending, self.life.ended_s = ending, time.monotonic()

    def _bury(self) -> None:
        """The engine has ended by itself: say so, clear up, start another."""
        status = self.engine.process.returncode
        say(f"{self.engine.name} died by itself, status {status}:\n{self.engine.log_tail()}")
        self._failed_starts += not self.up.is_set()
        self._end_life(Ending.DIED)
        self._kill_group()
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise EngineError(f"{self.engine.name} died at start {MAX_FAILED_STARTS} times")
        self.engine = self._begin_life()

    def _kill_group(self) -> None:
        """Kill what the engine's server left: it led a process group."""
        with suppress(ProcessLookupError):
            os.killpg(self.engine.process.pid, signal.SIGKILL)
