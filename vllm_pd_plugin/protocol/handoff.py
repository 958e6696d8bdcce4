"""Per request: one handoff as its producer sees it; pure.

    QUEUED -> PRODUCING -> SEALED -> COMMITTED | CANCELLED | EXPIRED

A sealed handoff's blocks are freed in the three final states only; before the seal they belong to
the running request, and its preemption starts a new *epoch*.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import HandoffId, Incarnation, RequestId
from vllm_pd_plugin.memory.layout import BlockTables, Group
from vllm_pd_plugin.protocol import framing, wire

_REMEMBERED_STEPS = 64
_REMEMBERED_ENDINGS = 4096


class ReturnAddress(NamedTuple):
    """Where an answer goes: the channel's opaque identity of a consumer, its incarnation, and the
    version that it speaks."""

    identity: bytes
    incarnation: Incarnation
    version: int = framing.PROTOCOL_VERSION


class ProducerState(enum.Enum):
    QUEUED = "queued"
    PRODUCING = "producing"
    SEALED = "sealed"
    COMMITTED = "committed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def refusal(self) -> Reason:
        """Why a consumer that comes after this end is refused."""
        return _REFUSALS[self]


_REFUSALS = {
    ProducerState.COMMITTED: Reason.UNKNOWN_HANDOFF,
    ProducerState.CANCELLED: Reason.CANCELLED,
    ProducerState.EXPIRED: Reason.LEASE_EXPIRED,
}


class Endings(OrderedDict[HandoffId, ProducerState]):
    """How the last handoffs ended."""

    def note(self, handoff_id: HandoffId, state: ProducerState) -> None:
        self[handoff_id] = state
        while len(self) > _REMEMBERED_ENDINGS:
            self.popitem(last=False)


Answer = tuple[ReturnAddress, wire.Reply]


@dataclasses.dataclass(frozen=True, slots=True)
class Advance:
    """What one engine step adds to a handoff: KV up to ``num_tokens``, in these block tables.

    after_layers: numbers of layers, in the order of the forward pass, after which its consumer is
        told; besides that of all layers.
    """

    handoff_id: HandoffId
    epoch: int
    num_tokens: int
    blocks: BlockTables
    after_layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """How far one rank's KV is written; see ``wire.Progress``."""

    base_tokens: int = 0
    num_tokens: int = 0
    num_layers: int = 0


@dataclasses.dataclass(slots=True, eq=False)
class Subscriber:
    """A consumer rank, and how much of each block table it has been told."""

    who: ReturnAddress
    told: list[int]


@dataclasses.dataclass(slots=True, eq=False)
class Produced:
    """A handoff as its producer sees it."""

    handoff_id: HandoffId
    request_id: RequestId
    num_tokens: int
    prompt: bytes
    blocks: BlockTables
    state: ProducerState = ProducerState.QUEUED
    wanted_by: ReturnAddress | None = None
    """The consumer's scheduler, once it has asked: from then on the lease runs."""
    ending: ProducerState | None = None
    """Set when the consumer is done with it while its request still runs."""
    epoch: int = 0
    written: dict[int, Written] = dataclasses.field(default_factory=dict)
    subscribers: dict[int, Subscriber] = dataclasses.field(default_factory=dict)
    committed_ranks: set[int] = dataclasses.field(default_factory=set)
    packing_ranks: set[int] = dataclasses.field(default_factory=set)
    """Which were asked to pack some of it: they are told when it is over."""
    sampled: int | None = None
    """The token that follows the prompt, once it is sealed."""

    @property
    def is_sealed(self) -> bool:
        return self.state is ProducerState.SEALED

    def is_final(self, rank: int) -> bool:
        """Whether one rank's KV is complete, sealed or not."""
        return self.is_sealed or self.written.get(rank, Written()).base_tokens >= self.num_tokens

    def keeps(self, groups: Sequence[Group], blocks: BlockTables) -> bool:
        """Whether these tables still have all that a consumer was told of."""
        for group, before, now in zip(groups, self.blocks, blocks, strict=True):
            needed = group.needed_blocks(0, self.num_tokens)
            told = slice(needed.start, min(needed.stop, len(before)))
            if list(before[told]) != list(now[told]):
                return False
        return True

    def offer(self, revision: int) -> wire.Offer:
        return wire.Offer(self.handoff_id, self.num_tokens, self.prompt, revision)

    def tell_anew(self, rank: int) -> wire.Progress | wire.Seal | wire.Refuse:
        """Say how things stand to a rank that knows of an earlier epoch only."""
        subscriber = self.subscribers.get(rank)
        if subscriber is None:
            return wire.Refuse(self.handoff_id, Reason.MISSING_BLOCKS)
        subscriber.told = []
        return self.tell(rank, subscriber)

    def tell(self, rank: int, subscriber: Subscriber) -> wire.Progress | wire.Seal:
        """Say how things stand, with what the subscriber does not know of the block tables."""
        told = subscriber.told or [0] * len(self.blocks)
        tables = tuple(
            wire.TableSlice(start, tuple(table[start:]))
            for start, table in zip(told, self.blocks, strict=True)
        )
        subscriber.told = [len(table) for table in self.blocks]
        if self.is_sealed:
            return wire.Seal(self.handoff_id, self.epoch, self.num_tokens, tables, self.sampled)
        written = self.written.get(rank, Written())
        return wire.Progress(
            self.handoff_id,
            self.epoch,
            written.base_tokens,
            written.num_tokens,
            written.num_layers,
            tables,
        )

    @property
    def is_leased(self) -> bool:
        """Whether silence ends it. Until it is sealed that takes a consumer that once spoke."""
        if self.ending:
            return False
        return self.is_sealed or self.wanted_by is not None


@dataclasses.dataclass(slots=True, eq=False)
class _Step:
    """What one step of the engine computes, and which ranks have finished it."""

    advances: Sequence[Advance]
    after: Mapping[int, Sequence[Advance]]
    """Those whose consumers are told, by the number of layers that are written."""
    finished_ranks: set[int] = dataclasses.field(default_factory=set)


class Steps:
    """The steps of the engine that not every rank has finished; the last of them."""

    def __init__(self, num_ranks: int, num_layers: int) -> None:
        self._num_ranks = num_ranks
        self._num_layers = num_layers
        self._open: OrderedDict[int, _Step] = OrderedDict()

    def begin(self, step: int, advances: Sequence[Advance]) -> None:
        after: dict[int, list[Advance]] = {}
        for advance in advances:
            for num_layers in advance.after_layers:
                after.setdefault(num_layers, []).append(advance)
        self._open[step] = _Step(advances, after)
        while len(self._open) > _REMEMBERED_STEPS:
            self._open.popitem(last=False)

    def advances(self, step: int, num_layers: int) -> Sequence[Advance]:
        """Return of what it is worth to say that so many layers of a step are written; nothing of
        a step that is over."""
        if step not in self._open:
            return ()
        if num_layers >= self._num_layers:
            return self._open[step].advances
        return self._open[step].after.get(num_layers, ())

    def finish(self, step: int, rank: int) -> None:
        if step in self._open:
            finished = self._open[step].finished_ranks
            finished.add(rank)
            if len(finished) >= self._num_ranks:
                del self._open[step]
