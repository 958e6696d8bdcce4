"""A producer's table, with what happens to it spelt out as its engine would do it."""

from __future__ import annotations

from collections.abc import Sequence

from tests.fakes.clock import FakeClock
from tests.fakes.engines import full_group, make_kv_cache, make_layout, memory_of
from vllm_pd_plugin.ids import HandoffId, Incarnation, new_handoff_id
from vllm_pd_plugin.memory.layout import BlockTables, RankLayout
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.answering import Answering
from vllm_pd_plugin.protocol.export import Subscriber
from vllm_pd_plugin.protocol.export_states import ExportState
from vllm_pd_plugin.protocol.exports import ExportTable
from vllm_pd_plugin.protocol.outbox import Answer, ReturnAddress
from vllm_pd_plugin.protocol.steps import Advance

LEASE_S = 30.0
TOKENS = 100
LAYOUT = make_layout(groups=[full_group("layer.0", "layer.2"), full_group("layer.1")])
LAYERS = 3
BLOCKS = ([1, 2, 3], [4])
NO_BLOCKS = (wire.TableSlice(0, ()), wire.TableSlice(0, ()))
SEAL_TABLES = (wire.TableSlice(0, (1, 2, 3)), wire.TableSlice(0, (4,)))
SCHEDULER = ReturnAddress(b"scheduler", Incarnation("consumer"))
RANK_0 = ReturnAddress(b"rank-0", Incarnation("consumer-0"))
RANK_1 = ReturnAddress(b"rank-1", Incarnation("consumer-1"))


class Producer:
    """A producer's table, what consumers are answered, and what was released and abandoned."""

    def __init__(self, num_ranks: int = 1, layout: RankLayout = LAYOUT) -> None:
        self.clock = FakeClock()
        self.released: list[tuple[str, ExportState]] = []
        self.abandoned: list[tuple[str, ExportState]] = []
        self.unpacked: list[tuple[HandoffId, int]] = []
        self.table = ExportTable(
            layout,
            make_kv_cache(layout, memory_of(layout), num_ranks),
            LEASE_S,
            lambda *r: self.released.append(r),
            lambda *a: self.abandoned.append(a),
            lambda *u: self.unpacked.append(u),
            self.clock,
        )
        self.num_ranks = num_ranks
        self.answering = Answering(self.table)
        self.steps = 0

    def queued(self, request_id: str = "r", handoff: HandoffId | None = None) -> HandoffId:
        handoff = handoff or new_handoff_id()
        self.table.enqueue(handoff, request_id, TOKENS, b"digest")
        return handoff

    def open(self, request_id: str = "r") -> HandoffId:
        handoff = self.queued(request_id)
        assert self.table.open(handoff) == []
        return handoff

    def wanted(self, request_id: str = "r") -> HandoffId:
        """In the middle of being produced, for a consumer that has asked."""
        handoff = self.open(request_id)
        assert isinstance(self.answering.want(handoff, SCHEDULER), wire.Offer)
        return handoff

    def sealed(self, request_id: str = "r") -> HandoffId:
        handoff = self.open(request_id)
        self.seal(handoff, request_id)
        return handoff

    def seal(
        self,
        handoff: HandoffId,
        request_id: str = "r",
        num_tokens: int = TOKENS,
        blocks: BlockTables = BLOCKS,
        sampled: int | None = None,
    ) -> list[Answer]:
        """Its request has ended with KV to hand off."""
        return self.table.seal(handoff, request_id, num_tokens, blocks, sampled)

    def advance(
        self, handoff: HandoffId, num_tokens: int, blocks: BlockTables = BLOCKS, epoch: int = 0
    ) -> int:
        """Begin a step; return its number."""
        self.steps += 1
        every_layer = tuple(range(1, LAYERS + 1))
        advance = Advance(handoff, epoch, num_tokens, blocks, (every_layer,))
        self.table.advance(self.steps, [advance])
        return self.steps

    def compute(
        self,
        handoff: HandoffId,
        num_tokens: int,
        blocks: BlockTables = BLOCKS,
        epoch: int = 0,
        ranks: Sequence[int] = (0,),
    ) -> list[Answer]:
        """A whole step of some ranks; return what is said at its end."""
        step = self.advance(handoff, num_tokens, blocks, epoch)
        return [a for rank in ranks for a in self.table.announce(step, rank, LAYERS)]

    def subscribe(
        self, handoff: HandoffId, rank: int = 0, who: ReturnAddress = RANK_0
    ) -> wire.Message:
        """A rank of a consumer of as many ranks as are here, which reads from its counterpart."""
        return self.answering.subscribe(wire.Subscribe(handoff, rank, self.num_ranks, (rank,)), who)

    def pack(self, pack: wire.Pack | wire.Gather) -> wire.Message:
        """Rank 0 of the consumer wants a piece."""
        return self.answering.pack(pack, RANK_0.incarnation)

    def commit(
        self,
        handoff: HandoffId,
        rank: int = 0,
        epoch: int = 0,
        is_last: bool = True,
    ) -> wire.Message:
        """One rank of a consumer has read; it has subscribed before that."""
        export = self.table._held.get(handoff)
        if export is not None and rank not in export.subscribers:
            export.num_subscribers = self.num_ranks
            export.subscribers[rank] = Subscriber(RANK_0, (rank,))
        return self.answering.commit(wire.Commit(handoff, epoch, rank, is_last))

    def heartbeat(self, handoffs: Sequence[HandoffId]) -> wire.Message:
        """The answer to a heartbeat of the scheduler that asked; nothing else is said."""
        ((who, alive),) = self.answering.heartbeat(handoffs, SCHEDULER)
        assert who == SCHEDULER
        return alive

    def expire(self) -> None:
        self.clock.advance(LEASE_S)
        self.table.tick()


def granted(handoff: HandoffId, epoch: int = 0, is_last: bool = True) -> wire.Committed:
    return wire.Committed(handoff, epoch, is_last)


def progress(
    handoff: HandoffId,
    epoch: int,
    base_tokens: int,
    num_tokens: int,
    num_layers: int,
    tables: tuple[wire.TableSlice, ...],
) -> wire.Progress:
    """What is said of an engine of one pipeline stage."""
    written = (wire.Written(base_tokens, num_tokens, num_layers),)
    return wire.Progress(handoff, epoch, written, tables)
