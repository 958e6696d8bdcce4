"""Per request: the state machines of a handoff, pure and with an injected clock.

    producer   PRODUCING -> SEALED -> COMMITTED | CANCELLED | EXPIRED
    consumer   WANTED -> OFFERED -> ALLOCATED -> done | failed(reason)     in the scheduler
               CONNECTING -> SUBSCRIBED -> READING -> COMMITTING -> done | failed(reason)
                                                                          in each worker rank

The producer's blocks are freed in its three final states only. A consumer uses what it has read
only after a commit was granted. Nothing here sends, waits or touches memory: the methods return
what is to be sent, and the owner of the table does it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import OrderedDict
from collections.abc import Callable, Iterable

from vllm_pd_plugin import wire
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import Address, HandoffId, Incarnation, RequestId
from vllm_pd_plugin.lease import Lease
from vllm_pd_plugin.plan import BlockTables

_REMEMBERED_ENDINGS = 4096


ReturnAddress = tuple[bytes, Incarnation]
"""Where an answer goes: the channel's opaque identity of a consumer, and its incarnation."""


class ProducerState(enum.Enum):
    PRODUCING = "producing"
    SEALED = "sealed"
    COMMITTED = "committed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


_REFUSALS = {
    ProducerState.COMMITTED: Reason.UNKNOWN_HANDOFF,
    ProducerState.CANCELLED: Reason.CANCELLED,
    ProducerState.EXPIRED: Reason.LEASE_EXPIRED,
}


@dataclasses.dataclass(slots=True, eq=False)
class Produced:
    """A handoff as its producer sees it."""

    handoff_id: HandoffId
    request_id: RequestId
    num_tokens: int
    digest: bytes
    lease: Lease
    blocks: BlockTables | None = None
    """Set when sealed."""
    is_cancelled: bool = False
    """The consumer does not want it, but its request still runs."""
    committed_ranks: set[int] = dataclasses.field(default_factory=set)
    waiting: list[ReturnAddress] = dataclasses.field(default_factory=list)
    """Who subscribed before the seal."""


class ProducerTable:
    """Every handoff that this engine produces.

    on_released(request_id, state): the blocks of a sealed handoff may be freed now.
    """

    def __init__(
        self,
        lease_s: float,
        on_released: Callable[[RequestId, ProducerState], None],
        clock: Callable[[], float],
    ) -> None:
        self._lease_s = lease_s
        self._on_released = on_released
        self._clock = clock
        self._open: dict[HandoffId, Produced] = {}
        self._endings: OrderedDict[HandoffId, ProducerState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def open(
        self, handoff_id: HandoffId, request_id: RequestId, num_tokens: int, digest: bytes
    ) -> None:
        """Start a handoff: PRODUCING."""
        lease = Lease(self._lease_s, self._clock())
        self._open[handoff_id] = Produced(handoff_id, request_id, num_tokens, digest, lease)

    def seal(
        self, handoff_id: HandoffId, num_tokens: int, blocks: BlockTables
    ) -> tuple[wire.Seal | wire.Refuse, list[ReturnAddress]]:
        """All KV is final: SEALED. Returns the message, and who has been waiting for it."""
        handoff = self._open[handoff_id]
        handoff.num_tokens, handoff.blocks = num_tokens, blocks
        handoff.lease = handoff.lease.renewed(self._clock())
        waiting, handoff.waiting = handoff.waiting, []
        if handoff.is_cancelled:
            self._end(handoff, ProducerState.CANCELLED)
            return wire.Refuse(handoff_id, Reason.CANCELLED), waiting
        return _seal(handoff), waiting

    def drop(self, handoff_id: HandoffId) -> list[ReturnAddress]:
        """The request ended without KV to hand off: CANCELLED. Returns who has been waiting."""
        handoff = self._open.get(handoff_id)
        if handoff is None:
            return []
        self._end(handoff, ProducerState.CANCELLED)
        return handoff.waiting

    def want(self, handoff_id: HandoffId) -> wire.Offer | wire.Refuse:
        """Answer a consumer that asks for a handoff, and start its lease."""
        handoff = self._live(handoff_id)
        if isinstance(handoff, wire.Refuse):
            return handoff
        handoff.lease = handoff.lease.renewed(self._clock())
        return wire.Offer(handoff_id, handoff.num_tokens, handoff.digest)

    def subscribe(
        self, handoff_id: HandoffId, who: ReturnAddress
    ) -> wire.Seal | wire.Refuse | None:
        """Answer one rank that is ready to read; None: it is told at the seal."""
        handoff = self._live(handoff_id)
        if isinstance(handoff, wire.Refuse):
            return handoff
        handoff.lease = handoff.lease.renewed(self._clock())
        if handoff.blocks is None:
            handoff.waiting.append(who)
            return None
        return _seal(handoff)

    def heartbeat(self, handoff_ids: Iterable[HandoffId]) -> wire.Alive:
        """Renew leases; name those that cannot be renewed any more (a committed one needs none)."""
        lost: dict[HandoffId, Reason] = {}
        for handoff_id in handoff_ids:
            handoff = self._live(handoff_id)
            if isinstance(handoff, Produced):
                handoff.lease = handoff.lease.renewed(self._clock())
            elif self._endings.get(handoff_id) is not ProducerState.COMMITTED:
                lost[handoff_id] = handoff.reason
        return wire.Alive(lost)

    def commit(
        self, handoff_id: HandoffId, rank: int, num_ranks: int
    ) -> wire.Committed | wire.Refuse:
        """Say whether the blocks were held until now; COMMITTED once every rank has asked."""
        handoff = self._live(handoff_id)
        if isinstance(handoff, wire.Refuse):
            return handoff
        if handoff.blocks is None:
            return wire.Refuse(handoff_id, Reason.MISSING_BLOCKS)
        handoff.committed_ranks.add(rank)
        if len(handoff.committed_ranks) >= num_ranks:
            self._end(handoff, ProducerState.COMMITTED)
        return wire.Committed(handoff_id)

    def cancel(self, handoff_id: HandoffId) -> None:
        """The consumer does not want it any more: CANCELLED, at the latest when it is sealed."""
        handoff = self._open.get(handoff_id)
        if handoff is None:
            return
        handoff.is_cancelled = True
        if handoff.blocks is not None:
            self._end(handoff, ProducerState.CANCELLED)

    def tick(self) -> float | None:
        """Expire sealed handoffs; return when to call again (absolute), or None."""
        now = self._clock()
        for handoff in list(self._open.values()):
            if handoff.blocks is not None and handoff.lease.has_expired(now):
                self._end(handoff, ProducerState.EXPIRED)
        sealed = [h.lease.deadline for h in self._open.values() if h.blocks is not None]
        return min(sealed, default=None)

    def _live(self, handoff_id: HandoffId) -> Produced | wire.Refuse:
        self.tick()  # an answer must never be based on a lease that has already run out
        if handoff := self._open.get(handoff_id):
            if handoff.is_cancelled:
                return wire.Refuse(handoff_id, Reason.CANCELLED)
            return handoff
        ending = self._endings.get(handoff_id)
        reason = _REFUSALS[ending] if ending else Reason.UNKNOWN_HANDOFF
        return wire.Refuse(handoff_id, reason)

    def _end(self, handoff: Produced, state: ProducerState) -> None:
        del self._open[handoff.handoff_id]
        self._endings[handoff.handoff_id] = state
        while len(self._endings) > _REMEMBERED_ENDINGS:
            self._endings.popitem(last=False)
        if handoff.blocks is not None:
            self._on_released(handoff.request_id, state)


def _seal(handoff: Produced) -> wire.Seal:
    assert handoff.blocks is not None
    blocks = tuple(tuple(table) for table in handoff.blocks)
    return wire.Seal(handoff.handoff_id, handoff.num_tokens, blocks)


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where a consumer is to fetch a handoff from."""

    handoff_id: HandoffId
    address: Address
    incarnation: Incarnation


@dataclasses.dataclass(slots=True, eq=False)
class Wanted:
    """A handoff as its consumer's scheduler sees it: WANTED, then OFFERED, until it is closed."""

    request_id: RequestId
    source: Source
    deadline: float | None
    """When waiting for blocks of its own is given up; None once it has them."""
    asked: bool = False
    offered: bool = False


class ConsumerTable:
    """Every handoff that this engine's scheduler wants and has not finished."""

    def __init__(self) -> None:
        self._wanted: dict[HandoffId, Wanted] = {}
        self._by_request: dict[RequestId, HandoffId] = {}

    def __len__(self) -> int:
        return len(self._wanted)

    def want(self, request_id: RequestId, source: Source, deadline: float) -> Wanted | None:
        """Start: WANTED. Returns None when another request already wants the same handoff."""
        if source.handoff_id in self._wanted:
            return None
        wanted = Wanted(request_id, source, deadline)
        self._wanted[source.handoff_id] = wanted
        self._by_request[request_id] = source.handoff_id
        return wanted

    def offered(self, handoff_id: HandoffId, sender: Incarnation) -> Wanted | None:
        """The producer has offered: OFFERED. None when nobody waits for that."""
        wanted = self._wanted.get(handoff_id)
        if wanted is None or wanted.offered or wanted.source.incarnation != sender:
            return None
        wanted.offered = True
        return wanted

    def allocated(self, request_id: RequestId) -> None:
        """The request has its blocks: ALLOCATED; from here on the workers keep the deadline."""
        if handoff_id := self._by_request.get(request_id):
            self._wanted[handoff_id].deadline = None

    def overdue(self, now: float) -> list[Wanted]:
        """Return what has waited too long for blocks."""
        return [w for w in self._wanted.values() if w.deadline is not None and now >= w.deadline]

    def next_deadline(self) -> float | None:
        deadlines = (w.deadline for w in self._wanted.values())
        return min((d for d in deadlines if d is not None), default=None)

    def close(self, request_id: RequestId) -> Wanted | None:
        """The handoff is over for this request, whatever the outcome."""
        handoff_id = self._by_request.pop(request_id, None)
        return None if handoff_id is None else self._wanted.pop(handoff_id)

    def get(self, handoff_id: HandoffId) -> Wanted | None:
        return self._wanted.get(handoff_id)

    def at(self, address: Address) -> list[Wanted]:
        """Return what is wanted from one peer."""
        return [w for w in self._wanted.values() if w.source.address == address]

    def addresses(self) -> set[Address]:
        return {w.source.address for w in self._wanted.values()}


class FetchState(enum.Enum):
    CONNECTING = "connecting"
    SUBSCRIBED = "subscribed"
    READING = "reading"
    COMMITTING = "committing"
    DRAINING = "draining"
    """Failed, but a read may still write: the blocks must be kept until it has ended."""


@dataclasses.dataclass(frozen=True, slots=True)
class FetchSpec:
    """What a worker rank is told to fetch.

    The consumer has KV for tokens [0, first_token) and wants [0, num_tokens) in ``blocks``.
    """

    request_id: RequestId
    source: Source
    first_token: int
    num_tokens: int
    blocks: BlockTables


@dataclasses.dataclass(frozen=True, slots=True)
class FetchResult:
    """How a fetch ended on one rank. ``reason`` is None when the KV is committed and usable.

    seconds: from the worker's first knowledge of the fetch to its end.
    """

    request_id: RequestId
    reason: Reason | None
    num_bytes: int
    num_descriptors: int
    seconds: float
