"""Which requests are turned away at once, so that those that are taken are answered in time; pure.

A tenant is a class of requests with one of the API keys, where there are any. As long as there is
room everybody is taken. When there is none, a tenant still has an equal part of it: a flood is
turned away, and whoever asks for little is not.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections import Counter
from collections.abc import Iterable

from vllm_pd_plugin.frontend.routing.choice import Engine

Tenant = tuple[str, str]
"""A class of requests, and what an API key is called here; empty where keys mean nothing."""

_LONGEST_RETRY_S = 60
_FEWEST_WAITING = 16
"""So many may wait even for one small engine."""


class Refusal(enum.StrEnum):
    """Why a request is turned away; the ``reason`` label of ``pd_frontend_refused_total``."""

    OVERLOADED = "overloaded"
    FRONTEND_OVERLOADED = "frontend_overloaded"
    """This process is late with what it has to do, whatever the engines have."""
    OVER_SHARE = "over_share"
    """Its tenant has more than its part, and others are waiting, too."""
    STOPPING = "stopping"


@dataclasses.dataclass(frozen=True, slots=True)
class TurnedAway:
    """why; and after how many seconds there is likely to be room."""

    why: Refusal
    retry_after_s: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """How much may wait for its first token, in a frontend and on the engines.

    num_requests: of this frontend; None: the operator has a limit of its own.
    wait_s: until a prompt that comes now would be computed, as far as that is known.
    lag_s: how late the frontend itself may be. Its clients notice a second, and its connections to
        engines bear five; less may be the work of one very large request.
    """

    num_requests: int | None
    wait_s: float
    lag_s: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Queue:
    """What waits. tenants: who has something in it; own: how much of it is the tenant's. lag_s: how
    late the frontend is; see ``Lag``."""

    num_requests: int
    wait_s: float | None
    num_tenants: int
    own: int
    lag_s: float = 0.0


def admit(queue: Queue, bounds: Bounds, num_new: int = 1) -> Refusal | None:
    """Say why a tenant's request is turned away; None if it is not.

    queue: without the request, its tenant counted among the tenants. num_new: how many answers it
        wants.
    """
    if queue.lag_s > bounds.lag_s:
        return Refusal.FRONTEND_OVERLOADED
    is_too_long = queue.wait_s is not None and queue.wait_s > bounds.wait_s
    most = bounds.num_requests
    if not is_too_long and (most is None or queue.num_requests + num_new <= most):
        return None
    if queue.num_tenants <= 1:
        return Refusal.OVERLOADED
    share = (queue.num_requests if most is None else most) // queue.num_tenants
    return None if queue.own + num_new <= share else Refusal.OVER_SHARE


def retry_after_s(queue: Queue, bounds: Bounds) -> int:
    """Return when one who is turned away may come again, in whole seconds: when the frontend has
    caught up; when what waits will be computed within the bound; or else, when as much has been
    computed as one request has."""
    if queue.lag_s > bounds.lag_s:
        return min(_LONGEST_RETRY_S, math.ceil(queue.lag_s))
    if queue.wait_s is None:
        return 1
    too_long_s = queue.wait_s - bounds.wait_s
    seconds = too_long_s if too_long_s > 0 else queue.wait_s / max(1, queue.num_requests)
    return max(1, min(_LONGEST_RETRY_S, math.ceil(seconds)))


@dataclasses.dataclass(frozen=True, slots=True)
class Capacity:
    """What engines can do together, and what they have to do.

    max_running: requests that they decode at once. prefill_tokens: of prompts that they have yet to
    compute. prefill_rate: tokens a second; None as long as no engine's is known.
    """

    max_running: int = 0
    prefill_tokens: int = 0
    prefill_rate: float | None = None

    @classmethod
    def of(cls, engines: Iterable[Engine]) -> Capacity:
        """Add up; an engine whose rate is not known counts as the mean of the others."""
        there = list(engines)
        prefills = [engine for engine in there if engine.role.prefills]
        rates = [engine.prefill_rate for engine in prefills if engine.prefill_rate]
        return cls(
            sum(engine.max_running for engine in there if engine.role.decodes),
            sum(engine.prefill_tokens for engine in prefills),
            sum(rates) / len(rates) * len(prefills) if rates else None,
        )

    @property
    def most_waiting(self) -> int:
        """How many requests may wait by default: as many as are decoded at once."""
        return max(_FEWEST_WAITING, self.max_running)

    def wait_s(self, waiting_tokens: int) -> float | None:
        """Return how long it takes until what waits is computed; None as long as no rate is known.

        waiting_tokens: prompt tokens that no engine has got yet.
        """
        if self.prefill_rate is None:
            return None
        return (waiting_tokens + self.prefill_tokens) / self.prefill_rate


NO_ENGINES = Capacity(max_running=1000)
"""Of a pool of which no engine takes requests now: so many may wait for one to come."""


@dataclasses.dataclass(slots=True, eq=False)
class Gate:
    """Who has how much in the queue of a frontend; owned by its event loop.

    wait_s: how long a prompt may have to wait until it is computed.
    has_limit: the operator says how many requests there may be, and that is looked after elsewhere.
    tells_keys_apart: clients have API keys, which were checked.
    """

    wait_s: float
    has_limit: bool = False
    tells_keys_apart: bool = False
    queued: Counter[Tenant] = dataclasses.field(default_factory=Counter)
    num_reserved: int = 0
    """Answers among them that have room and have not begun; see ``Room``."""

    def tenant(self, slo_class: str, key: str) -> Tenant:
        """Return whose request it is."""
        return slo_class, key if self.tells_keys_apart else ""

    def refuse(
        self,
        tenant: Tenant,
        num_new: int,
        capacity: Capacity,
        waiting_tokens: int,
        lag_s: float = 0.0,
    ) -> TurnedAway | None:
        """Turn a request away, or not; see ``admit``."""
        queue = Queue(
            self.queued.total(),
            capacity.wait_s(waiting_tokens),
            len(self.queued.keys() | {tenant}),
            self.queued[tenant],
            lag_s,
        )
        bounds = Bounds(None if self.has_limit else capacity.most_waiting, self.wait_s)
        refusal = admit(queue, bounds, num_new)
        return None if refusal is None else TurnedAway(refusal, retry_after_s(queue, bounds))

    def joined(self, tenant: Tenant) -> None:
        """A request has come."""
        self.queued[tenant] += 1

    def left(self, tenant: Tenant) -> None:
        """It has its first token, or has ended."""
        self.queued[tenant] -= 1
        if not self.queued[tenant]:
            del self.queued[tenant]

    def reserve(self, tenant: Tenant, num: int) -> Room:
        """Let a request in that will join with so many answers; see ``Room``."""
        self.num_reserved += num
        for _ in range(num):
            self.joined(tenant)
        return Room(self, tenant, num)


@dataclasses.dataclass(slots=True, eq=False)
class Room:
    """What a request was let in for and has not begun, which counts as queued. Once its status is
    sent to a client it cannot be turned away any more, whoever else has come meanwhile."""

    gate: Gate
    tenant: Tenant
    num: int

    def take(self, num: int) -> bool:
        """Use it for so many answers, which join now; False if it is not for as many."""
        if num > self.num:
            return False
        self.num -= num
        self.gate.num_reserved -= num
        for _ in range(num):
            self.gate.left(self.tenant)
        return True

    def give_back(self) -> None:
        """The request is over; idempotent."""
        self.take(self.num)
