"""One arm of a chaos run under way: two engines, the load, the disturbances, the end."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from benchmarks.chaos.account import Fate, Leg, Life, Record, Side, Tally, judge, row
from benchmarks.chaos.plan import AT_PRODUCER, KILLS, Arrival, Disturbance, Event
from benchmarks.chaos.requests import Dispatcher
from benchmarks.chaos.seats import Seat
from benchmarks.chaos.site import launcher, open_site
from benchmarks.common.network import Network
from tests.engine import Completion, say
from tests.parity import FLOAT32, compare

REST_TIMEOUT_S = 120.0
PROGRESS_S = 10.0

TOLERANCE = dataclasses.replace(FLOAT32, tie=1e-3)
"""Of thousands of tokens some few are a tie to the last digits; ties are counted."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What both arms get."""

    arrivals: Sequence[Arrival]
    events: Sequence[Event]
    duration_s: float
    hang_after_s: float
    policy: str


async def run_arm(
    arm: str, plan: Plan, references: Mapping[int, Completion], folder: Path, stack: ExitStack
) -> dict[str, Any]:
    """Start both engines, disturb them under load, wait for rest, and return the arm's row.

    stack: gets what ends the engines and the network between them.

    Raises:
        EngineError: an engine does not come up any more.
        NetworkError: the link cannot be cut.
    """
    where = open_site(stack)
    seats: dict[Side, Seat] = {}
    cluster_key = secrets.token_hex(16)
    say(f"{arm}: starting both engines, half a minute to two minutes")
    for side, place in where.places.items():
        launch = launcher(arm, side, place, plan.policy, folder, cluster_key)
        seats[side] = Seat(place, launch)
        stack.callback(seats[side].close)
    # A new connection for each request: none breaks because an engine was killed before.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:
        dispatcher = Dispatcher(arm, seats, client)
        run = ArmRun(arm, plan, references, where.network, seats, dispatcher)
        tending = [asyncio.create_task(seat.tend()) for seat in seats.values()]
        load = asyncio.create_task(run.carry_out())
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


class ArmRun:
    """One arm under way: sends the requests, disturbs the engines, keeps the records."""

    def __init__(
        self,
        arm: str,
        plan: Plan,
        references: Mapping[int, Completion],
        network: Network | None,
        seats: Mapping[Side, Seat],
        dispatcher: Dispatcher,
    ) -> None:
        self._arm = arm
        self._plan = plan
        self._references = references
        self._network = network
        self._seats = seats
        self._dispatcher = dispatcher
        self._began_s = 0.0
        self._num_sent = 0
        self._records: list[Record] = []
        self._events: Counter[str] = Counter()

    async def carry_out(self) -> dict[str, Any]:
        """Run the whole plan and return the arm's row."""
        for seat in self._seats.values():
            await seat.wait_until_up()
        self._began_s = time.monotonic()
        self._say(f"both engines are up; {self._plan.duration_s:.0f} s of load begin")
        progress = asyncio.create_task(report(self._progress))
        disturbing = asyncio.create_task(self._disturb())
        try:
            await self._send_all()
            await disturbing
            self._say("every request has ended; waiting for rest")
            rests = await self._wait_for_rest()
        finally:
            progress.cancel()
            disturbing.cancel()
            await asyncio.gather(progress, disturbing, return_exceptions=True)
        leaked = {side: await seat.used_blocks() for side, seat in self._seats.items()}
        return row(self._arm, self._tally(), self._lives(), leaked, rests, self._events)

    # Requests.

    async def _send_all(self) -> None:
        """Send each request at its time; return when the last has ended."""
        async with asyncio.TaskGroup() as group:
            for arrival in self._plan.arrivals:
                await self._sleep_until(arrival.at_s)
                self._num_sent += 1
                group.create_task(self._serve(arrival))

    async def _serve(self, arrival: Arrival) -> None:
        """Send one request, and record what became of it."""
        leaves_s = math.inf if arrival.abort_after_s is None else arrival.abort_after_s
        hangs_s = self._plan.hang_after_s
        legs: list[Leg] = []
        completion: Completion | None = None
        fate = Fate.ENDED
        try:
            async with asyncio.timeout(min(leaves_s, hangs_s)):
                completion = await self._dispatcher.dispatch(arrival, legs)
        except TimeoutError:
            fate = Fate.LEFT if leaves_s < hangs_s else Fate.HUNG
        difference, is_tie = None, False
        if fate is Fate.ENDED and legs[-1].side is Side.CONSUMER and legs[-1].status == 200:
            difference, is_tie = judge_answer(self._references[arrival.index], completion)
        if difference is not None:
            self._say(f"WRONG, request {arrival.index}: {difference}")
        if fate is Fate.HUNG:
            self._say(f"HUNG, request {arrival.index}; answered so far: {legs}")
        self._records.append(Record(arrival.index, fate, tuple(legs), difference, is_tie))

    # Disturbances.

    async def _disturb(self) -> None:
        """Carry out the events; a kill waits until both engines are up, and all later ones with it.

        Events that this moves beyond the load are left out.
        """
        late_s = 0.0
        for event in self._plan.events:
            await self._sleep_until(event.at_s + late_s)
            if event.disturbance in KILLS:
                due_s = time.monotonic()
                for seat in self._seats.values():
                    await seat.wait_until_up()
                late_s += time.monotonic() - due_s
            if event.at_s + late_s > self._plan.duration_s:
                return
            await self._carry_out(event)

    async def _carry_out(self, event: Event) -> None:
        at_producer = event.disturbance in AT_PRODUCER
        seat = self._seats[Side.PRODUCER if at_producer else Side.CONSUMER]
        if event.disturbance is Disturbance.DROP_LINK:
            if self._network is None:
                self._note(event, "left out, no namespaces")
                return
            self._note(event)
            try:
                self._network.cut()
                await asyncio.sleep(event.hold_s)
            finally:
                self._network.limit(0)
        elif not seat.up.is_set():
            self._note(event, "left out, it is down")
        elif event.disturbance in KILLS:
            self._note(event)
            await seat.kill_and_restart()
        else:
            self._note(event)
            await seat.stop_for(event.hold_s)

    def _note(self, event: Event, why_not: str = "") -> None:
        name = event.disturbance.value + (f" ({why_not})" if why_not else "")
        self._events[name] += 1
        self._say(name + (f" for {event.hold_s:.1f} s" if event.hold_s and not why_not else ""))

    # The end.

    async def _wait_for_rest(self) -> bool:
        """Wait until neither engine holds anything; say whether that came about."""
        for seat in self._seats.values():
            await seat.wait_until_up()
        deadline = time.monotonic() + REST_TIMEOUT_S
        while True:
            rests = [await seat.is_at_rest() for seat in self._seats.values()]
            if all(rests) or time.monotonic() > deadline:
                break
            await asyncio.sleep(1.0)
        for seat in self._seats.values():
            await seat.read_counts()
        return all(rests)

    def _tally(self) -> Tally:
        return judge(self._records, self._lives(), self._plan.policy == "recompute")

    def _lives(self) -> dict[Side, Sequence[Life]]:
        return {side: seat.lives for side, seat in self._seats.items()}

    def _progress(self) -> str:
        tally = self._tally()
        down = [side for side, seat in self._seats.items() if not seat.up.is_set()]
        return (
            f"{self._arm} {time.monotonic() - self._began_s:4.0f} s: sent {self._num_sent}, "
            f"answered {tally.answered}, wrong {tally.wrong}, failed {tally.failed}, "
            f"unexplained {tally.unexplained}, hung {tally.hung}, "
            f"open {self._num_sent - tally.sent}{''.join(f'; {side} down' for side in down)}"
        )

    def _say(self, text: str) -> None:
        say(f"{self._arm} {time.monotonic() - self._began_s:4.0f} s: {text}")

    async def _sleep_until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, self._began_s + at_s - time.monotonic()))


def judge_answer(reference: Completion, answer: Completion | None) -> tuple[str | None, bool]:
    """Return how an answer differs from the reference, or None; and whether it ends in a tie."""
    if answer is None:
        return "HTTP 200 without a completion", False
    try:
        return None, bool(compare(reference, answer, TOLERANCE))
    except AssertionError as error:
        return str(error) or "another length, end or text", False


async def report(line: Callable[[], str]) -> None:
    """Print a line of progress every 10 s, until cancelled."""
    while True:
        await asyncio.sleep(PROGRESS_S)
        say(line())
