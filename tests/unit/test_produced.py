from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from tests.fakes.clock import FakeClock
from tests.fakes.engines import full_group, make_layout, sliding_group
from vllm_pd_plugin import wire
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import HandoffId, Incarnation, new_handoff_id
from vllm_pd_plugin.layout import EngineLayout
from vllm_pd_plugin.lease import Lease
from vllm_pd_plugin.plan import BlockTables
from vllm_pd_plugin.produced import Advance, Answer, ProducerState, ProducerTable, ReturnAddress

LEASE_S = 30.0
TOKENS = 100
LAYOUT = make_layout(groups=[full_group("layer.0", "layer.2"), full_group("layer.1")])
LAYERS = 3
BLOCKS = ([1, 2, 3], [4])
NO_BLOCKS = (wire.TableSlice(0, ()), wire.TableSlice(0, ()))
SEAL_TABLES = (wire.TableSlice(0, (1, 2, 3)), wire.TableSlice(0, (4,)))
SCHEDULER: ReturnAddress = (b"scheduler", Incarnation("consumer"))
RANK_0: ReturnAddress = (b"rank-0", Incarnation("consumer-0"))
RANK_1: ReturnAddress = (b"rank-1", Incarnation("consumer-1"))


class Producer:
    """A producer's table, and what it has released and abandoned."""

    def __init__(self, num_ranks: int = 1, layout: EngineLayout = LAYOUT) -> None:
        self.clock = FakeClock()
        self.released: list[tuple[str, ProducerState]] = []
        self.abandoned: list[tuple[str, ProducerState]] = []
        self.table = ProducerTable(
            msgspec.structs.replace(layout, tensor_parallel_size=num_ranks),
            LEASE_S,
            lambda *r: self.released.append(r),
            lambda *a: self.abandoned.append(a),
            self.clock,
        )
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
        assert isinstance(self.table.want(handoff, SCHEDULER), wire.Offer)
        return handoff

    def sealed(self, request_id: str = "r") -> HandoffId:
        handoff = self.open(request_id)
        self.table.seal(handoff, TOKENS, BLOCKS)
        return handoff

    def advance(
        self, handoff: HandoffId, num_tokens: int, blocks: BlockTables = BLOCKS, epoch: int = 0
    ) -> int:
        """Begin a step; return its number."""
        self.steps += 1
        self.table.advance(self.steps, [Advance(handoff, epoch, num_tokens, blocks)])
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

    def commit(
        self,
        handoff: HandoffId,
        rank: int = 0,
        epoch: int = 0,
        is_last: bool = True,
    ) -> wire.Message:
        return self.table.commit(wire.Commit(handoff, epoch, rank, is_last))

    def heartbeat(self, handoffs: Sequence[HandoffId]) -> wire.Message:
        """The answer to a heartbeat of the scheduler that asked; nothing else is said."""
        ((who, alive),) = self.table.heartbeat(handoffs, SCHEDULER)
        assert who == SCHEDULER
        return alive

    def expire(self) -> None:
        self.clock.advance(LEASE_S)
        self.table.tick()


def granted(handoff: HandoffId, epoch: int = 0, is_last: bool = True) -> wire.Committed:
    return wire.Committed(handoff, epoch, is_last)


def tables(*slices: tuple[int, Sequence[int]]) -> tuple[wire.TableSlice, ...]:
    return tuple(wire.TableSlice(start, tuple(blocks)) for start, blocks in slices)


@pytest.fixture
def producer() -> Producer:
    return Producer()


# --- the producer's table: offers ------------------------------------------------------------


def test_a_handoff_is_offered_while_it_is_being_produced(producer: Producer) -> None:
    handoff = producer.open()
    assert producer.table.want(handoff, SCHEDULER) == wire.Offer(handoff, TOKENS, b"digest")
    assert len(producer.table) == 1


def test_a_sealed_handoff_is_offered_with_its_final_size(producer: Producer) -> None:
    handoff = producer.open()
    producer.table.seal(handoff, 90, BLOCKS)
    assert producer.table.want(handoff, SCHEDULER) == wire.Offer(handoff, 90, b"digest")


def test_a_handoff_whose_request_is_queued_is_offered_when_it_is_scheduled(
    producer: Producer,
) -> None:
    handoff = producer.queued()
    assert producer.table.want(handoff, SCHEDULER) is None
    offer = wire.Offer(handoff, TOKENS, b"digest")
    assert producer.table.open(handoff) == [(SCHEDULER, offer)]


def test_a_want_that_comes_before_the_request_is_answered_when_it_is_scheduled(
    producer: Producer,
) -> None:
    handoff = new_handoff_id()
    assert producer.table.want(handoff, SCHEDULER) is None
    assert len(producer.table) == 0
    producer.queued(handoff=handoff)
    offer = wire.Offer(handoff, TOKENS, b"digest")
    assert producer.table.open(handoff) == [(SCHEDULER, offer)]


def test_a_want_that_comes_twice_is_answered_once_at_the_start(producer: Producer) -> None:
    handoff = new_handoff_id()
    producer.table.want(handoff, SCHEDULER)
    producer.table.want(handoff, SCHEDULER)
    producer.queued(handoff=handoff)
    producer.table.want(handoff, SCHEDULER)
    assert len(producer.table.open(handoff)) == 1


def test_a_want_is_remembered_for_one_lease_and_then_lost(producer: Producer) -> None:
    handoff = new_handoff_id()
    producer.table.want(handoff, SCHEDULER)
    assert producer.table.tick() == producer.clock() + LEASE_S
    producer.clock.advance(LEASE_S - 0.001)
    assert producer.heartbeat([handoff]) == wire.Alive({})
    producer.clock.advance(0.001)
    assert producer.table.tick() is None
    lost = {handoff: Reason.UNKNOWN_HANDOFF}
    assert producer.heartbeat([handoff]) == wire.Alive(lost)


def test_heartbeats_do_not_make_the_table_wait_longer_for_a_request(producer: Producer) -> None:
    handoff = new_handoff_id()
    producer.table.want(handoff, SCHEDULER)
    for _ in range(6):
        producer.clock.advance(LEASE_S / 6)
        alive = producer.heartbeat([handoff])
    assert alive == wire.Alive({handoff: Reason.UNKNOWN_HANDOFF})


# Its consumer's next heartbeat would find it, be told that all is well, and wait for ever.
def test_a_request_that_comes_after_its_want_was_forgotten_is_offered_or_lost(
    producer: Producer,
) -> None:
    handoff = new_handoff_id()
    producer.table.want(handoff, SCHEDULER)
    producer.expire()
    producer.queued(handoff=handoff)
    alive = producer.heartbeat([handoff])
    offers = producer.table.open(handoff)
    assert offers or alive.lost


def test_wants_for_requests_that_never_come_are_bounded(producer: Producer) -> None:
    forgotten = (SCHEDULER, Lease(LEASE_S, producer.clock()))
    producer.table._early.update((new_handoff_id(), forgotten) for _ in range(9_999))
    assert producer.table.want(new_handoff_id(), SCHEDULER) is None
    one_more = new_handoff_id()
    refusal = wire.Refuse(one_more, Reason.UNKNOWN_HANDOFF)
    assert producer.table.want(one_more, SCHEDULER) == refusal
    producer.expire()
    assert producer.table.want(one_more, SCHEDULER) is None


def test_a_handoff_that_nobody_has_heard_of_is_refused_to_all_that_do_not_merely_want_it(
    producer: Producer,
) -> None:
    handoff = new_handoff_id()
    refusal = wire.Refuse(handoff, Reason.UNKNOWN_HANDOFF)
    assert producer.table.subscribe(handoff, 0, RANK_0) == refusal
    assert producer.commit(handoff) == refusal
    assert producer.commit(handoff, is_last=False) == refusal
    assert producer.heartbeat([handoff]) == wire.Alive({handoff: Reason.UNKNOWN_HANDOFF})
    assert producer.table.drop(handoff) == []
    assert producer.table.withdraw(handoff, 1) == []
    assert producer.table.open(handoff) == []
    assert producer.released == []
    assert producer.abandoned == []


# Whoever sends the requests chooses the ids.
def test_an_id_that_is_used_again_releases_the_blocks_of_both_requests(
    producer: Producer,
) -> None:
    handoff = producer.sealed("first")
    producer.queued("second", handoff)
    producer.table.open(handoff)
    producer.table.seal(handoff, TOKENS, BLOCKS)
    producer.expire()
    assert sorted(request_id for request_id, _ in producer.released) == ["first", "second"]


# --- progress --------------------------------------------------------------------------------


def test_who_subscribes_is_told_at_once_how_things_stand(producer: Producer) -> None:
    handoff = producer.open()
    nothing = wire.Progress(handoff, 0, 0, 0, 0, NO_BLOCKS)
    assert producer.table.subscribe(handoff, 0, RANK_0) == nothing
    producer.compute(handoff, 40)
    step = producer.advance(handoff, 80)
    producer.table.announce(step, 0, 2)
    assert producer.table.subscribe(handoff, 0, RANK_0) == wire.Progress(
        handoff, 0, 40, 80, 2, SEAL_TABLES
    )


def test_who_subscribes_after_the_seal_is_told_everything(producer: Producer) -> None:
    handoff = producer.sealed()
    seal = wire.Seal(handoff, 0, TOKENS, SEAL_TABLES)
    assert producer.table.subscribe(handoff, 0, RANK_0) == seal
    assert producer.table.subscribe(handoff, 0, RANK_0) == seal


def test_who_subscribes_early_is_told_at_the_seal() -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.open()
    producer.table.subscribe(handoff, 0, RANK_0)
    producer.table.subscribe(handoff, 1, RANK_1)
    seal = wire.Seal(handoff, 0, 90, SEAL_TABLES)
    assert producer.table.seal(handoff, 90, BLOCKS) == [(RANK_0, seal), (RANK_1, seal)]


def test_each_announcement_says_what_is_final(producer: Producer) -> None:
    handoff = producer.open()
    producer.table.subscribe(handoff, 0, RANK_0)
    step = producer.advance(handoff, 40)
    said = [producer.table.announce(step, 0, layers) for layers in (1, 2, 3)]
    step = producer.advance(handoff, 80)
    said += [producer.table.announce(step, 0, 2)]
    progress = [message for answers in said for _, message in answers]
    assert [(p.base_tokens, p.num_tokens, p.num_layers) for p in progress] == [  # type: ignore[union-attr]
        (0, 40, 1),
        (0, 40, 2),
        (40, 40, 3),
        (40, 80, 2),
    ]
    assert all(who == RANK_0 for answers in said for who, _ in answers)


def test_a_subscriber_is_told_only_what_is_new_in_the_block_tables(producer: Producer) -> None:
    handoff = producer.open()
    producer.table.subscribe(handoff, 0, RANK_0)
    growing: list[BlockTables] = [([1], []), ([1, 2], [7]), ([1, 2], [7]), ([1, 2, 3], [7, 8])]
    told = []
    for number, blocks in enumerate(growing):
        ((_, message),) = producer.compute(handoff, 10 * (number + 1), blocks)
        assert isinstance(message, wire.Progress)
        told.append(message.tables)
    assert told == [
        tables((0, [1]), (0, [])),
        tables((1, [2]), (0, [7])),
        tables((2, []), (1, [])),
        tables((2, [3]), (1, [8])),
    ]
    ((_, seal),) = producer.table.seal(handoff, TOKENS, ([1, 2, 3, 4], [7, 8]))
    assert seal == wire.Seal(handoff, 0, TOKENS, tables((3, [4]), (2, [])))


def test_who_subscribes_again_is_told_the_whole_block_tables(producer: Producer) -> None:
    handoff = producer.open()
    producer.table.subscribe(handoff, 0, RANK_0)
    producer.compute(handoff, 40)
    again = producer.table.subscribe(handoff, 0, RANK_0)
    assert again == wire.Progress(handoff, 0, 40, 40, LAYERS, SEAL_TABLES)


def test_each_rank_hears_of_its_own_progress_only() -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.open()
    producer.table.subscribe(handoff, 0, RANK_0)
    producer.table.subscribe(handoff, 1, RANK_1)
    step = producer.advance(handoff, 40)
    ((who, message),) = producer.table.announce(step, 1, LAYERS)
    assert who == RANK_1
    assert message == wire.Progress(handoff, 0, 40, 40, LAYERS, SEAL_TABLES)
    assert producer.table.subscribe(handoff, 0, RANK_0) == wire.Progress(
        handoff, 0, 0, 0, 0, SEAL_TABLES
    )
    ((who, message),) = producer.table.announce(step, 0, 1)
    assert who == RANK_0
    assert message == wire.Progress(handoff, 0, 0, 40, 1, tables((3, []), (1, [])))


def test_a_step_may_compute_several_handoffs(producer: Producer) -> None:
    handoffs = [producer.open(name) for name in "ab"]
    for handoff, who in zip(handoffs, (RANK_0, RANK_1), strict=True):
        producer.table.subscribe(handoff, 0, who)
    advances = [Advance(handoff, 0, 8 * (i + 1), BLOCKS) for i, handoff in enumerate(handoffs)]
    producer.table.advance(1, advances)
    told = producer.table.announce(1, 0, LAYERS)
    assert [(who, message.num_tokens) for who, message in told] == [(RANK_0, 8), (RANK_1, 16)]  # type: ignore[union-attr]


def test_announcements_of_a_step_that_is_unknown_or_over_are_ignored(producer: Producer) -> None:
    handoff = producer.open()
    producer.table.subscribe(handoff, 0, RANK_0)
    assert producer.table.announce(99, 0, LAYERS) == []
    step = producer.advance(handoff, 40)
    assert len(producer.table.announce(step, 0, LAYERS)) == 1
    assert producer.table.announce(step, 0, LAYERS) == []
    assert producer.table.announce(step, 0, 1) == []


def test_announcements_of_a_step_long_ago_are_ignored(producer: Producer) -> None:
    handoff = producer.open()
    producer.table.subscribe(handoff, 0, RANK_0)
    step = producer.advance(handoff, 40)
    for _ in range(64):
        producer.advance(producer.open(), 40)
    assert producer.table.announce(step, 0, LAYERS) == []
    assert producer.table.subscribe(handoff, 0, RANK_0) == wire.Progress(
        handoff, 0, 0, 0, 0, SEAL_TABLES
    )


def test_steps_that_a_rank_has_announced_are_remembered_for_the_others() -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.open()
    producer.table.subscribe(handoff, 1, RANK_1)
    step = producer.advance(handoff, 40)
    assert producer.table.announce(step, 0, LAYERS) == []
    assert len(producer.table.announce(step, 1, LAYERS)) == 1


def test_announcements_after_the_seal_say_nothing_new(producer: Producer) -> None:
    handoff = producer.open()
    producer.table.subscribe(handoff, 0, RANK_0)
    step = producer.advance(handoff, TOKENS)
    producer.table.seal(handoff, TOKENS, BLOCKS)
    assert producer.table.announce(step, 0, LAYERS) == []


# --- preemption ------------------------------------------------------------------------------


def test_a_withdrawal_tells_every_subscriber_that_all_before_it_is_void() -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.open()
    producer.table.subscribe(handoff, 0, RANK_0)
    producer.table.subscribe(handoff, 1, RANK_1)
    producer.compute(handoff, 40, ranks=(0, 1))
    void = wire.Progress(handoff, 1, 0, 0, 0, NO_BLOCKS)
    assert producer.table.withdraw(handoff, 1) == [(RANK_0, void), (RANK_1, void)]
    assert producer.table.subscribe(handoff, 0, RANK_0) == void


def test_a_withdrawal_counts_once(producer: Producer) -> None:
    handoff = producer.open()
    producer.table.subscribe(handoff, 0, RANK_0)
    assert len(producer.table.withdraw(handoff, 2)) == 1
    assert producer.table.withdraw(handoff, 2) == []
    assert producer.table.withdraw(handoff, 1) == []


def test_what_is_computed_again_is_told_from_the_start_of_the_block_tables(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.table.subscribe(handoff, 0, RANK_0)
    producer.compute(handoff, 80)
    producer.table.withdraw(handoff, 1)
    ((_, message),) = producer.compute(handoff, 40, ([8, 9], [5]), epoch=1)
    expected = tables((0, [8, 9]), (0, [5]))
    assert message == wire.Progress(handoff, 1, 40, 40, LAYERS, expected)


def test_announcements_of_an_earlier_epoch_are_ignored(producer: Producer) -> None:
    handoff = producer.open()
    producer.table.subscribe(handoff, 0, RANK_0)
    before = producer.advance(handoff, 80)
    producer.table.withdraw(handoff, 1)
    assert producer.table.announce(before, 0, LAYERS) == []
    void = wire.Progress(handoff, 1, 0, 0, 0, NO_BLOCKS)
    assert producer.table.subscribe(handoff, 0, RANK_0) == void


def test_a_step_of_an_earlier_epoch_changes_no_block_tables(producer: Producer) -> None:
    handoff = producer.open()
    producer.table.withdraw(handoff, 1)
    assert producer.compute(handoff, 80, epoch=0) == []
    void = wire.Progress(handoff, 1, 0, 0, 0, NO_BLOCKS)
    assert producer.table.subscribe(handoff, 0, RANK_0) == void


def test_a_sealed_handoff_cannot_be_withdrawn(producer: Producer) -> None:
    handoff = producer.sealed()
    producer.table.subscribe(handoff, 0, RANK_0)
    assert producer.table.withdraw(handoff, 1) == []
    assert producer.commit(handoff) == granted(handoff)


def test_the_seal_names_the_epoch_that_it_belongs_to(producer: Producer) -> None:
    handoff = producer.open()
    producer.table.withdraw(handoff, 3)
    producer.table.seal(handoff, TOKENS, BLOCKS)
    seal = wire.Seal(handoff, 3, TOKENS, SEAL_TABLES)
    assert producer.table.subscribe(handoff, 0, RANK_0) == seal


# --- commits ---------------------------------------------------------------------------------


def test_a_commit_releases_the_blocks(producer: Producer) -> None:
    handoff = producer.sealed("mine")
    assert producer.commit(handoff) == granted(handoff)
    assert producer.released == [("mine", ProducerState.COMMITTED)]
    assert len(producer.table) == 0


def test_a_commit_needs_all_ranks() -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.sealed()
    assert producer.commit(handoff, 1) == granted(handoff)
    assert producer.released == []
    assert producer.commit(handoff, 0) == granted(handoff)
    assert producer.released == [("r", ProducerState.COMMITTED)]


def test_a_rank_that_does_not_exist_is_refused(producer: Producer) -> None:
    handoff = producer.sealed()
    refusal = wire.Refuse(handoff, Reason.MISSING_BLOCKS)
    assert producer.table.subscribe(handoff, 1, RANK_1) == refusal
    assert producer.commit(handoff, 1) == refusal
    assert producer.released == []


def test_a_consumer_that_has_reconnected_is_offered_anew_what_it_may_have_missed(
    producer: Producer,
) -> None:
    handoff = producer.wanted()
    offer = wire.Offer(handoff, TOKENS, b"digest")
    alive = wire.Alive({})
    again = (b"scheduler after the reconnect", SCHEDULER[1])
    assert producer.table.heartbeat([handoff], again) == [(again, offer), (again, alive)]
    assert producer.table.heartbeat([handoff], again) == [(again, alive)]


def test_a_consumer_that_reconnects_before_its_request_has_come_is_offered_it_all_the_same(
    producer: Producer,
) -> None:
    handoff = new_handoff_id()
    producer.table.want(handoff, SCHEDULER)
    again = (b"scheduler after the reconnect", SCHEDULER[1])
    producer.table.heartbeat([handoff], again)
    producer.queued(handoff=handoff)
    assert producer.table.open(handoff) == [(again, wire.Offer(handoff, TOKENS, b"digest"))]


def test_one_rank_that_commits_twice_counts_once() -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.sealed()
    producer.commit(handoff, 1)
    assert producer.commit(handoff, 1) == granted(handoff)
    assert producer.released == []


def test_a_commit_before_all_is_computed_is_refused_and_changes_nothing(
    producer: Producer,
) -> None:
    handoff = producer.open()
    refusal = wire.Refuse(handoff, Reason.MISSING_BLOCKS)
    assert producer.commit(handoff) == refusal
    producer.compute(handoff, TOKENS - 1)
    assert producer.commit(handoff) == refusal
    step = producer.advance(handoff, TOKENS)
    producer.table.announce(step, 0, LAYERS - 1)
    assert producer.commit(handoff) == refusal
    assert isinstance(producer.table.want(handoff, SCHEDULER), wire.Offer)
    producer.table.announce(step, 0, LAYERS)
    assert producer.commit(handoff) == granted(handoff)


def test_a_commit_before_the_seal_frees_the_blocks_at_the_seal(producer: Producer) -> None:
    handoff = producer.open()
    producer.compute(handoff, TOKENS)
    assert producer.commit(handoff) == granted(handoff)
    assert producer.released == []
    assert producer.abandoned == []  # its request may still have something to say
    assert producer.table.seal(handoff, TOKENS, BLOCKS) == []
    assert producer.released == [("r", ProducerState.COMMITTED)]
    assert len(producer.table) == 0


def test_a_commit_before_the_seal_is_granted_only_to_ranks_whose_kv_is_complete() -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.open()
    step = producer.advance(handoff, TOKENS)
    producer.table.announce(step, 1, LAYERS)
    refusal = wire.Refuse(handoff, Reason.MISSING_BLOCKS)
    assert producer.commit(handoff, 0) == refusal
    assert producer.commit(handoff, 1) == granted(handoff)
    producer.table.announce(step, 0, LAYERS)
    assert producer.commit(handoff, 0) == granted(handoff)


def test_what_was_complete_before_a_withdrawal_is_not_complete_after_it(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.compute(handoff, TOKENS)
    producer.table.withdraw(handoff, 1)
    assert producer.commit(handoff, epoch=1) == wire.Refuse(handoff, Reason.MISSING_BLOCKS)


@pytest.mark.parametrize("is_last", [True, False])
def test_a_commit_of_an_earlier_epoch_is_told_how_things_stand_and_never_granted(
    producer: Producer, is_last: bool
) -> None:
    handoff = producer.open()
    producer.table.subscribe(handoff, 0, RANK_0)
    producer.compute(handoff, TOKENS)
    producer.table.withdraw(handoff, 1)
    void = wire.Progress(handoff, 1, 0, 0, 0, NO_BLOCKS)
    assert producer.commit(handoff, is_last=is_last) == void
    producer.compute(handoff, TOKENS, epoch=1)
    state = wire.Progress(handoff, 1, TOKENS, TOKENS, LAYERS, SEAL_TABLES)
    assert producer.commit(handoff, is_last=is_last) == state
    producer.table.seal(handoff, TOKENS, BLOCKS)
    assert producer.commit(handoff, is_last=is_last) == wire.Seal(handoff, 1, TOKENS, SEAL_TABLES)
    assert producer.released == []
    assert producer.commit(handoff, epoch=1) == granted(handoff, epoch=1)


def test_a_commit_of_another_epoch_by_somebody_unknown_is_refused(producer: Producer) -> None:
    handoff = producer.sealed()
    refusal = wire.Refuse(handoff, Reason.MISSING_BLOCKS)
    assert producer.commit(handoff, epoch=1) == refusal
    assert producer.released == []


def test_what_arrived_so_far_is_vouched_for_while_the_rest_is_computed(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.compute(handoff, 40)
    assert producer.commit(handoff, is_last=False) == granted(handoff, is_last=False)
    assert producer.commit(handoff, is_last=False) == granted(handoff, is_last=False)
    producer.table.seal(handoff, TOKENS, BLOCKS)
    assert producer.commit(handoff, is_last=False) == granted(handoff, is_last=False)
    assert producer.released == []  # the consumer still reads
    assert producer.commit(handoff) == granted(handoff)


@pytest.mark.parametrize("how", ["drop", "cancel", "expire", "expire sealed"])
def test_nothing_is_vouched_for_once_the_blocks_may_be_gone(producer: Producer, how: str) -> None:
    handoff = producer.wanted()
    producer.compute(handoff, 40)
    if how == "drop":
        producer.table.drop(handoff)
    elif how == "cancel":
        producer.table.cancel(handoff)
    else:
        if how == "expire sealed":
            producer.table.seal(handoff, TOKENS, BLOCKS)
        producer.expire()
    expired = how.startswith("expire")
    refusal = wire.Refuse(handoff, Reason.LEASE_EXPIRED if expired else Reason.CANCELLED)
    assert producer.commit(handoff, is_last=False) == refusal
    assert producer.commit(handoff) == refusal


# A sliding window moves on while the producer computes answers, and lets go of the prompt's blocks.
def test_a_block_that_the_request_has_let_go_of_since_is_never_vouched_for(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.table.subscribe(handoff, 0, RANK_0)
    producer.compute(handoff, TOKENS, ([1, 2, 3], [4]))
    producer.table.seal(handoff, TOKENS, ([0, 0, 3, 5], [4]))
    assert not isinstance(producer.commit(handoff), wire.Committed)


def windowed() -> Producer:
    """A producer of full attention and a window, which needs blocks 23 and 24 of 25 at the end."""
    groups = [full_group("layer.0", "layer.2"), sliding_group(6, "layer.1")]
    return Producer(layout=make_layout(groups=groups))


def test_a_window_that_moves_on_while_answers_are_computed_ends_the_handoff() -> None:
    producer = windowed()
    handoff = producer.wanted()
    prompt, window = list(range(1, 26)), [*[0] * 23, 31, 32]
    producer.compute(handoff, TOKENS, (prompt, window))
    moved = [*[0] * 24, 32, 33]
    producer.advance(handoff, TOKENS, ([*prompt, 26], moved))
    assert producer.commit(handoff) == wire.Refuse(handoff, Reason.CANCELLED)
    assert producer.commit(handoff, is_last=False) == wire.Refuse(handoff, Reason.CANCELLED)
    assert producer.abandoned == []  # its answer is wanted all the same
    producer.table.seal(handoff, TOKENS, ([*prompt, 26], moved))
    assert producer.released == [("r", ProducerState.CANCELLED)]


def test_a_window_that_moves_on_inside_the_prompt_does_no_harm() -> None:
    producer = windowed()
    handoff = producer.wanted()
    prompt = list(range(1, 26))
    producer.compute(handoff, 80, (prompt[:20], [*[0] * 18, 41, 42]))
    producer.compute(handoff, TOKENS, (prompt, [*[0] * 23, 31, 32]))
    assert producer.commit(handoff) == granted(handoff)


def test_a_window_that_moves_on_after_the_commit_does_no_harm() -> None:
    producer = windowed()
    handoff = producer.wanted()
    prompt, window = list(range(1, 26)), [*[0] * 23, 31, 32]
    producer.compute(handoff, TOKENS, (prompt, window))
    assert producer.commit(handoff) == granted(handoff)
    producer.table.seal(handoff, TOKENS, (prompt, [*[0] * 24, 32]))
    assert producer.released == [("r", ProducerState.COMMITTED)]


# --- leases and cancelling -------------------------------------------------------------------


def test_a_cancel_releases_the_blocks(producer: Producer) -> None:
    handoff = producer.sealed()
    producer.table.cancel(handoff)
    assert producer.released == [("r", ProducerState.CANCELLED)]
    assert producer.abandoned == []


def test_a_silent_consumer_s_lease_expires(producer: Producer) -> None:
    producer.sealed()
    producer.clock.advance(LEASE_S - 0.001)
    producer.table.tick()
    assert producer.released == []
    producer.clock.advance(0.001)
    producer.table.tick()
    assert producer.released == [("r", ProducerState.EXPIRED)]


def test_a_commit_that_comes_after_the_lease_is_refused_though_nobody_ticked(
    producer: Producer,
) -> None:
    handoff = producer.sealed()
    producer.clock.advance(LEASE_S)
    refusal = wire.Refuse(handoff, Reason.LEASE_EXPIRED)
    assert producer.commit(handoff) == refusal
    assert producer.released == [("r", ProducerState.EXPIRED)]


def test_a_commit_of_the_second_rank_after_the_lease_is_refused() -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.sealed()
    producer.commit(handoff, 0)
    producer.clock.advance(LEASE_S)
    refusal = wire.Refuse(handoff, Reason.LEASE_EXPIRED)
    assert producer.commit(handoff, 1) == refusal


def end(producer: Producer, handoff: HandoffId, state: ProducerState) -> None:
    if state is ProducerState.COMMITTED:
        producer.commit(handoff)
    elif state is ProducerState.CANCELLED:
        producer.table.cancel(handoff)
    else:
        producer.expire()


ENDINGS = [
    (ProducerState.COMMITTED, Reason.UNKNOWN_HANDOFF),
    (ProducerState.CANCELLED, Reason.CANCELLED),
    (ProducerState.EXPIRED, Reason.LEASE_EXPIRED),
]


@pytest.mark.parametrize(("state", "reason"), ENDINGS)
def test_an_ended_handoff_is_refused_with_how_it_ended(
    producer: Producer, state: ProducerState, reason: Reason
) -> None:
    handoff = producer.sealed()
    end(producer, handoff, state)
    refusal = wire.Refuse(handoff, reason)
    assert producer.table.want(handoff, SCHEDULER) == refusal
    assert producer.table.subscribe(handoff, 0, RANK_0) == refusal
    assert producer.commit(handoff) == refusal
    assert producer.commit(handoff, is_last=False) == refusal


@pytest.mark.parametrize("first", [state for state, _ in ENDINGS])
@pytest.mark.parametrize("second", [state for state, _ in ENDINGS])
def test_blocks_are_released_exactly_once(
    producer: Producer, first: ProducerState, second: ProducerState
) -> None:
    handoff = producer.sealed()
    end(producer, handoff, first)
    end(producer, handoff, second)
    producer.table.drop(handoff)
    producer.table.want(handoff, SCHEDULER)
    assert producer.released == [("r", first)]


@pytest.mark.parametrize("first", [state for state, _ in ENDINGS])
@pytest.mark.parametrize("second", [state for state, _ in ENDINGS])
def test_blocks_are_released_exactly_once_when_all_happens_before_the_seal(
    producer: Producer, first: ProducerState, second: ProducerState
) -> None:
    handoff = producer.wanted()
    producer.compute(handoff, TOKENS)
    end(producer, handoff, first)
    end(producer, handoff, second)
    assert producer.released == []
    producer.table.seal(handoff, TOKENS, BLOCKS)
    end(producer, handoff, second)
    assert producer.released == [("r", first)]
    assert len(producer.abandoned) == (first is not ProducerState.COMMITTED)


def test_heartbeat_renews_a_lease(producer: Producer) -> None:
    handoff = producer.sealed()
    producer.table.want(handoff, SCHEDULER)
    for _ in range(10):
        producer.clock.advance(LEASE_S - 1)
        assert producer.heartbeat([handoff]) == wire.Alive({})
    producer.table.tick()
    assert producer.released == []
    assert producer.commit(handoff) == granted(handoff)


@pytest.mark.parametrize("stage", ["queued", "producing", "sealed"])
@pytest.mark.parametrize("ask", ["want", "subscribe", "heartbeat"])
def test_every_question_renews_a_lease(producer: Producer, stage: str, ask: str) -> None:
    handoff = producer.queued()
    producer.table.want(handoff, SCHEDULER)
    if stage != "queued":
        producer.table.open(handoff)
    if stage == "sealed":
        producer.table.seal(handoff, TOKENS, BLOCKS)
    producer.clock.advance(LEASE_S - 1)
    if ask == "want":
        producer.table.want(handoff, SCHEDULER)
    elif ask == "subscribe":
        producer.table.subscribe(handoff, 0, RANK_0)
    else:
        producer.heartbeat([handoff])
    producer.clock.advance(LEASE_S - 1)
    producer.table.tick()
    assert producer.released == []
    assert producer.abandoned == []


def test_heartbeat_names_what_it_cannot_renew(producer: Producer) -> None:
    held, cancelled, committed, expired = (producer.sealed(str(i)) for i in range(4))
    producer.table.cancel(cancelled)
    producer.commit(committed)
    producer.clock.advance(LEASE_S - 1)
    producer.table.want(held, SCHEDULER)
    producer.heartbeat([held])
    producer.clock.advance(1)
    alive = producer.heartbeat([held, cancelled, committed, expired])
    lost = {cancelled: Reason.CANCELLED, expired: Reason.LEASE_EXPIRED}
    assert alive == wire.Alive(lost)
    assert ("3", ProducerState.EXPIRED) in producer.released


def test_heartbeat_names_what_was_given_up_before_the_seal(producer: Producer) -> None:
    cancelled, committed, dropped = (producer.wanted(str(i)) for i in range(3))
    producer.compute(committed, TOKENS)
    producer.table.cancel(cancelled)
    producer.commit(committed)
    producer.table.drop(dropped)
    alive = producer.heartbeat([cancelled, committed, dropped])
    assert alive == wire.Alive({cancelled: Reason.CANCELLED, dropped: Reason.CANCELLED})


def test_heartbeat_of_one_handoff_does_not_renew_another(producer: Producer) -> None:
    held, other = producer.sealed("held"), producer.sealed("other")
    producer.clock.advance(LEASE_S - 1)
    producer.heartbeat([held])
    producer.clock.advance(1)
    producer.table.tick()
    assert producer.released == [("other", ProducerState.EXPIRED)]
    assert producer.commit(other) == wire.Refuse(other, Reason.LEASE_EXPIRED)


def test_a_handoff_that_is_being_produced_for_nobody_yet_never_expires(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.clock.advance(100 * LEASE_S)
    assert producer.table.tick() is None
    assert isinstance(producer.table.want(handoff, SCHEDULER), wire.Offer)


@pytest.mark.parametrize("stage", ["queued", "producing"])
def test_a_consumer_that_has_asked_and_falls_silent_ends_what_is_being_produced(
    producer: Producer, stage: str
) -> None:
    handoff = producer.queued()
    producer.table.want(handoff, SCHEDULER)
    if stage == "producing":
        producer.table.open(handoff)
    assert producer.table.tick() == producer.clock() + LEASE_S
    producer.expire()
    assert producer.abandoned == [("r", ProducerState.EXPIRED)]
    assert producer.released == []
    assert producer.table.tick() is None
    assert producer.table.want(handoff, SCHEDULER) == wire.Refuse(handoff, Reason.LEASE_EXPIRED)
    assert producer.table.drop(handoff) == []
    assert len(producer.table) == 0
    assert producer.abandoned == [("r", ProducerState.EXPIRED)]


def test_the_lease_starts_afresh_at_the_seal(producer: Producer) -> None:
    handoff = producer.open()
    producer.clock.advance(100 * LEASE_S)
    producer.table.seal(handoff, 90, BLOCKS)
    assert producer.table.tick() == producer.clock() + LEASE_S
    assert producer.released == []


def test_the_lease_starts_afresh_with_the_offer(producer: Producer) -> None:
    handoff = producer.queued()
    producer.table.want(handoff, SCHEDULER)
    producer.clock.advance(LEASE_S - 1)
    producer.table.open(handoff)
    assert producer.table.tick() == producer.clock() + LEASE_S


def test_a_tick_says_when_the_next_lease_runs_out(producer: Producer) -> None:
    assert producer.table.tick() is None
    producer.sealed()
    first = producer.clock() + LEASE_S
    producer.clock.advance(5)
    producer.sealed()
    assert producer.table.tick() == first
    producer.clock.advance(LEASE_S - 5)
    assert producer.table.tick() == first + 5


def test_a_clock_that_steps_back_ends_no_lease_early(producer: Producer) -> None:
    handoff = producer.sealed()
    producer.clock.advance(-1000)
    producer.heartbeat([handoff])
    producer.clock.advance(1000 + LEASE_S - 1)
    producer.table.tick()
    assert producer.released == []


def test_a_dropped_request_tells_who_has_been_waiting(producer: Producer) -> None:
    handoff = producer.wanted()
    producer.table.subscribe(handoff, 0, RANK_0)
    refusal = wire.Refuse(handoff, Reason.PRODUCER_ENDED)
    assert sorted(producer.table.drop(handoff)) == [(RANK_0, refusal), (SCHEDULER, refusal)]
    assert producer.table.want(handoff, SCHEDULER) == wire.Refuse(handoff, Reason.CANCELLED)
    assert producer.released == []  # it never held blocks for anybody


def test_a_request_that_is_dropped_in_the_queue_tells_who_wants_it(producer: Producer) -> None:
    handoff = new_handoff_id()
    producer.table.want(handoff, SCHEDULER)
    producer.queued(handoff=handoff)
    refusal = wire.Refuse(handoff, Reason.PRODUCER_ENDED)
    assert producer.table.drop(handoff) == [(SCHEDULER, refusal)]
    assert len(producer.table) == 0


def test_endings_are_forgotten_in_the_end(producer: Producer) -> None:
    first = producer.sealed()
    producer.table.cancel(first)
    for _ in range(4096):
        producer.table.cancel(producer.sealed())
    refusal = wire.Refuse(first, Reason.UNKNOWN_HANDOFF)
    assert producer.table.subscribe(first, 0, RANK_0) == refusal
    assert len(producer.table) == 0


# The scheduler holds them from the seal on, until it hears of their release.
def test_a_handoff_that_was_cancelled_before_its_seal_releases_its_blocks(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.table.cancel(handoff)
    producer.table.seal(handoff, 90, BLOCKS)
    assert producer.released == [("r", ProducerState.CANCELLED)]


def test_a_handoff_that_is_cancelled_while_it_is_produced_is_abandoned_once(
    producer: Producer,
) -> None:
    handoff = producer.wanted()
    producer.table.cancel(handoff)
    producer.table.cancel(handoff)
    producer.expire()
    assert producer.abandoned == [("r", ProducerState.CANCELLED)]
    assert producer.released == []


def test_a_handoff_that_was_cancelled_before_its_request_came_is_abandoned_when_it_comes(
    producer: Producer,
) -> None:
    handoff = new_handoff_id()
    producer.table.want(handoff, SCHEDULER)
    producer.table.cancel(handoff)
    assert producer.abandoned == []
    producer.queued("late", handoff)
    assert producer.abandoned == [("late", ProducerState.CANCELLED)]
    assert producer.table.open(handoff) == []
    assert producer.table.drop(handoff) == []
    assert len(producer.table) == 0
    assert producer.table.tick() is None


def test_a_handoff_that_was_cancelled_before_its_seal_is_refused_to_everybody(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.table.subscribe(handoff, 0, RANK_0)
    producer.table.cancel(handoff)
    refusal = wire.Refuse(handoff, Reason.CANCELLED)
    assert producer.released == []  # its request still runs
    assert producer.table.want(handoff, SCHEDULER) == refusal
    assert producer.table.subscribe(handoff, 1, RANK_1) == refusal
    assert producer.commit(handoff) == refusal
    assert producer.compute(handoff, 40) == []
    producer.table.seal(handoff, 90, BLOCKS)
    assert producer.commit(handoff) == refusal
    assert producer.table.subscribe(handoff, 0, RANK_0) == refusal
    assert len(producer.table) == 0


def test_a_request_that_ends_without_kv_after_its_cancel_leaves_nothing(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.table.cancel(handoff)
    producer.table.drop(handoff)
    assert len(producer.table) == 0
    assert producer.released == []
