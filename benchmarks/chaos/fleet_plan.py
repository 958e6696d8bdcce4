"""What a chaos run on a fleet will do: its requests and its kills, from the seed alone. Pure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence, Set
from enum import StrEnum
from random import Random
from typing import Any

from benchmarks.chaos.account import Side
from benchmarks.chaos.plan import Arrival, plan_arrivals

LOCAL_BELOW = 128
"""Prompts with fewer tokens are short; a frontend is to compute them where they are decoded."""
SHORT_TOKENS, LONG_TOKENS = (8, 100), (300, 1500)
ANSWER_TOKENS = (16, 48, 96)
MAX_ABORT_AFTER_S = 2.0
MAX_ENGINES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Topology:
    """How many engines of each role."""

    prefill: int
    decode: int

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Read 2P2D. Raises ValueError for anything else."""
        found = re.fullmatch(r"([1-9]\d*)P([1-9]\d*)D", text.upper())
        if found is None or int(found[1]) + int(found[2]) > MAX_ENGINES:
            raise ValueError(f"{text!r} is no topology: such as 2P2D, {MAX_ENGINES} at the most")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.prefill}P{self.decode}D"

    def engines(self) -> dict[str, Side]:
        """Return the engines' names and sides."""
        sides = {"prefill": (Side.PRODUCER, self.prefill), "decode": (Side.CONSUMER, self.decode)}
        return {
            f"{role}-{number}": side
            for role, (side, count) in sides.items()
            for number in range(count)
        }


class Sampling(StrEnum):
    GREEDY = "greedy"
    PENALIZED = "greedy with penalties"
    SEEDED = "seeded"


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One request. ``arrival`` says when it comes, when its client leaves, and its prompt."""

    arrival: Arrival
    sampling: Sampling
    is_streamed: bool
    max_tokens: int

    @property
    def index(self) -> int:
        return self.arrival.index

    @property
    def kind(self) -> str:
        length = "short" if self.arrival.prompt_tokens < LOCAL_BELOW else "long"
        return f"{length}, {self.sampling}, {'streamed' if self.is_streamed else 'whole'}"

    def options(self) -> dict[str, Any]:
        """Return how it is to be sampled, as the API takes it."""
        options: dict[str, Any] = {"ignore_eos": True}
        match self.sampling:
            case Sampling.PENALIZED:
                options |= {"presence_penalty": 0.4, "frequency_penalty": 0.4}
                options |= {"repetition_penalty": 1.1}
            case Sampling.SEEDED:
                options |= {"temperature": 0.8, "seed": 1000 + self.index}
        return options


def plan_requests(seed: int, duration_s: float, rate: float) -> list[Request]:
    """Return requests of mixed kinds, ``rate`` a second on average; one client in ten leaves."""
    chooser = Random(f"{seed} kinds")
    requests = []
    for arrival in plan_arrivals(seed, duration_s, rate):
        lengths = chooser.choice((SHORT_TOKENS, LONG_TOKENS))
        leaves_s = chooser.uniform(0.0, MAX_ABORT_AFTER_S)
        arrival = dataclasses.replace(
            arrival,
            prompt_tokens=chooser.randint(*lengths),
            abort_after_s=None if arrival.abort_after_s is None else leaves_s,
        )
        sampling = chooser.choice(tuple(Sampling))
        streamed = chooser.random() < 0.75
        requests.append(Request(arrival, sampling, streamed, chooser.choice(ANSWER_TOKENS)))
    return requests


@dataclasses.dataclass(frozen=True, slots=True)
class Kill:
    """``chance``, in [0, 1), picks the engine among those that may be killed then."""

    at_s: float
    chance: float


def plan_kills(seed: int, duration_s: float, every_s: float) -> list[Kill]:
    """Return one kill in every ``every_s``, at any moment of it."""
    chooser = Random(f"{seed} kills")
    return [
        Kill(every_s * (number + chooser.random()), chooser.random())
        for number in range(int(duration_s / every_s))
    ]


def victim(
    chance: float, sides: Mapping[str, Side], up: Set[str], spares_last: bool = True
) -> str | None:
    """Return which engine is to be killed; None if none may be now.

    up: the engines that are.
    spares_last: the last one of a side that is up is left alone.
    """
    candidates: Sequence[str] = sorted(
        name
        for name in up
        if not spares_last or any(sides[other] is sides[name] for other in up - {name})
    )
    return candidates[int(chance * len(candidates))] if candidates else None
