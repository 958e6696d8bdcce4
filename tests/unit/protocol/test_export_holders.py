"""Who may hold an export besides a request that is prefilled: no other states are needed."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.fakes.producer import (
    BLOCKS,
    LAYERS,
    NO_BLOCKS,
    RANK_0,
    RANK_1,
    SCHEDULER,
    SEAL_TABLES,
    TOKENS,
    Producer,
    granted,
)
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import HandoffId, Incarnation, new_handoff_id
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.export import Export
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
    assert producer.answering.subscribe(handoff, 0, RANK_0) == wire.Seal(
        handoff, 0, TOKENS, SEAL_TABLES
    )
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
    producer.answering.subscribe(handoff, 0, RANK_0)
    for num_tokens in range(41, 45):
        ((who, progress),) = producer.compute(handoff, num_tokens)
        assert who == RANK_0
        assert isinstance(progress, wire.Progress)
        assert progress.base_tokens == num_tokens
        assert producer.commit(handoff) == wire.Refuse(handoff, Reason.MISSING_BLOCKS)
        assert producer.commit(handoff, is_last=False) == granted(handoff, is_last=False)
    assert len(producer.seal(handoff, "decode", num_tokens=44, sampled=7)) == 1
    assert producer.compute(handoff, 45) == [], "what it decodes then is its own"
    assert producer.released == []
    assert producer.commit(handoff) == granted(handoff)
    assert producer.released == [("decode", ExportState.COMMITTED)]


def test_a_running_decode_that_is_preempted_starts_a_new_epoch(producer: Producer) -> None:
    handoff = producer.wanted("decode")
    producer.answering.subscribe(handoff, 0, RANK_0)
    producer.compute(handoff, 41)
    void = wire.Progress(handoff, 1, 0, 0, 0, NO_BLOCKS)
    assert producer.table.withdraw(handoff, 1) == [(RANK_0, void)]
    producer.seal(handoff, "decode", 41)
    assert producer.commit(handoff, epoch=0) == wire.Seal(handoff, 1, 41, SEAL_TABLES)
    assert producer.commit(handoff, epoch=1) == granted(handoff, epoch=1)


# --- a tier: grows as it is loaded -------------------------------------------------------------


def test_what_a_tier_loads_is_told_as_it_comes_and_refused_when_it_does_not_come(
    producer: Producer,
) -> None:
    handoff = producer.wanted("tier")
    producer.answering.subscribe(handoff, 0, RANK_0)
    ((_, progress),) = producer.compute(handoff, 64)
    assert isinstance(progress, wire.Progress)
    assert progress.num_layers == LAYERS
    refusal = wire.Refuse(handoff, Reason.PRODUCER_ENDED)
    assert producer.table.drop(handoff) == [(RANK_0, refusal), (SCHEDULER, refusal)]
    assert producer.released == [], "the tier has its blocks to itself until the seal"


# --- consumers of another shape ----------------------------------------------------------------


@pytest.mark.parametrize("num_subscribers", [1, 2, 4, 6])
def test_an_export_is_committed_when_every_rank_of_its_consumer_has_read_all(
    num_subscribers: int,
) -> None:
    """However many ranks there are here."""
    export = Export(
        new_handoff_id(), "r", TOKENS, b"digest", BLOCKS, num_subscribers, ExportState.SEALED
    )
    for number in range(num_subscribers - 1):
        assert not export.commit(number)
        assert not export.commit(number), "who says it twice counts once"
    assert export.commit(num_subscribers - 1)


def test_a_consumer_of_this_engine_s_shape_has_as_many_ranks_as_it() -> None:
    producer = Producer(num_ranks=2)
    handoff = finished(producer, "prefix")
    producer.answering.subscribe(handoff, 0, RANK_0)
    producer.answering.subscribe(handoff, 1, RANK_1)
    producer.commit(handoff, 0)
    assert producer.released == []
    producer.commit(handoff, 1)
    assert producer.released == [("prefix", ExportState.COMMITTED)]
