"""The producer's table: who wants a handoff is offered it."""

from __future__ import annotations

from tests.fakes.producer import BLOCKS, LEASE_S, RANK_0, SCHEDULER, TOKENS, Producer
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import new_handoff_id
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.export_states import ExportState


def test_a_handoff_is_offered_while_it_is_being_produced(producer: Producer) -> None:
    handoff = producer.open()
    assert producer.answering.want(handoff, SCHEDULER) == wire.Offer(handoff, TOKENS, b"digest")
    assert len(producer.table) == 1


def test_a_sealed_handoff_is_offered_with_its_final_size(producer: Producer) -> None:
    handoff = producer.open()
    producer.table.seal(handoff, "r", 90, BLOCKS)
    assert producer.answering.want(handoff, SCHEDULER) == wire.Offer(handoff, 90, b"digest")


def test_a_handoff_whose_request_is_queued_is_offered_when_it_is_scheduled(
    producer: Producer,
) -> None:
    handoff = producer.queued()
    assert producer.answering.want(handoff, SCHEDULER) is None
    offer = wire.Offer(handoff, TOKENS, b"digest")
    assert producer.table.open(handoff) == [(SCHEDULER, offer)]


def test_a_want_that_comes_before_the_request_is_answered_when_it_is_scheduled(
    producer: Producer,
) -> None:
    handoff = new_handoff_id()
    assert producer.answering.want(handoff, SCHEDULER) is None
    assert len(producer.table) == 0
    producer.queued(handoff=handoff)
    offer = wire.Offer(handoff, TOKENS, b"digest")
    assert producer.table.open(handoff) == [(SCHEDULER, offer)]


def test_a_want_that_comes_twice_is_answered_once_at_the_start(producer: Producer) -> None:
    handoff = new_handoff_id()
    producer.answering.want(handoff, SCHEDULER)
    producer.answering.want(handoff, SCHEDULER)
    producer.queued(handoff=handoff)
    producer.answering.want(handoff, SCHEDULER)
    assert len(producer.table.open(handoff)) == 1


def test_a_want_is_remembered_for_one_lease_and_then_lost(producer: Producer) -> None:
    handoff = new_handoff_id()
    producer.answering.want(handoff, SCHEDULER)
    assert producer.table.tick() == producer.clock() + LEASE_S
    producer.clock.advance(LEASE_S - 0.001)
    assert producer.heartbeat([handoff]) == wire.Alive({})
    producer.clock.advance(0.001)
    assert producer.table.tick() is None
    lost = {handoff: Reason.UNKNOWN_HANDOFF}
    assert producer.heartbeat([handoff]) == wire.Alive(lost)


def test_heartbeats_do_not_make_the_table_wait_longer_for_a_request(producer: Producer) -> None:
    handoff = new_handoff_id()
    producer.answering.want(handoff, SCHEDULER)
    for _ in range(6):
        producer.clock.advance(LEASE_S / 6)
        alive = producer.heartbeat([handoff])
    assert alive == wire.Alive({handoff: Reason.UNKNOWN_HANDOFF})


# Were its consumer's next heartbeat told that all is well, it would wait for ever.
def test_a_request_that_comes_after_its_want_was_forgotten_is_lost(
    producer: Producer,
) -> None:
    handoff = new_handoff_id()
    producer.answering.want(handoff, SCHEDULER)
    producer.expire()
    producer.queued(handoff=handoff)
    assert producer.table.open(handoff) == []
    assert producer.heartbeat([handoff]) == wire.Alive({handoff: Reason.UNKNOWN_HANDOFF})


def test_wants_for_requests_that_never_come_are_bounded(producer: Producer) -> None:
    for _ in range(10_000):
        assert producer.answering.want(new_handoff_id(), SCHEDULER) is None
    one_more = new_handoff_id()
    refusal = wire.Refuse(one_more, Reason.UNKNOWN_HANDOFF)
    assert producer.answering.want(one_more, SCHEDULER) == refusal
    producer.expire()
    assert producer.answering.want(one_more, SCHEDULER) is None


def test_a_handoff_that_nobody_has_heard_of_is_refused_to_all_that_do_not_merely_want_it(
    producer: Producer,
) -> None:
    handoff = new_handoff_id()
    refusal = wire.Refuse(handoff, Reason.UNKNOWN_HANDOFF)
    assert producer.subscribe(handoff, 0, RANK_0) == refusal
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
    producer.table.seal(handoff, "second", TOKENS, BLOCKS)
    producer.expire()
    assert sorted(request_id for request_id, _ in producer.released) == ["first", "second"]


def test_an_id_that_is_used_again_while_its_request_runs_releases_both(producer: Producer) -> None:
    handoff = producer.open("first")
    producer.queued("second", handoff)
    assert producer.table.seal(handoff, "first", TOKENS, BLOCKS) == []
    assert producer.table.seal(handoff, "second", TOKENS, BLOCKS) == []
    assert sorted(request_id for request_id, _ in producer.released) == ["first", "second"]
    assert len(producer.table) == 0


def test_what_is_sealed_after_it_was_dropped_is_released(producer: Producer) -> None:
    handoff = producer.open()
    producer.table.drop(handoff)
    assert producer.table.seal(handoff, "r", TOKENS, BLOCKS) == []
    assert producer.released == [("r", ExportState.CANCELLED)]


def test_a_consumer_that_has_reconnected_is_offered_anew_what_it_may_have_missed(
    producer: Producer,
) -> None:
    handoff = producer.wanted()
    offer = wire.Offer(handoff, TOKENS, b"digest")
    alive = wire.Alive({})
    again = (b"scheduler after the reconnect", SCHEDULER[1])
    assert producer.answering.heartbeat([handoff], again) == [(again, offer), (again, alive)]
    assert producer.answering.heartbeat([handoff], again) == [(again, alive)]


def test_a_consumer_that_reconnects_before_its_request_has_come_is_offered_it_all_the_same(
    producer: Producer,
) -> None:
    handoff = new_handoff_id()
    producer.answering.want(handoff, SCHEDULER)
    again = (b"scheduler after the reconnect", SCHEDULER[1])
    producer.answering.heartbeat([handoff], again)
    producer.queued(handoff=handoff)
    assert producer.table.open(handoff) == [(again, wire.Offer(handoff, TOKENS, b"digest"))]
