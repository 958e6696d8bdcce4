"""What a chaos run will do: its requests and its disturbances, from the seed alone.

Pure: both arms of a run, and the reference before them, get the same plan.
"""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from random import Random

MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 50, 1500
ABORTED_SHARE = 0.1
MAX_ABORT_AFTER_S = 1.0

MIN_GAP_S, MAX_GAP_S = 10.0, 20.0
MIN_KILL_GAP_S = 75.0
"""An engine takes 30 to 50 s to start, longer under load."""

STOP_S = (1.0, 8.0)
DROP_S = (2.0, 6.0)

LAST_EVENT_BEFORE_END_S = 10.0
KILL_FREE_SHARE = 0.2
"""Of the run, at its end: the engines that are looked at for leaks have then lived for a while."""


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """One request.

    concurrent: producer and consumer are asked at once, where the connector can do that.
    abort_after_s: when the client leaves; None if it stays.
    """

    index: int
    at_s: float
    prompt_tokens: int
    concurrent: bool
    abort_after_s: float | None
    seed: int

    def prompt(self) -> list[int]:
        """Return token ids that no other request has; none is special."""
        chooser = Random(f"{self.seed} prompt {self.index}")
        return [chooser.randrange(100, 49_000) for _ in range(self.prompt_tokens)]


class Disturbance(StrEnum):
    KILL_PRODUCER = "kill producer"
    KILL_CONSUMER = "kill consumer"
    STOP_PRODUCER = "stop producer"
    STOP_CONSUMER = "stop consumer"
    DROP_LINK = "drop link"


KILLS = frozenset({Disturbance.KILL_PRODUCER, Disturbance.KILL_CONSUMER})
AT_PRODUCER = frozenset({Disturbance.KILL_PRODUCER, Disturbance.STOP_PRODUCER})
_HOLD_S = {
    Disturbance.STOP_PRODUCER: STOP_S,
    Disturbance.STOP_CONSUMER: STOP_S,
    Disturbance.DROP_LINK: DROP_S,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One disturbance. ``hold_s``: how long a stop or a drop lasts; 0 for a kill."""

    at_s: float
    disturbance: Disturbance
    hold_s: float


def plan_arrivals(seed: int, duration_s: float, rate: float) -> list[Arrival]:
    """Return Poisson arrivals, ``rate`` a second on average."""
    chooser = Random(f"{seed} arrivals")
    arrivals: list[Arrival] = []
    at_s = chooser.expovariate(rate)
    while at_s < duration_s:
        leaves = chooser.random() < ABORTED_SHARE
        abort_after_s = chooser.uniform(0.0, MAX_ABORT_AFTER_S)
        arrivals.append(
            Arrival(
                index=len(arrivals),
                at_s=at_s,
                prompt_tokens=chooser.randint(MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS),
                concurrent=chooser.random() < 0.5,
                abort_after_s=abort_after_s if leaves else None,
                seed=seed,
            )
        )
        at_s += chooser.expovariate(rate)
    return arrivals


def plan_events(seed: int, duration_s: float) -> list[Event]:
    """Return the disturbances, 10 to 20 s apart, so that no two overlap.

    Each kind comes once in every round; a kill that would follow another too soon waits for
    its turn.
    """
    chooser = Random(f"{seed} events")
    events: list[Event] = []
    waiting: list[Disturbance] = []
    next_kill_s, last_kill_s = 0.0, duration_s * (1 - KILL_FREE_SHARE)
    at_s = chooser.uniform(MIN_GAP_S, MAX_GAP_S)
    while at_s <= duration_s - LAST_EVENT_BEFORE_END_S:
        may_kill = next_kill_s <= at_s <= last_kill_s
        disturbance = _take(waiting, may_kill, chooser)
        if disturbance in KILLS:
            next_kill_s = at_s + MIN_KILL_GAP_S
        hold_s = chooser.uniform(*_HOLD_S.get(disturbance, (0.0, 0.0)))
        events.append(Event(at_s, disturbance, hold_s))
        at_s += chooser.uniform(MIN_GAP_S, MAX_GAP_S)
    return events


def _take(waiting: list[Disturbance], may_kill: bool, chooser: Random) -> Disturbance:
    """Take the first one that is allowed; begin a new round when there is none."""
    while True:
        for disturbance in waiting:
            if may_kill or disturbance not in KILLS:
                waiting.remove(disturbance)
                return disturbance
        # Kills still waiting stay in front, and are not doubled.
        waiting += chooser.sample(
            [one for one in Disturbance if one not in waiting], len(Disturbance) - len(waiting)
        )
