"""The producer's table: who subscribes is told what is final."""

from __future__ import annotations

from collections.abc import Sequence

from tests.fakes.producer import (
    BLOCKS,
    LAYERS,
    NO_BLOCKS,
    RANK_0,
    RANK_1,
    SEAL_TABLES,
    TOKENS,
    Producer,
    granted,
    progress,
)
from vllm_pd_plugin.memory.layout import BlockTables
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.steps import Advance


def tables(*slices: tuple[int, Sequence[int]]) -> tuple[wire.TableSlice, ...]:
    return tuple(wire.TableSlice(start, tuple(blocks)) for start, blocks in slices)


# --- announcements ---------------------------------------------------------------------------


def test_who_subscribes_is_told_at_once_how_things_stand(producer: Producer) -> None:
    handoff = producer.open()
    nothing = progress(handoff, 0, 0, 0, 0, NO_BLOCKS)
    assert producer.subscribe(handoff, 0, RANK_0) == nothing
    producer.compute(handoff, 40)
    step = producer.advance(handoff, 80)
    producer.table.announce(step, 0, 2)
    assert producer.subscribe(handoff, 0, RANK_0) == progress(handoff, 0, 40, 80, 2, SEAL_TABLES)


def test_who_subscribes_after_the_seal_is_told_everything(producer: Producer) -> None:
    handoff = producer.sealed()
    seal = wire.Seal(handoff, 0, TOKENS, SEAL_TABLES)
    assert producer.subscribe(handoff, 0, RANK_0) == seal
    assert producer.subscribe(handoff, 0, RANK_0) == seal


def test_who_subscribes_early_is_told_at_the_seal() -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.open()
    producer.subscribe(handoff, 0, RANK_0)
    producer.subscribe(handoff, 1, RANK_1)
    seal = wire.Seal(handoff, 0, 90, SEAL_TABLES)
    assert producer.table.seal(handoff, "r", 90, BLOCKS) == [(RANK_0, seal), (RANK_1, seal)]


def test_each_announcement_says_what_is_final(producer: Producer) -> None:
    handoff = producer.open()
    producer.subscribe(handoff, 0, RANK_0)
    step = producer.advance(handoff, 40)
    said = [producer.table.announce(step, 0, layers) for layers in (1, 2, 3)]
    step = producer.advance(handoff, 80)
    said += [producer.table.announce(step, 0, 2)]
    messages = [p for answers in said for _, p in answers if isinstance(p, wire.Progress)]
    assert [p.written for p in messages] == [
        (wire.Written(0, 40, 1),),
        (wire.Written(0, 40, 2),),
        (wire.Written(40, 40, 3),),
        (wire.Written(40, 80, 2),),
    ]
    assert all(who == RANK_0 for answers in said for who, _ in answers)


def test_each_handoff_of_a_step_is_told_of_at_its_own_layers(producer: Producer) -> None:
    long, short = producer.open("long"), producer.open("short")
    for handoff in (long, short):
        producer.subscribe(handoff, 0, RANK_0)
    producer.table.advance(
        1, [Advance(long, 0, 80, BLOCKS, ((1, 2, 3),)), Advance(short, 0, 10, BLOCKS, ((3,),))]
    )
    said = [
        [message.handoff_id for _, message in producer.table.announce(1, 0, layers)]  # type: ignore[union-attr]
        for layers in (1, 2, LAYERS)
    ]
    assert said == [[long], [long], [long, short]]


def test_of_a_step_that_is_over_nothing_is_told(producer: Producer) -> None:
    handoff = producer.open()
    producer.subscribe(handoff, 0, RANK_0)
    step = producer.advance(handoff, 40)
    assert len(producer.table.announce(step, 0, LAYERS)) == 1
    assert producer.table.announce(step, 0, LAYERS) == []
    assert producer.table.announce(step, 0, 1) == []


def test_a_subscriber_is_told_only_what_is_new_in_the_block_tables(producer: Producer) -> None:
    handoff = producer.open()
    producer.subscribe(handoff, 0, RANK_0)
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
    ((_, seal),) = producer.table.seal(handoff, "r", TOKENS, ([1, 2, 3, 4], [7, 8]))
    assert seal == wire.Seal(handoff, 0, TOKENS, tables((3, [4]), (2, [])))


def test_who_subscribes_again_is_told_the_whole_block_tables(producer: Producer) -> None:
    handoff = producer.open()
    producer.subscribe(handoff, 0, RANK_0)
    producer.compute(handoff, 40)
    again = producer.subscribe(handoff, 0, RANK_0)
    assert again == progress(handoff, 0, 40, 40, LAYERS, SEAL_TABLES)


def test_each_rank_hears_of_its_own_progress_only() -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.open()
    producer.subscribe(handoff, 0, RANK_0)
    producer.subscribe(handoff, 1, RANK_1)
    step = producer.advance(handoff, 40)
    ((who, message),) = producer.table.announce(step, 1, LAYERS)
    assert who == RANK_1
    assert message == progress(handoff, 0, 40, 40, LAYERS, SEAL_TABLES)
    assert producer.subscribe(handoff, 0, RANK_0) == progress(handoff, 0, 0, 0, 0, SEAL_TABLES)
    ((who, message),) = producer.table.announce(step, 0, 1)
    assert who == RANK_0
    assert message == progress(handoff, 0, 0, 40, 1, tables((3, []), (1, [])))


def test_a_step_may_compute_several_handoffs(producer: Producer) -> None:
    handoffs = [producer.open(name) for name in "ab"]
    for handoff, who in zip(handoffs, (RANK_0, RANK_1), strict=True):
        producer.subscribe(handoff, 0, who)
    advances = [
        Advance(handoff, 0, 8 * (i + 1), BLOCKS, ((),)) for i, handoff in enumerate(handoffs)
    ]
    producer.table.advance(1, advances)
    assert producer.table.announce(1, 0, LAYERS) == [
        (RANK_0, progress(handoffs[0], 0, 8, 8, LAYERS, SEAL_TABLES)),
        (RANK_1, progress(handoffs[1], 0, 16, 16, LAYERS, SEAL_TABLES)),
    ]


def test_announcements_of_a_step_that_is_unknown_or_over_are_ignored(producer: Producer) -> None:
    handoff = producer.open()
    producer.subscribe(handoff, 0, RANK_0)
    assert producer.table.announce(99, 0, LAYERS) == []
    step = producer.advance(handoff, 40)
    assert len(producer.table.announce(step, 0, LAYERS)) == 1
    assert producer.table.announce(step, 0, LAYERS) == []
    assert producer.table.announce(step, 0, 1) == []


def test_announcements_of_a_step_long_ago_are_ignored(producer: Producer) -> None:
    handoff = producer.open()
    producer.subscribe(handoff, 0, RANK_0)
    step = producer.advance(handoff, 40)
    for _ in range(64):
        producer.advance(producer.open(), 40)
    assert producer.table.announce(step, 0, LAYERS) == []
    assert producer.subscribe(handoff, 0, RANK_0) == progress(handoff, 0, 0, 0, 0, SEAL_TABLES)


def test_steps_that_a_rank_has_announced_are_remembered_for_the_others() -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.open()
    producer.subscribe(handoff, 1, RANK_1)
    step = producer.advance(handoff, 40)
    assert producer.table.announce(step, 0, LAYERS) == []
    assert len(producer.table.announce(step, 1, LAYERS)) == 1


def test_announcements_after_the_seal_say_nothing_new(producer: Producer) -> None:
    handoff = producer.open()
    producer.subscribe(handoff, 0, RANK_0)
    step = producer.advance(handoff, TOKENS)
    producer.table.seal(handoff, "r", TOKENS, BLOCKS)
    assert producer.table.announce(step, 0, LAYERS) == []


# --- preemption ------------------------------------------------------------------------------


def test_a_withdrawal_tells_every_subscriber_that_all_before_it_is_void() -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.open()
    producer.subscribe(handoff, 0, RANK_0)
    producer.subscribe(handoff, 1, RANK_1)
    producer.compute(handoff, 40, ranks=(0, 1))
    void = progress(handoff, 1, 0, 0, 0, NO_BLOCKS)
    assert producer.table.withdraw(handoff, 1) == [(RANK_0, void), (RANK_1, void)]
    assert producer.subscribe(handoff, 0, RANK_0) == void


def test_a_withdrawal_counts_once(producer: Producer) -> None:
    handoff = producer.open()
    producer.subscribe(handoff, 0, RANK_0)
    assert len(producer.table.withdraw(handoff, 2)) == 1
    assert producer.table.withdraw(handoff, 2) == []
    assert producer.table.withdraw(handoff, 1) == []


def test_what_is_computed_again_is_told_from_the_start_of_the_block_tables(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.subscribe(handoff, 0, RANK_0)
    producer.compute(handoff, 80)
    producer.table.withdraw(handoff, 1)
    ((_, message),) = producer.compute(handoff, 40, ([8, 9], [5]), epoch=1)
    expected = tables((0, [8, 9]), (0, [5]))
    assert message == progress(handoff, 1, 40, 40, LAYERS, expected)


def test_announcements_of_an_earlier_epoch_are_ignored(producer: Producer) -> None:
    handoff = producer.open()
    producer.subscribe(handoff, 0, RANK_0)
    before = producer.advance(handoff, 80)
    producer.table.withdraw(handoff, 1)
    assert producer.table.announce(before, 0, LAYERS) == []
    void = progress(handoff, 1, 0, 0, 0, NO_BLOCKS)
    assert producer.subscribe(handoff, 0, RANK_0) == void


def test_a_step_of_an_earlier_epoch_changes_no_block_tables(producer: Producer) -> None:
    handoff = producer.open()
    producer.table.withdraw(handoff, 1)
    assert producer.compute(handoff, 80, epoch=0) == []
    void = progress(handoff, 1, 0, 0, 0, NO_BLOCKS)
    assert producer.subscribe(handoff, 0, RANK_0) == void


def test_a_sealed_handoff_cannot_be_withdrawn(producer: Producer) -> None:
    handoff = producer.sealed()
    producer.subscribe(handoff, 0, RANK_0)
    assert producer.table.withdraw(handoff, 1) == []
    assert producer.commit(handoff) == granted(handoff)


def test_the_seal_names_the_epoch_that_it_belongs_to(producer: Producer) -> None:
    handoff = producer.open()
    producer.table.withdraw(handoff, 3)
    producer.table.seal(handoff, "r", TOKENS, BLOCKS)
    seal = wire.Seal(handoff, 3, TOKENS, SEAL_TABLES)
    assert producer.subscribe(handoff, 0, RANK_0) == seal
