"""One export: what its holder has written of it, and what its consumer has been told; pure.

How it lives and ends is in ``export_states``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import HandoffId, OwnerId
from vllm_pd_plugin.memory.layout import BlockTables, Group
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.export_states import ExportState
from vllm_pd_plugin.protocol.outbox import Answer, ReturnAddress


@dataclasses.dataclass(slots=True, eq=False)
class Subscriber:
    """A rank of the consumer.

    source_ranks: of this engine: those that have what it wants.
    told: how much of each block table it has been told, and what was last said to be written.
    """

    who: ReturnAddress
    source_ranks: tuple[int, ...]
    told: list[int] = dataclasses.field(default_factory=list)
    told_written: tuple[wire.Written, ...] = ()


@dataclasses.dataclass(slots=True, eq=False)
class Export:
    """One consumer's claim on blocks that somebody holds. Whoever serves several consumers from the
    same blocks makes an export for each, and frees the blocks with the last release.

    owner: the holder's own name for it.
    num_tokens: how many it will have at the most, once it is sealed exactly.
    num_subscribers: how many ranks the consumer has, once one of them has said so; when all have
        read everything it is committed.
    """

    handoff_id: HandoffId
    owner: OwnerId
    num_tokens: int
    prompt: bytes
    blocks: BlockTables
    tensor_parallel_size: int
    state: ExportState
    consumer: ReturnAddress | None = None
    """The consumer's scheduler, once it has asked: from then on the lease runs."""
    num_subscribers: int = 0
    epoch: int = 0
    written: dict[int, wire.Written] = dataclasses.field(default_factory=dict)
    """How far each rank here is."""
    subscribers: dict[int, Subscriber] = dataclasses.field(default_factory=dict)
    committed: set[int] = dataclasses.field(default_factory=set)
    """Of the subscribers."""
    packing_ranks: set[int] = dataclasses.field(default_factory=set)
    """Which ranks here were asked to pack some of it: they are told when it is over."""
    sampled: int | None = None
    """The token that follows the prompt, once it is sealed."""

    @property
    def is_sealed(self) -> bool:
        return self.state is ExportState.SEALED

    @property
    def is_leased(self) -> bool:
        """Whether silence ends it. Until it is sealed that takes a consumer that once spoke."""
        return self.is_sealed or (self.state.is_open and self.consumer is not None)

    # --- what its holder has written ---------------------------------------------------------

    def is_final(self, subscriber: Subscriber) -> bool:
        """Whether all that a rank of the consumer wants is complete, sealed or not."""
        return self.is_sealed or all(
            self.written.get(rank, _NOTHING).base_tokens >= self.num_tokens
            for rank in subscriber.source_ranks
        )

    def wrote(self, rank: int, num_tokens: int, num_layers: int, is_all: bool) -> list[Answer]:
        """A rank here has written tokens up to some number in its first layers; return what is to
        be told to whom."""
        base_tokens = num_tokens if is_all else self.written.get(rank, _NOTHING).base_tokens
        self.written[rank] = wire.Written(base_tokens, num_tokens, num_layers)
        return [
            (subscriber.who, self.tell(subscriber))
            for subscriber in self.subscribers.values()
            # Of several ranks the last counts: what the others say is no news.
            if rank in subscriber.source_ranks
            and self.written_for(subscriber) != subscriber.told_written
        ]

    def written_for(self, subscriber: Subscriber) -> tuple[wire.Written, ...]:
        """Return how far what a rank of the consumer wants is written, for each pipeline stage."""
        stages: dict[int, wire.Written] = {}
        for rank in subscriber.source_ranks:
            stage, one = rank // self.tensor_parallel_size, self.written.get(rank, _NOTHING)
            stages[stage] = _less(stages[stage], one) if stage in stages else one
        return tuple(stages.get(stage, _NOTHING) for stage in range(max(stages) + 1))

    def keeps(self, groups: Sequence[Group], blocks: BlockTables) -> bool:
        """Whether these tables still have all that a consumer was told of."""
        for group, before, now in zip(groups, self.blocks, blocks, strict=True):
            needed = group.needed_blocks(0, self.num_tokens)
            told = slice(needed.start, min(needed.stop, len(before)))
            if list(before[told]) != list(now[told]):
                return False
        return True

    def start_afresh(self, epoch: int) -> None:
        """Its holder has lost all blocks: nothing that was said of them holds any more."""
        self.epoch, self.blocks = epoch, tuple(() for _ in self.blocks)
        self.written.clear()
        for subscriber in self.subscribers.values():
            subscriber.told = []

    # --- what its consumer is told -----------------------------------------------------------

    def offer(self, revision: int) -> wire.Offer:
        return wire.Offer(self.handoff_id, self.num_tokens, self.prompt, revision)

    def tell_all(self) -> list[Answer]:
        """Say how things stand to every subscriber."""
        return [(s.who, self.tell(s)) for s in self.subscribers.values()]

    def tell_anew(self, rank: int) -> wire.Progress | wire.Seal | wire.Refuse:
        """Say how things stand to a rank that knows of an earlier epoch only."""
        subscriber = self.subscribers.get(rank)
        if subscriber is None:
            return wire.Refuse(self.handoff_id, Reason.MISSING_BLOCKS)
        subscriber.told = []
        return self.tell(subscriber)

    def tell(self, subscriber: Subscriber) -> wire.Progress | wire.Seal:
        """Say how things stand, with what the subscriber does not know of the block tables."""
        told = subscriber.told or [0] * len(self.blocks)
        tables = tuple(
            wire.TableSlice(start, tuple(table[start:]))
            for start, table in zip(told, self.blocks, strict=True)
        )
        subscriber.told = [len(table) for table in self.blocks]
        if self.is_sealed:
            return wire.Seal(self.handoff_id, self.epoch, self.num_tokens, tables, self.sampled)
        written = subscriber.told_written = self.written_for(subscriber)
        return wire.Progress(self.handoff_id, self.epoch, written, tables)

    def refuse_all(self, reason: Reason) -> list[Answer]:
        """Say to all who wait for it that nothing comes of it."""
        waiting = [subscriber.who for subscriber in self.subscribers.values()]
        if self.consumer:
            waiting.append(self.consumer)
        return [(who, wire.Refuse(self.handoff_id, reason)) for who in waiting]

    def commit(self, subscriber: int) -> bool:
        """One of the consumer's ranks has read everything; return whether all have."""
        self.committed.add(subscriber)
        return len(self.committed) >= self.num_subscribers


_NOTHING = wire.Written()


def _less(one: wire.Written, other: wire.Written) -> wire.Written:
    """Return what two ranks of a pipeline stage have both written."""
    slower = min(one, other, key=lambda written: (written.num_tokens, written.num_layers))
    base_tokens = min(one.base_tokens, other.base_tokens)
    return wire.Written(base_tokens, slower.num_tokens, slower.num_layers)
