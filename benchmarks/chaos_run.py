"""One arm of a chaos run under way: two engines, the load, the disturbances, the end."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import secrets
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from benchmarks.chaos_account import Fate, Leg, Life, Record, Side, Tally, judge, row
from benchmarks.chaos_engines import Link, Seat, launcher, site
from benchmarks.chaos_plan import AT_PRODUCER, KILLS, Arrival, Disturbance, Event
from tests.engine import PRODUCE, Completion, parse_completion, say
from tests.parity import FLOAT32, compare

MAX_TOKENS = 8
REST_TIMEOUT_S = 120.0
PROGRESS_S = 10.0

TOLERANCE = dataclasses.replace(FLOAT32, tie=1e-3)
"""Of thousands of tokens some few are a tie to the last digits; ties are counted."""

NIXL_PRODUCE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What both arms get."""

    arrivals: Sequence[Arrival]
    events: Sequence[Event]
    duration_s: float
    hang_after_s: float
    policy: str


async def run_arm(
    arm: str, plan: Plan, references: Mapping[int, Completion], folder: Path
) -> dict[str, Any]:
    """Start both engines, disturb them under load, wait for rest, and return the arm's row.

    Raises:
        ChaosError: an engine does not come up any more.
    """
    with ExitStack() as stack:
        where = stack.enter_context(site())
        seats: dict[Side, Seat] = {}
        cluster_key = secrets.token_hex(16)
        for side, address in where.addresses.items():
            launch = launcher(arm, side, address, plan.policy, folder, cluster_key)
            seats[side] = Seat(address, launch)
            stack.callback(seats[side].close)
        say(f"{arm}: starting both engines")
        # A new connection for each request: none breaks because an engine was killed before.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:
            run = ArmRun(arm, plan, references, where.link, seats, client)
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
        link: Link | None,
        seats: Mapping[Side, Seat],
        client: httpx.AsyncClient,
    ) -> None:
        self._arm = arm
        self._plan = plan
        self._references = references
        self._link = link
        self._seats = seats
        self._client = client
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
                completion = await self._dispatch(arrival, legs)
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

    async def _dispatch(self, arrival: Arrival, legs: list[Leg]) -> Completion | None:
        """Ask both engines as a router does; return the consumer's answer, if it is one.

        legs: gets what each engine answered, the deciding one last.
        """
        prompt = arrival.prompt()
        if arrival.concurrent and self._arm == "pdplugin":
            return await self._dispatch_concurrently(prompt, legs)
        produce = PRODUCE if self._arm == "pdplugin" else NIXL_PRODUCE
        leg, first = await self._ask(Side.PRODUCER, prompt, 1, produce)
        legs.append(leg)
        if first is None or first.kv_transfer_params is None:
            return None
        leg, answer = await self._ask(Side.CONSUMER, prompt, MAX_TOKENS, first.kv_transfer_params)
        legs.append(leg)
        return answer

    async def _dispatch_concurrently(self, prompt: list[int], legs: list[Leg]) -> Completion | None:
        """Name the handoff here, and ask both engines at once; the consumer waits for it."""
        handoff_id = uuid.uuid4().hex
        producer = self._seats[Side.PRODUCER].address
        produce = {**PRODUCE, "handoff_id": handoff_id}
        consume = {
            "do_remote_prefill": True,
            "remote_host": producer.kv_host,
            "remote_port": producer.kv_port,
            "remote_handoff_id": handoff_id,
        }
        (first, _), (second, answer) = await asyncio.gather(
            self._ask(Side.PRODUCER, prompt, 1, produce),
            self._ask(Side.CONSUMER, prompt, MAX_TOKENS, consume),
        )
        legs += [first, second]
        return answer

    async def _ask(
        self, side: Side, prompt: list[int], max_tokens: int, params: Mapping[str, Any]
    ) -> tuple[Leg, Completion | None]:
        """Ask one engine. The completion is None unless it answered with one."""
        seat = self._seats[side]
        engine, life, begun_s = seat.engine, len(seat.lives) - 1, time.monotonic()
        body = engine.body(prompt, max_tokens, params)
        status: int | None = None
        completion: Completion | None = None
        message = ""
        try:
            answer = await self._client.post(f"{engine.url}/v1/completions", json=body)
            status = answer.status_code
            if status == 200:
                completion = parse_completion(answer.json())
            else:
                message = error_message(answer.text)
        except httpx.HTTPError as error:
            message = f"{type(error).__name__} {error}".strip()
        except (LookupError, TypeError, ValueError) as error:
            message = f"malformed answer: {error!r}"
        return Leg(side, life, begun_s, time.monotonic(), status, message), completion

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
            if self._link is None:
                self._note(event, "left out, no namespaces")
                return
            self._note(event)
            try:
                self._link.cut()
                await asyncio.sleep(event.hold_s)
            finally:
                self._link.mend()
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
        return judge(self._records, self._lives())

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


def error_message(text: str) -> str:
    """Return what the body of an error says; vLLM's JSON or any text."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return text.strip()


async def report(line: Callable[[], str]) -> None:
    """Print a line of progress every 10 s, until cancelled."""
    while True:
        await asyncio.sleep(PROGRESS_S)
        say(line())
