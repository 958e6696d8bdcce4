"""Who may hold an export besides a request that is prefilled: no other states are needed."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.fakes.producer import (
    LAYERS,
    NO_BLOCKS,
    RANK_0,
    RANK_1,
    SCHEDULER,
    SEAL_TABLES,
    TOKENS,
    Producer,
    granted,
    progress,
)
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import HandoffId, Incarnation, new_handoff_id
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.export_states import ExportState
from vllm_pd_plugin.protocol.outbox import ReturnAddress

OTHER_SCHEDULER = ReturnAddress(b"scheduler 2", Incarnation("consumer 2"))


# --- finished prefixes: sealed from birth ----------------------------------------------------


def finished(producer: Producer, owner: str, handoff: HandoffId | None = None) -> HandoffId:
    """A prefix that is in the cache already."""
    handoff = producer.queued(owner, handoff)
    producer.seal(handoff, owner)
    return handoff


def test_a_finished_prefix_is_sealed_from_birth_and_offered_to_who_waits_for_it(
    producer: Producer,
) -> None:
    handoff = new_handoff_id()
    producer.answering.want(handoff, SCHEDULER)
    producer.queued("prefix", handoff)
    offer = wire.Offer(handoff, TOKENS, b"digest")
    assert producer.seal(handoff, "prefix") == [(SCHEDULER, offer)]
    assert producer.subscribe(handoff, 0, RANK_0) == wire.Seal(handoff, 0, TOKENS, SEAL_TABLES)
    assert producer.commit(handoff) == granted(handoff)
    assert producer.released == [("prefix", ExportState.COMMITTED)]
    assert producer.abandoned == []


def test_a_prefix_for_several_consumers_at_once_is_free_when_the_last_has_done_with_it(
    producer: Producer,
) -> None:
    """The same blocks, an export for each: one's end is not the other's."""
    first, second = finished(producer, "prefix"), finished(producer, "prefix")
    for handoff, who in (first, SCHEDULER), (second, OTHER_SCHEDULER):
        assert isinstance(producer.answering.want(handoff, who), wire.Offer)
    producer.answering.cancel(first)
    assert producer.commit(first) == wire.Refuse(first, Reason.CANCELLED)
    held = Counter({"prefix": 2}) - Counter(owner for owner, _ in producer.released)
    assert held == {"prefix": 1}
    assert producer.commit(second) == granted(second)
    assert Counter(owner for owner, _ in producer.released) == {"prefix": 2}


def test_a_prefix_serves_one_consumer_after_the_other(producer: Producer) -> None:
    for number in range(1, 4):
        handoff = finished(producer, "prefix")
        assert producer.commit(handoff) == granted(handoff)
        assert len(producer.released) == number


def test_a_holder_that_needs_the_blocks_of_a_finished_prefix_takes_them_back(
    producer: Producer,
) -> None:
    handoff = finished(producer, "prefix")
    producer.answering.want(handoff, SCHEDULER)
    refusal = wire.Refuse(handoff, Reason.PRODUCER_ENDED)
    assert producer.table.drop(handoff) == [(SCHEDULER, refusal)]
    assert producer.released == [("prefix", ExportState.CANCELLED)]
    assert producer.commit(handoff) == wire.Refuse(handoff, Reason.CANCELLED)


# --- a running decode: grows without end, and is sealed at a token count -----------------------


def test_a_running_decode_is_committed_when_it_is_sealed_and_not_before(
    producer: Producer,
) -> None:
    """It may have ``TOKENS`` at the most, and is sealed at fewer while it goes on decoding."""
    handoff = producer.wanted("decode")
    producer.subscribe(handoff, 0, RANK_0)
    for num_tokens in range(41, 45):
        ((who, message),) = producer.compute(handoff, num_tokens)
        assert who == RANK_0
        assert isinstance(message, wire.Progress)
        assert message.written[0].base_tokens == num_tokens
        assert producer.commit(handoff) == wire.Refuse(handoff, Reason.MISSING_BLOCKS)
        assert producer.commit(handoff, is_last=False) == granted(handoff, is_last=False)
    assert len(producer.seal(handoff, "decode", num_tokens=44, sampled=7)) == 1
    assert producer.compute(handoff, 45) == [], "what it decodes then is its own"
    assert producer.released == []
    assert producer.commit(handoff) == granted(handoff)
    assert producer.released == [("decode", ExportState.COMMITTED)]


def test_a_running_decode_that_is_preempted_starts_a_new_epoch(producer: Producer) -> None:
    handoff = producer.wanted("decode")
    producer.subscribe(handoff, 0, RANK_0)
    producer.compute(handoff, 41)
    void = progress(handoff, 1, 0, 0, 0, NO_BLOCKS)
    assert producer.table.withdraw(handoff, 1) == [(RANK_0, void)]
    producer.seal(handoff, "decode", 41)
    assert producer.commit(handoff, epoch=0) == wire.Seal(handoff, 1, 41, SEAL_TABLES)
    assert producer.commit(handoff, epoch=1) == granted(handoff, epoch=1)


# --- a tier: grows as it is loaded -------------------------------------------------------------


def test_what_a_tier_loads_is_told_as_it_comes_and_refused_when_it_does_not_come(
    producer: Producer,
) -> None:
    handoff = producer.wanted("tier")
    producer.subscribe(handoff, 0, RANK_0)
    ((_, message),) = producer.compute(handoff, 64)
    assert isinstance(message, wire.Progress)
    assert message.written[0].num_layers == LAYERS
    refusal = wire.Refuse(handoff, Reason.PRODUCER_ENDED)
    assert producer.table.drop(handoff) == [(RANK_0, refusal), (SCHEDULER, refusal)]
    assert producer.released == [], "the tier has its blocks to itself until the seal"


# --- consumers of another shape ----------------------------------------------------------------


@pytest.mark.parametrize("num_subscribers", [1, 2, 4, 6])
def test_an_export_is_committed_when_every_rank_of_its_consumer_has_read_all(
    num_subscribers: int,
) -> None:
    """However many ranks there are here."""
    producer = Producer(num_ranks=2)
    handoff = finished(producer, "prefix")
    for rank in range(num_subscribers):
        subscribe = wire.Subscribe(handoff, rank, num_subscribers, (rank % 2,))
        assert isinstance(producer.answering.subscribe(subscribe, RANK_0), wire.Seal)
    for rank in range(num_subscribers - 1):
        producer.commit(handoff, rank)
        producer.commit(handoff, rank)
        assert producer.released == [], "who says it twice counts once"
    producer.commit(handoff, num_subscribers - 1)
    assert producer.released == [("prefix", ExportState.COMMITTED)]


def test_a_rank_of_a_consumer_of_another_size_is_refused(producer: Producer) -> None:
    """One export has one consumer: what another reads would not be counted."""
    handoff = producer.wanted("prefix")
    producer.answering.subscribe(wire.Subscribe(handoff, 0, 2, (0,)), RANK_0)
    refusal = wire.Refuse(handoff, Reason.MISSING_BLOCKS)
    other = wire.Subscribe(handoff, 1, 4, (0,))
    assert producer.answering.subscribe(other, RANK_1) == refusal


@pytest.mark.parametrize(
    ("rank", "num_ranks", "source_ranks"),
    [
        (0, 0, (0,)),
        (1, 1, (0,)),
        (0, 1, ()),
        (0, 1, (1,)),
        (0, 1, (0, 2**63)),
        (0, 1, (0,) * 100_000),
        (0, 1, (0, 0)),
        (0, 2**63, (0,)),
    ],
)
def test_a_rank_that_cannot_be_is_refused(
    producer: Producer, rank: int, num_ranks: int, source_ranks: tuple[int, ...]
) -> None:
    handoff = producer.wanted("prefix")
    subscribe = wire.Subscribe(handoff, rank, num_ranks, source_ranks)
    answer = producer.answering.subscribe(subscribe, RANK_0)
    assert answer == wire.Refuse(handoff, Reason.MISSING_BLOCKS)


def test_what_another_has_read_before_does_not_count_for_who_takes_its_place() -> None:
    producer = Producer(num_ranks=2)
    handoff = finished(producer, "prefix")
    producer.subscribe(handoff, 0, RANK_0)
    producer.commit(handoff, 0)
    producer.subscribe(handoff, 0, RANK_1)
    producer.subscribe(handoff, 1, RANK_1)
    producer.commit(handoff, 1)
    assert producer.released == []
    producer.commit(handoff, 0)
    assert producer.released == [("prefix", ExportState.COMMITTED)]


def test_a_rank_that_reads_from_several_hears_what_all_of_them_have_written() -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.wanted("prefix")
    producer.answering.subscribe(wire.Subscribe(handoff, 0, 1, (0, 1)), RANK_0)
    step = producer.advance(handoff, 40)
    assert producer.table.announce(step, 0, LAYERS) == []
    ((_, first),) = producer.table.announce(step, 1, 2)
    ((_, second),) = producer.table.announce(step, 1, LAYERS)
    assert isinstance(first, wire.Progress)
    assert isinstance(second, wire.Progress)
    assert first.written == (wire.Written(0, 40, 2),)
    assert second.written == (wire.Written(40, 40, LAYERS),)
    assert producer.commit(handoff) == wire.Refuse(handoff, Reason.MISSING_BLOCKS)
    producer.compute(handoff, TOKENS, ranks=(0,))
    assert producer.commit(handoff) == wire.Refuse(handoff, Reason.MISSING_BLOCKS)
    producer.compute(handoff, TOKENS, ranks=(1,))
    assert producer.commit(handoff) == granted(handoff)


def test_of_two_ranks_the_slower_says_how_far_a_stage_is() -> None:
    """One has begun the next step while the other is still in the one before."""
    producer = Producer(num_ranks=2)
    handoff = producer.wanted("prefix")
    producer.answering.subscribe(wire.Subscribe(handoff, 0, 1, (0, 1)), RANK_0)
    first, second = producer.advance(handoff, 40), producer.advance(handoff, 80)
    producer.table.announce(first, 0, LAYERS)
    producer.table.announce(second, 0, 1)
    ((_, message),) = producer.table.announce(first, 1, 2)
    assert isinstance(message, wire.Progress)
    assert message.written == (wire.Written(0, 40, 2),)


def test_a_consumer_of_this_engine_s_shape_has_as_many_ranks_as_it() -> None:
    producer = Producer(num_ranks=2)
    handoff = finished(producer, "prefix")
    producer.subscribe(handoff, 0, RANK_0)
    producer.subscribe(handoff, 1, RANK_1)
    producer.commit(handoff, 0)
    assert producer.released == []
    producer.commit(handoff, 1)
    assert producer.released == [("prefix", ExportState.COMMITTED)]
