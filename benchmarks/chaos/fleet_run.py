"""One arm of a chaos run on a fleet: engines and what is in front of them, load, kills, the end."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from benchmarks.chaos.account import Ending, Fate, Side
from benchmarks.chaos.fleet_account import (
    Aftermath,
    Judged,
    Verdict,
    judge,
    reason_counts,
    row,
)
from benchmarks.chaos.fleet_plan import LOCAL_BELOW, Kill, Request, Topology, victim
from benchmarks.chaos.run import report
from benchmarks.chaos.seats import Seat
from benchmarks.chaos.site import launcher, on_loopback
from benchmarks.chaos.stream import Received, ask
from benchmarks.common.engines import SMALL_FLAGS
from benchmarks.common.routers import start_vllm_router_over
from tests import models
from tests.engine import Completion, Engine, EngineError, say, start_frontend

_LOGPROBS = ("--logprobs-mode", "processed_logprobs")
"""So that a tie between two tokens is seen after penalties, too; a frontend must have the same."""
FLEET_FLAGS = (
    *SMALL_FLAGS,
    # vLLM's CPU backend dies of a seeded prompt that is computed in several steps.
    "--max-num-batched-tokens", "8192",
    *_LOGPROBS,
)  # fmt: skip
"""What every engine is started with, the one for reference too."""

FLEET_START_TIMEOUT_S = 900.0  # four engines on two cores; NixlConnector's spin
REST_TIMEOUT_S = 180.0
SETTLE_S = 3.0
POLL_S = 0.25


@dataclasses.dataclass(frozen=True, slots=True)
class FleetPlan:
    """What every arm gets. policy: vLLM's ``kv_load_failure_policy``."""

    topology: Topology
    requests: Sequence[Request]
    kills: Sequence[Kill]
    duration_s: float
    hang_after_s: float
    policy: str
    spares_last: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """What the clients ask. ``frontend`` is None where it is vllm-router."""

    url: str
    frontend: Engine | None = None

    def counts(self) -> dict[str, dict[str, int]] | None:
        """Return what it has counted, by name and reason; None if it does not tell."""
        if self.frontend is None:
            return None
        try:
            return reason_counts(self.frontend.metrics())
        except httpx.HTTPError as error:
            say(f"the frontend does not answer ({error!r}):\n{self.frontend.log_tail()}")
            return None


async def run_arm(
    arm: str, plan: FleetPlan, references: Mapping[int, Completion], folder: Path, stack: ExitStack
) -> dict[str, Any]:
    """Start the engines, kill them under load, wait for rest, and return the arm's row.

    stack: gets what ends the engines and what is in front of them.

    Raises:
        EngineError: an engine or what is in front of them does not come up.
    """
    sides = plan.topology.engines()
    cluster_key = secrets.token_hex(16)
    connector = "pdplugin" if arm == "frontend" else arm
    say(f"{arm}: starting {len(sides)} engines, one to five minutes; logs in {folder}")
    seats: dict[str, Seat] = {}
    for (name, side), place in zip(sides.items(), on_loopback(len(sides)), strict=True):
        launch = launcher(
            connector, side, place, plan.policy, folder, cluster_key, name, FLEET_FLAGS
        )
        seats[name] = Seat(place, launch)
        stack.callback(seats[name].close)
    tending = [asyncio.create_task(seat.tend()) for seat in seats.values()]
    # A new connection for each request, as from clients that do not know each other.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:
        run = FleetRun(arm, plan, references, sides, seats, client)
        load = asyncio.create_task(run.carry_out(cluster_key, folder, stack))
        try:
            await asyncio.wait([load, *tending], return_when=asyncio.FIRST_COMPLETED)
            for watch in tending:
                if watch.done():  # only by an error
                    watch.result()
            return await load
        finally:
            load.cancel()
            for watch in tending:
                watch.cancel()
            await asyncio.gather(load, *tending, return_exceptions=True)


async def open_frontend(
    urls: Mapping[Side, Sequence[str]], plan: FleetPlan, key: str, folder: Path, stack: ExitStack
) -> Entry:
    """Start ``vllm-pd serve`` in front of the engines."""
    arguments = [
        "--prefill", *urls[Side.PRODUCER], "--decode", *urls[Side.CONSUMER],
        "--local-below", str(LOCAL_BELOW), "--disable-uvicorn-access-log", *_LOGPROBS,
    ]  # fmt: skip
    if not plan.spares_last:
        arguments += ["--queue-timeout", str(plan.hang_after_s)]
    environ = {"VLLM_PD_CLUSTER_KEY": key}
    frontend = start_frontend(
        "serve", models.tiny_llama(), arguments, folder=folder, environ=environ
    )
    stack.callback(frontend.stop)
    await asyncio.to_thread(frontend.wait_until_ready)
    return Entry(frontend.url, frontend)


class FleetRun:
    """One arm under way: sends the requests, kills engines, keeps what became of each."""

    def __init__(
        self,
        arm: str,
        plan: FleetPlan,
        references: Mapping[int, Completion],
        sides: Mapping[str, Side],
        seats: Mapping[str, Seat],
        client: httpx.AsyncClient,
    ) -> None:
        self._arm = arm
        self._plan = plan
        self._references = references
        self._sides = sides
        self._seats = seats
        self._client = client
        self._entry: Entry
        self._began_s = time.monotonic()
        self._num_sent = 0
        self._judged: list[Judged] = []
        self._streams: list[tuple[float, list[float]]] = []
        self._kills: Counter[str] = Counter()

    async def carry_out(self, cluster_key: str, folder: Path, stack: ExitStack) -> dict[str, Any]:
        """Run the whole plan and return the arm's row."""
        for seat in self._seats.values():
            await seat.wait_until_up(FLEET_START_TIMEOUT_S)
        urls = {
            side: [
                self._seats[name].engine.url for name in self._seats if self._sides[name] is side
            ]
            for side in Side
        }
        if self._arm == "frontend":
            self._entry = await open_frontend(urls, self._plan, cluster_key, folder, stack)
        else:
            log = folder / f"{self._arm}-router.log"
            # Not from another thread: the router is to end with its parent.
            router = start_vllm_router_over(
                urls[Side.PRODUCER], urls[Side.CONSUMER], (), log, stack
            )
            self._entry = Entry(router.url)
        await asyncio.sleep(SETTLE_S)
        self._began_s = time.monotonic()
        self._say(f"all engines are up; {self._plan.duration_s:.0f} s of load begin")
        progress = asyncio.create_task(report(self._progress))
        killing = asyncio.create_task(self._kill_all())
        try:
            await self._send_all()
            await killing
            self._say("every request has ended; waiting for rest")
            rests = await self._wait_for_rest()
        finally:
            progress.cancel()
            killing.cancel()
            await asyncio.gather(progress, killing, return_exceptions=True)
        return await self._row(rests)

    # Requests.

    async def _send_all(self) -> None:
        """Send each request at its time; return when the last has ended."""
        async with asyncio.TaskGroup() as group:
            for request in self._plan.requests:
                await self._sleep_until(request.arrival.at_s)
                self._num_sent += 1
                group.create_task(self._serve(request))

    async def _serve(self, request: Request) -> None:
        """Send one request, and judge what comes of it."""
        leaves_s = request.arrival.abort_after_s
        leaves_s = math.inf if leaves_s is None else leaves_s
        hangs_s = self._plan.hang_after_s
        some_engine = next(iter(self._seats.values())).engine
        body = some_engine.body(request.arrival.prompt(), request.max_tokens, **request.options())
        body["stream"] = request.is_streamed
        received = Received()
        fate = Fate.ENDED
        sent_s = time.monotonic()
        try:
            async with asyncio.timeout(min(leaves_s, hangs_s)):
                await ask(self._client, self._entry.url, body, received)
        except TimeoutError:
            fate = Fate.LEFT if leaves_s < hangs_s else Fate.HUNG
        if request.is_streamed:
            self._streams.append((sent_s, received.arrivals))
        reference = self._references[request.index]
        judged = judge(request.index, request.kind, fate, received, reference)
        if judged.verdict not in (Verdict.ANSWERED, Verdict.LEFT):
            what = f"request {judged.index} ({judged.kind}): {judged.what}"
            self._say(f"{judged.verdict.upper()}, {what}")
        self._judged.append(judged)

    # Kills.

    async def _kill_all(self) -> None:
        """Carry out the kills. One that finds no engine to kill waits, and all later ones with it;
        those that this moves beyond the load are left out."""
        late_s = 0.0
        for kill in self._plan.kills:
            await self._sleep_until(kill.at_s + late_s)
            due_s = time.monotonic()
            while (name := self._victim(kill)) is None:
                if self._elapsed_s() > self._plan.duration_s:
                    return
                await asyncio.sleep(POLL_S)
            late_s += time.monotonic() - due_s
            if self._elapsed_s() > self._plan.duration_s:
                return
            self._kills[name] += 1
            self._say(f"kill {name}")
            await self._seats[name].kill_and_restart(is_counted=False)

    def _victim(self, kill: Kill) -> str | None:
        return victim(kill.chance, self._sides, self._up(), self._plan.spares_last)

    def _up(self) -> set[str]:
        return {name for name, seat in self._seats.items() if seat.up.is_set()}

    # The end.

    async def _wait_for_rest(self) -> bool:
        """Wait until no engine holds anything; say whether that came about."""
        try:
            for seat in self._seats.values():
                await seat.wait_until_up(FLEET_START_TIMEOUT_S)
        except EngineError as error:
            self._say(str(error))
            return False
        deadline = time.monotonic() + REST_TIMEOUT_S
        while True:
            rests = [await seat.is_at_rest() for seat in self._seats.values()]
            if all(rests) or time.monotonic() > deadline:
                return all(rests)
            await asyncio.sleep(1.0)

    async def _row(self, came_to_rest: bool) -> dict[str, Any]:
        lives = [life for seat in self._seats.values() for life in seat.lives]
        after = Aftermath(
            dict(sorted(self._kills.items())),
            {name: await seat.used_blocks() for name, seat in self._seats.items()},
            came_to_rest,
            sum(life.ending is Ending.DIED for life in lives),
            await asyncio.to_thread(self._entry.counts),
        )
        topology = str(self._plan.topology)
        return row(self._arm, topology, self._judged, self._streams, after)

    def _progress(self) -> str:
        verdicts = Counter(each.verdict.value for each in self._judged)
        counted = ", ".join(f"{name} {count}" for name, count in verdicts.most_common())
        down = sorted(self._seats.keys() - self._up())
        return (
            f"{self._arm} {self._elapsed_s():4.0f} s: sent {self._num_sent}, "
            f"{counted or 'none ended'}, open {self._num_sent - len(self._judged)}"
            f"{''.join(f'; {one} down' for one in down)}"
        )

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    def _say(self, text: str) -> None:
        say(f"{self._arm} {self._elapsed_s():4.0f} s: {text}")

    async def _sleep_until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, self._began_s + at_s - time.monotonic()))
