"""The producer's table: how long a handoff is held for a consumer."""

from __future__ import annotations

import pytest

from tests.fakes.producer import BLOCKS, LEASE_S, RANK_0, SCHEDULER, TOKENS, Producer, granted
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.export_states import ExportState


def test_a_silent_consumer_s_lease_expires(producer: Producer) -> None:
    producer.sealed()
    producer.clock.advance(LEASE_S - 0.001)
    producer.table.tick()
    assert producer.released == []
    producer.clock.advance(0.001)
    producer.table.tick()
    assert producer.released == [("r", ExportState.EXPIRED)]


def test_a_commit_that_comes_after_the_lease_is_refused_though_nobody_ticked(
    producer: Producer,
) -> None:
    handoff = producer.sealed()
    producer.clock.advance(LEASE_S)
    refusal = wire.Refuse(handoff, Reason.LEASE_EXPIRED)
    assert producer.commit(handoff) == refusal
    assert producer.released == [("r", ExportState.EXPIRED)]


def test_a_commit_of_the_second_rank_after_the_lease_is_refused() -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.sealed()
    producer.commit(handoff, 0)
    producer.clock.advance(LEASE_S)
    refusal = wire.Refuse(handoff, Reason.LEASE_EXPIRED)
    assert producer.commit(handoff, 1) == refusal


def test_heartbeat_renews_a_lease(producer: Producer) -> None:
    handoff = producer.sealed()
    producer.answering.want(handoff, SCHEDULER)
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
    producer.answering.want(handoff, SCHEDULER)
    if stage != "queued":
        producer.table.open(handoff)
    if stage == "sealed":
        producer.table.seal(handoff, "r", TOKENS, BLOCKS)
    producer.clock.advance(LEASE_S - 1)
    if ask == "want":
        producer.answering.want(handoff, SCHEDULER)
    elif ask == "subscribe":
        producer.subscribe(handoff, 0, RANK_0)
    else:
        producer.heartbeat([handoff])
    producer.clock.advance(LEASE_S - 1)
    producer.table.tick()
    assert producer.released == []
    assert producer.abandoned == []


def test_heartbeat_names_what_it_cannot_renew(producer: Producer) -> None:
    held, cancelled, committed, expired = (producer.sealed(str(i)) for i in range(4))
    producer.answering.cancel(cancelled)
    producer.commit(committed)
    producer.clock.advance(LEASE_S - 1)
    producer.answering.want(held, SCHEDULER)
    producer.heartbeat([held])
    producer.clock.advance(1)
    alive = producer.heartbeat([held, cancelled, committed, expired])
    lost = {cancelled: Reason.CANCELLED, expired: Reason.LEASE_EXPIRED}
    assert alive == wire.Alive(lost)
    assert ("3", ExportState.EXPIRED) in producer.released


def test_heartbeat_names_what_was_given_up_before_the_seal(producer: Producer) -> None:
    cancelled, committed, dropped = (producer.wanted(str(i)) for i in range(3))
    producer.compute(committed, TOKENS)
    producer.answering.cancel(cancelled)
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
    assert producer.released == [("other", ExportState.EXPIRED)]
    assert producer.commit(other) == wire.Refuse(other, Reason.LEASE_EXPIRED)


def test_a_handoff_that_is_being_produced_for_nobody_yet_never_expires(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.clock.advance(100 * LEASE_S)
    assert producer.table.tick() is None
    assert isinstance(producer.answering.want(handoff, SCHEDULER), wire.Offer)


@pytest.mark.parametrize("stage", ["queued", "producing"])
def test_a_consumer_that_has_asked_and_falls_silent_ends_what_is_being_produced(
    producer: Producer, stage: str
) -> None:
    handoff = producer.queued()
    producer.answering.want(handoff, SCHEDULER)
    if stage == "producing":
        producer.table.open(handoff)
    assert producer.table.tick() == producer.clock() + LEASE_S
    producer.expire()
    assert producer.abandoned == [("r", ExportState.EXPIRED)]
    assert producer.released == []
    assert producer.table.tick() is None
    assert producer.answering.want(handoff, SCHEDULER) == wire.Refuse(handoff, Reason.LEASE_EXPIRED)
    assert producer.table.drop(handoff) == []
    assert len(producer.table) == 0
    assert producer.abandoned == [("r", ExportState.EXPIRED)]


def test_the_lease_starts_afresh_at_the_seal(producer: Producer) -> None:
    handoff = producer.open()
    producer.clock.advance(100 * LEASE_S)
    producer.table.seal(handoff, "r", 90, BLOCKS)
    assert producer.table.tick() == producer.clock() + LEASE_S
    assert producer.released == []


def test_the_lease_starts_afresh_with_the_offer(producer: Producer) -> None:
    handoff = producer.queued()
    producer.answering.want(handoff, SCHEDULER)
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
