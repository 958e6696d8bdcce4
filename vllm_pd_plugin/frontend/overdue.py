"""The parts of requests that engines work on, where they are, and which have taken too long.

To wait in the queue of an engine that goes on is no failure, however long that is: the request's
own deadline ends it. What counts is the time that an engine takes once it works on a request, and
the time in which it does nothing at all.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator

from vllm_pd_plugin.frontend.pool.members import Pool
from vllm_pd_plugin.frontend.requests.legs import Leg, LegKind
from vllm_pd_plugin.frontend.routing.choice import EngineKey
from vllm_pd_plugin.frontend.underway import Limits, Underway
from vllm_pd_plugin.ids import RequestId


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a leg beside what is in it; times are 0 for what has not happened.

    last_output_at: of the leg. engine_moved_at: when its engine was last seen to have done
    something, for anybody. prefilled_at: when another engine had computed its prompt for it.
    prefills, decodes: whether a prefill leg of the same request is under way, and a decode leg that
    has given something out.
    """

    last_output_at: float
    engine_moved_at: float = 0.0
    prefilled_at: float = 0.0
    prefills: bool = False
    decodes: bool = False


def is_overdue(leg: Leg, seen: Seen, limits: Limits, now: float) -> bool:
    """Say whether a leg has taken too long."""
    if leg.kind is LegKind.PREFILL and seen.decodes:
        return False  # its token was not waited for
    if leg.kind is LegKind.DECODE and not leg.has_output and seen.prefills:
        return False  # what it waits for has a time limit of its own
    limit = limits.stall_s if leg.has_output else limits.first_token_s
    return now - _since(leg, seen) > limit


def _since(leg: Leg, seen: Seen) -> float:
    """Return since when a leg is waited for."""
    if leg.is_waiting:
        return max(leg.started_at, seen.last_output_at, seen.engine_moved_at)
    return max(leg.begun_at, seen.last_output_at, seen.prefilled_at)


class OpenLegs:
    """Every leg under way, by its id; owned by the event loop.

    A leg is looked at when it may have taken too long at the soonest, and not in every sweep.
    """

    def __init__(self, limits: Limits, pool: Pool) -> None:
        self._limits = limits
        self._pool = pool
        self._legs: dict[RequestId, tuple[Underway, Leg]] = {}
        self._heard_at: dict[RequestId, float] = {}
        self._on: dict[EngineKey, dict[RequestId, Underway]] = {}
        """Which legs are on an engine, or read KV from it, and whose they are."""
        self._engines: dict[RequestId, tuple[EngineKey, ...]] = {}
        """On which engines a leg is in that sense."""
        self._shortest_s = min(limits.first_token_s, limits.stall_s)
        self._to_look_at: list[tuple[float, RequestId]] = []
        """A heap: when to look at which leg again."""

    def put(self, underway: Underway, leg: Leg) -> None:
        """An engine is asked for it."""
        self._legs[leg.id] = underway, leg
        route = underway.course.route
        prefill = route.prefill if route is not None and leg.kind is LegKind.DECODE else None
        self._engines[leg.id] = (leg.engine,) if prefill is None else (leg.engine, prefill)
        for engine in self._engines[leg.id]:
            self._on.setdefault(engine, {})[leg.id] = underway
        heapq.heappush(self._to_look_at, (leg.started_at + self._shortest_s, leg.id))

    def remove(self, leg_id: RequestId) -> None:
        """It is over."""
        self._legs.pop(leg_id, None)
        self._heard_at.pop(leg_id, None)
        for engine in self._engines.pop(leg_id, ()):
            self._on[engine].pop(leg_id)
            if not self._on[engine]:
                del self._on[engine]

    def on(self, engine: EngineKey) -> list[Underway]:
        """Return the requests that an engine works on, or has to hand KV over for."""
        return list(dict.fromkeys(self._on.get(engine, {}).values()))

    def hear(self, leg_id: RequestId, now: float) -> tuple[Underway, Leg] | None:
        """An engine gives something out: return for what; None if that is over."""
        found = self._legs.get(leg_id)
        if found is not None:
            self._heard_at[leg_id] = now
        return found

    def overdue(self, now: float) -> Iterator[tuple[Underway, Leg]]:
        """Return those that have taken too long, as long as they are under way."""
        again: list[tuple[float, RequestId]] = []
        try:
            while self._to_look_at and self._to_look_at[0][0] < now:
                _, leg_id = heapq.heappop(self._to_look_at)
                if leg_id not in self._legs:
                    continue
                underway, leg = self._legs[leg_id]
                seen = self._seen(leg, underway)
                again.append((max(now, _since(leg, seen) + self._shortest_s), leg_id))
                if is_overdue(leg, seen, self._limits, now):
                    yield underway, leg
        finally:  # also where what is done about one fails
            for each in again:
                heapq.heappush(self._to_look_at, each)

    def _seen(self, leg: Leg, underway: Underway) -> Seen:
        member, course = self._pool.get(leg.engine), underway.course
        return Seen(
            self._heard_at.get(leg.id, 0.0),
            member.moved_at if member is not None else 0.0,
            underway.marks.prefilled_at,
            course.prefills,
            course.decodes,
        )
