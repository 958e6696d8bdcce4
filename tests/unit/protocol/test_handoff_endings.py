"""The producer's table: what is released, abandoned and refused when a handoff is over."""

from __future__ import annotations

import pytest

from tests.fakes.producer import BLOCKS, RANK_0, RANK_1, SCHEDULER, TOKENS, Producer
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import HandoffId, new_handoff_id
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.export_states import ExportState


def end(producer: Producer, handoff: HandoffId, state: ExportState) -> None:
    if state is ExportState.COMMITTED:
        producer.commit(handoff)
    elif state is ExportState.CANCELLED:
        producer.answering.cancel(handoff)
    else:
        producer.expire()


ENDINGS = [
    (ExportState.COMMITTED, Reason.UNKNOWN_HANDOFF),
    (ExportState.CANCELLED, Reason.CANCELLED),
    (ExportState.EXPIRED, Reason.LEASE_EXPIRED),
]


def test_a_cancel_releases_the_blocks(producer: Producer) -> None:
    handoff = producer.sealed()
    producer.answering.cancel(handoff)
    assert producer.released == [("r", ExportState.CANCELLED)]
    assert producer.abandoned == []


@pytest.mark.parametrize(("state", "reason"), ENDINGS)
def test_an_ended_handoff_is_refused_with_how_it_ended(
    producer: Producer, state: ExportState, reason: Reason
) -> None:
    handoff = producer.sealed()
    end(producer, handoff, state)
    refusal = wire.Refuse(handoff, reason)
    assert producer.answering.want(handoff, SCHEDULER) == refusal
    assert producer.subscribe(handoff, 0, RANK_0) == refusal
    assert producer.commit(handoff) == refusal
    assert producer.commit(handoff, is_last=False) == refusal


@pytest.mark.parametrize("first", [state for state, _ in ENDINGS])
@pytest.mark.parametrize("second", [state for state, _ in ENDINGS])
def test_blocks_are_released_exactly_once(
    producer: Producer, first: ExportState, second: ExportState
) -> None:
    handoff = producer.sealed()
    end(producer, handoff, first)
    end(producer, handoff, second)
    producer.table.drop(handoff)
    producer.answering.want(handoff, SCHEDULER)
    assert producer.released == [("r", first)]


@pytest.mark.parametrize("first", [state for state, _ in ENDINGS])
@pytest.mark.parametrize("second", [state for state, _ in ENDINGS])
def test_blocks_are_released_exactly_once_when_all_happens_before_the_seal(
    producer: Producer, first: ExportState, second: ExportState
) -> None:
    handoff = producer.wanted()
    producer.compute(handoff, TOKENS)
    end(producer, handoff, first)
    end(producer, handoff, second)
    assert producer.released == []
    producer.table.seal(handoff, "r", TOKENS, BLOCKS)
    end(producer, handoff, second)
    assert producer.released == [("r", first)]
    assert len(producer.abandoned) == (first is not ExportState.COMMITTED)


def test_a_dropped_request_tells_who_has_been_waiting(producer: Producer) -> None:
    handoff = producer.wanted()
    producer.subscribe(handoff, 0, RANK_0)
    refusal = wire.Refuse(handoff, Reason.PRODUCER_ENDED)
    assert sorted(producer.table.drop(handoff)) == [(RANK_0, refusal), (SCHEDULER, refusal)]
    assert producer.answering.want(handoff, SCHEDULER) == wire.Refuse(handoff, Reason.CANCELLED)
    assert producer.released == []  # it never held blocks for anybody


def test_a_request_that_is_dropped_in_the_queue_tells_who_wants_it(producer: Producer) -> None:
    handoff = new_handoff_id()
    producer.answering.want(handoff, SCHEDULER)
    producer.queued(handoff=handoff)
    refusal = wire.Refuse(handoff, Reason.PRODUCER_ENDED)
    assert producer.table.drop(handoff) == [(SCHEDULER, refusal)]
    assert len(producer.table) == 0


def test_endings_are_forgotten_in_the_end(producer: Producer) -> None:
    first = producer.sealed()
    producer.answering.cancel(first)
    for _ in range(4096):
        producer.answering.cancel(producer.sealed())
    refusal = wire.Refuse(first, Reason.UNKNOWN_HANDOFF)
    assert producer.subscribe(first, 0, RANK_0) == refusal
    assert len(producer.table) == 0


# The scheduler holds them from the seal on, until it hears of their release.
def test_a_handoff_that_was_cancelled_before_its_seal_releases_its_blocks(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.answering.cancel(handoff)
    producer.table.seal(handoff, "r", 90, BLOCKS)
    assert producer.released == [("r", ExportState.CANCELLED)]


def test_a_handoff_that_is_cancelled_while_it_is_produced_is_abandoned_once(
    producer: Producer,
) -> None:
    handoff = producer.wanted()
    producer.answering.cancel(handoff)
    producer.answering.cancel(handoff)
    producer.expire()
    assert producer.abandoned == [("r", ExportState.CANCELLED)]
    assert producer.released == []


def test_a_handoff_that_was_cancelled_before_its_request_came_is_abandoned_when_it_comes(
    producer: Producer,
) -> None:
    handoff = new_handoff_id()
    producer.answering.want(handoff, SCHEDULER)
    producer.answering.cancel(handoff)
    assert producer.abandoned == []
    producer.queued("late", handoff)
    assert producer.abandoned == [("late", ExportState.CANCELLED)]
    assert producer.table.open(handoff) == []
    assert producer.table.drop(handoff) == []
    assert len(producer.table) == 0
    assert producer.table.tick() is None


def test_a_handoff_that_was_cancelled_before_its_seal_is_refused_to_everybody(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.subscribe(handoff, 0, RANK_0)
    producer.answering.cancel(handoff)
    refusal = wire.Refuse(handoff, Reason.CANCELLED)
    assert producer.released == []  # its request still runs
    assert producer.answering.want(handoff, SCHEDULER) == refusal
    assert producer.subscribe(handoff, 1, RANK_1) == refusal
    assert producer.commit(handoff) == refusal
    assert producer.compute(handoff, 40) == []
    producer.table.seal(handoff, "r", 90, BLOCKS)
    assert producer.commit(handoff) == refusal
    assert producer.subscribe(handoff, 0, RANK_0) == refusal
    assert len(producer.table) == 0


def test_a_request_that_ends_without_kv_after_its_cancel_leaves_nothing(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.answering.cancel(handoff)
    producer.table.drop(handoff)
    assert len(producer.table) == 0
    assert producer.released == []
