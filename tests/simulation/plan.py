"""What happens in a seed: engines, requests, and what goes wrong; pure."""

from __future__ import annotations

import dataclasses
import enum
import random
from typing import Any

from vllm_pd_plugin.simulation.shape import Pace, Shape

REQUESTS_UNTIL_S, FAULTS_UNTIL_S, CALM_FROM_S = 2.5, 4.0, 5.0
LEASE_S, PEER_S, FETCH_S, QUEUE_S = 2.0, 3.0, 3.0, 4.0
"""The longest deadlines that engines have."""
LONGEST_S = 3 * (QUEUE_S + 3 * FETCH_S + PEER_S + LEASE_S)
"""How long it may take, once nothing goes wrong any more, until everything has ended."""


class Dispatch(enum.StrEnum):
    """How a request reaches its engines."""

    SERIAL = "serial"
    CONCURRENT = "concurrent"
    ALONE = "alone"


class Oddity(enum.StrEnum):
    """What is wrong with a request itself."""

    NONE = "nothing"
    BAD_PARAMS = "bad params"
    WRONG_ROLE = "wrong role"
    OTHER_PROMPT = "another prompt"
    PROMPT_LOGPROBS = "prompt logprobs"
    SIBLING = "a sibling fetches the same"
    NO_PRODUCER = "the producer is never asked"
    USED_ID = "its id was used before"
    NOWHERE = "nobody listens there"
    INVENTED = "an incarnation that never was"


class Fault(enum.StrEnum):
    """What goes wrong in the world."""

    ABORT_PRODUCER = "client leaves the producer"
    ABORT_CONSUMER = "client leaves the consumer"
    KILL = "an engine dies and is started again"
    UPGRADE = "an engine dies and comes back with other weights"
    STOP = "an engine stands still"
    JUMP = "an engine's clock jumps"
    CUT = "connections break"
    OUTAGE = "all messages to an engine are lost"
    SLOW_READS = "reads take their time"
    HANGING_READS = "reads do not end"
    FAILED_READS = "reads fail"
    LATE_READS = "reads fail, and write late"
    CORRUPTION = "bytes change on the way"
    CHANGE = "an engine's weights are changed in place"
    CHANGE_ALL = "all engines' weights are changed in place"
    NOT_REGISTERED = "memory is not registered for a peer"
    RAISE = "a foreign library raises"
    STRANGER = "somebody else speaks the protocol"


@dataclasses.dataclass(frozen=True, slots=True)
class RequestPlan:
    """producer, consumer: which engines. knows: whether the consumer is told the incarnation.
    gap_s: between the two halves, in a concurrent dispatch the consumer's first where negative.
    others: further producers, which get the request when the one before has failed.
    """

    number: int
    at: float
    prompt: tuple[int, ...]
    max_tokens: int
    dispatch: Dispatch
    producer: int
    consumer: int
    oddity: Oddity = Oddity.NONE
    seeds: bool = False
    knows: bool = True
    gap_s: float = 0.0
    others: tuple[int, ...] = ()
    producer_tokens: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class FaultPlan:
    """seconds: how long it lasts. target: an engine, or a request."""

    at: float
    kind: Fault
    target: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Weather:
    """Chances of each message: to be lost, to come twice, to be late. read_s: what a read takes at
    the most."""

    lost: float = 0.0
    twice: float = 0.0
    late: float = 0.0
    read_s: float = 0.004


CALM = Weather()


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    shapes: tuple[Shape, ...]
    requests: tuple[RequestPlan, ...]
    faults: tuple[FaultPlan, ...]
    weather: Weather


_STORMS = 0.4
"""How many seeds have one."""

_WEIGHTS = {
    Fault.ABORT_PRODUCER: 3, Fault.ABORT_CONSUMER: 4, Fault.KILL: 2, Fault.UPGRADE: 2,
    Fault.STOP: 2, Fault.JUMP: 2, Fault.CUT: 2, Fault.OUTAGE: 4, Fault.SLOW_READS: 3,
    Fault.HANGING_READS: 2, Fault.FAILED_READS: 2, Fault.LATE_READS: 2, Fault.CORRUPTION: 2,
    Fault.CHANGE: 2, Fault.CHANGE_ALL: 3, Fault.NOT_REGISTERED: 1, Fault.RAISE: 1,
    Fault.STRANGER: 2,
}  # fmt: skip


def make_plan(seed: int) -> Plan:
    chance = random.Random(seed)
    shapes = _shapes(chance)
    lost, twice, late = chance.choice(
        [(0.0, 0.0, 0.0), (0.0, 0.0, 0.1), (0.02, 0.02, 0.02), (0.1, 0.05, 0.1), (0.15, 0.0, 0.0)]
    )
    weather = Weather(lost, twice, late, chance.choice([0.004, 0.004, 0.05, 0.4, 1.5]))
    requests = _requests(chance, shapes)
    kinds, weights = list(_WEIGHTS), list(_WEIGHTS.values())
    faults = []
    for kind in chance.choices(kinds, weights, k=chance.randint(2, 6)):
        of_requests = kind in (Fault.ABORT_PRODUCER, Fault.ABORT_CONSUMER)
        target = chance.randrange(len(requests) if of_requests else len(shapes))
        at = chance.uniform(0.0, FAULTS_UNTIL_S)
        if of_requests:  # while it is under way
            at = requests[target].at + chance.expovariate(8.0)
        seconds = chance.choice([0.05, 0.3, 0.3, 1.0, LEASE_S + 0.5])
        faults.append(FaultPlan(at, kind, target, seconds))
    if chance.random() < _STORMS:
        faults += _storm(chance, requests)
    shapes = tuple(
        dataclasses.replace(shape, hash_s=chance.choice([None, 0.05, 0.3, 1.0])) for shape in shapes
    )
    return Plan(seed, shapes, tuple(requests), tuple(faults), weather)


def _storm(chance: random.Random, requests: list[RequestPlan]) -> list[FaultPlan]:
    """Return what goes wrong together for one handoff: its reads take their time while its producer
    gets others to compute, which want its blocks, and something ends it there unheard."""
    victims = [r for r in requests if r.dispatch is not Dispatch.ALONE and not r.others]
    if not victims:
        return []
    victim = chance.choice(victims)
    at, producer = victim.at + chance.uniform(0.01, 0.15), victim.producer
    reads = chance.choice([Fault.SLOW_READS, Fault.SLOW_READS, Fault.HANGING_READS])
    faults = [FaultPlan(victim.at, reads, victim.consumer, 0.5)]
    match chance.choice(["silence", "abort", "pressure", "change"]):
        case "silence":
            faults.append(FaultPlan(at, Fault.OUTAGE, producer, LEASE_S + 0.5))
            at += chance.choice([LEASE_S / 2, LEASE_S])
        case "abort":
            faults.append(FaultPlan(at - 0.002, Fault.OUTAGE, producer, 0.4))
            faults.append(FaultPlan(at, Fault.ABORT_PRODUCER, victim.number, 0.0))
        case "pressure":
            faults.append(FaultPlan(at, Fault.OUTAGE, producer, chance.choice([0.1, 0.4])))
        case _:
            faults.append(FaultPlan(at, Fault.CHANGE_ALL, producer, 0.0))
    for index in range(4):
        prompt = tuple(chance.randrange(10, 900) for _ in range(chance.choice([12, 40])))
        begins = at + index * chance.choice([0.0, 0.03])
        number = len(requests)
        alone = RequestPlan(number, begins, prompt, 14, Dispatch.ALONE, producer, producer)
        requests.append(alone)
    return faults


def _shapes(chance: random.Random) -> tuple[Shape, ...]:
    ranks = chance.choice([1, 1, 1, 2])
    window = chance.choice([None, None, None, 6])
    options: dict[str, Any] = {
        "lease_s": chance.choice([LEASE_S / 2, LEASE_S]),
        "peer_timeout_s": chance.choice([0.8, PEER_S]),
        "fetch_timeout_s": chance.choice([1.2, FETCH_S]),
        "queue_timeout_s": QUEUE_S,
    }
    options["stretch_bytes"] = chance.choice([1, 64, 2**20])
    options["integrity"] = chance.choice(["none", "none", "none", "digest"])
    packing = chance.choice(["never", "never", "never", "always", "auto"])
    options["packing"] = packing
    options["staging_bytes"] = 0 if packing == "never" else 16 * 1024
    pace = Pace(step_s=chance.choice([0.004, 0.015, 0.05]))
    common: dict[str, Any] = {"ranks": ranks, "window": window, "options": options, "pace": pace}
    fewest = 16 if window is None else 26

    def shape(role: str) -> Shape:
        return Shape(
            role,
            fewest + chance.choice([0, 4, 24]),
            recomputes=chance.random() < 0.5,
            step_tokens=chance.choice([8, 16, 32]),
            **common,
        )

    roles = chance.choice(
        [("prefill", "decode"), ("prefill", "decode"), ("both", "both"),
         ("prefill", "prefill", "decode"), ("both", "prefill", "decode")]
    )  # fmt: skip
    return tuple(shape(role) for role in roles)


def _requests(chance: random.Random, shapes: tuple[Shape, ...]) -> list[RequestPlan]:
    producers = [i for i, shape in enumerate(shapes) if shape.role != "decode"]
    consumers = [i for i, shape in enumerate(shapes) if shape.role != "prefill"]
    texts = [[chance.randrange(10, 900) for _ in range(44)] for _ in range(3)]
    requests: list[RequestPlan] = []
    at = 0.0
    for number in range(chance.randint(6, 14)):
        at = chance.choice([at, at, at + 0.02, chance.uniform(0, REQUESTS_UNTIL_S)])
        text = list(chance.choice(texts))
        length = chance.choice([1, 3, 5, 9, 16, 17, 24, 31, 40])
        if chance.random() < 0.6:  # of its own from somewhere on
            start = chance.randrange(length)
            text[start:] = [chance.randrange(10, 900) for _ in text[start:]]
        consumer = chance.choice(consumers)
        producer = chance.choice([p for p in producers if p != consumer] or producers)
        others = tuple(p for p in producers if p not in (producer, consumer))
        dispatch = chance.choice([*Dispatch, Dispatch.CONCURRENT, Dispatch.ALONE])
        if dispatch is Dispatch.ALONE:
            consumer = chance.randrange(len(shapes))
        oddity = Oddity.NONE
        if dispatch is not Dispatch.ALONE and chance.random() < 0.2:
            oddity = chance.choice([odd for odd in Oddity if odd is not Oddity.NONE])
        elif number and dispatch is Dispatch.CONCURRENT and chance.random() < 0.06:
            oddity = Oddity.USED_ID
        requests.append(
            RequestPlan(
                number,
                at,
                tuple(text[:length]),
                chance.choice([1, 2, 4, 8, 14]),
                dispatch,
                producer,
                consumer,
                oddity,
                seeds=chance.random() < 0.25,
                knows=chance.random() < 0.5,
                gap_s=chance.choice([-0.2, -0.01, 0.0, 0.0, 0.01, 0.2]),
                others=others if chance.random() < 0.5 else (),
                producer_tokens=chance.choice([1, 1, 1, 14]),
            )
        )
    return requests
