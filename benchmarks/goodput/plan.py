"""What `benchmarks.goodput` sends, and when, and what it expects of an answer. Pure.

The same seed gives the same arrival times and the same prompts, whichever arm they are for.
"""

from __future__ import annotations

import dataclasses
import random

from benchmarks.common.client import Prompts


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """Requests of one kind. shared_tokens: how many tokens all prompts begin with alike."""

    name: str
    prompt_tokens: int
    answer_tokens: int
    shared_tokens: int = 0

    def __str__(self) -> str:
        shared = f", {self.shared_tokens} of them shared" if self.shared_tokens else ""
        return f"{self.name}: {self.prompt_tokens} tokens in{shared}, {self.answer_tokens} out"


LONG_IN = Workload("long-in", 512, 64)
CHAT = Workload("chat", 256, 96, shared_tokens=128)
SHORT_IN = Workload("short-in", 64, 192)
WORKLOADS = (LONG_IN, CHAT, SHORT_IN)


@dataclasses.dataclass(frozen=True, slots=True)
class Slo:
    """What an answer must keep to: the time to its first token, and the mean time of each more."""

    name: str
    ttft_ms: float
    tpot_ms: float

    def __str__(self) -> str:
        return f"{self.name}: TTFT {self.ttft_ms:g} ms, TPOT {self.tpot_ms:g} ms"

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Read NAME:TTFT/TPOT, in milliseconds. Raises ValueError for anything else."""
        name, _, limits = text.partition(":")
        ttft, _, tpot = limits.partition("/")
        slo = cls(name.strip(), float(ttft), float(tpot))
        if not slo.name or slo.ttft_ms <= 0 or slo.tpot_ms <= 0:
            raise ValueError(text)
        return slo


HEADLINE = "headline"
SLOS = (Slo("tight", 400, 35), Slo(HEADLINE, 600, 45), Slo("loose", 1200, 80))


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """due_s: when it is to be sent, after the start. is_counted: false for those that only load."""

    due_s: float
    prompt: tuple[int, ...]
    is_counted: bool


def arrivals(rate: float, seconds: float, source: random.Random) -> list[float]:
    """Return when requests arrive: a Poisson process of so many a second."""
    times: list[float] = []
    now = source.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += source.expovariate(rate)
    return times


@dataclasses.dataclass(frozen=True, slots=True)
class Phases:
    """One rate: requests that warm up, those that count, those that keep the load up meanwhile."""

    warm_up_s: float
    counted_s: float
    tail_s: float

    def plan(self, workload: Workload, rate: float, seed: int, repetition: int) -> list[Request]:
        """Return what to send, in order; the same for every arm."""
        source = random.Random(f"{seed} {workload.name} {rate:g} {repetition}")
        prompts = Prompts(source.getrandbits(63))
        shared = shared_prefix(workload, seed)
        length = workload.prompt_tokens - len(shared)
        end_s = self.warm_up_s + self.counted_s
        return [
            Request(due_s, (*shared, *prompts.next(length)), self.warm_up_s <= due_s < end_s)
            for due_s in arrivals(rate, end_s + self.tail_s, source)
        ]


def shared_prefix(workload: Workload, seed: int) -> tuple[int, ...]:
    """Return what all prompts of a workload begin with: the same in a whole run."""
    source = random.Random(f"{seed} {workload.name}")
    return tuple(Prompts(source.getrandbits(63)).next(workload.shared_tokens))


def longest_s(workload: Workload, slos: tuple[Slo, ...]) -> float:
    """Return after how long a request that has not ended has missed every SLO."""
    tokens = workload.answer_tokens - 1
    return max(slo.ttft_ms + tokens * slo.tpot_ms for slo in slos) / 1e3
