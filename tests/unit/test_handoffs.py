from __future__ import annotations

import pytest

from tests.fakes import FakeClock
from vllm_pd_plugin import wire
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.handoffs import (
    ConsumerTable,
    ProducerState,
    ProducerTable,
    ReturnAddress,
    Source,
)
from vllm_pd_plugin.ids import HandoffId, Incarnation, new_handoff_id, new_incarnation

LEASE_S = 30.0
BLOCKS = ([1, 2, 3], [4])
SEAL_BLOCKS = ((1, 2, 3), (4,))
RANK_0: ReturnAddress = (b"rank-0", Incarnation("consumer"))
RANK_1: ReturnAddress = (b"rank-1", Incarnation("consumer"))


class Producer:
    """A producer's table, and what it has released."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.released: list[tuple[str, ProducerState]] = []
        self.table = ProducerTable(LEASE_S, lambda *r: self.released.append(r), self.clock)

    def open(self, request_id: str = "r") -> HandoffId:
        handoff = new_handoff_id()
        self.table.open(handoff, request_id, 100, b"digest")
        return handoff

    def sealed(self, request_id: str = "r") -> HandoffId:
        handoff = self.open(request_id)
        self.table.seal(handoff, 90, BLOCKS)
        return handoff


@pytest.fixture
def producer() -> Producer:
    return Producer()


# --- the producer's table --------------------------------------------------------------------


def test_a_handoff_is_offered_while_it_is_being_produced(producer: Producer) -> None:
    handoff = producer.open()
    assert producer.table.want(handoff) == wire.Offer(handoff, 100, b"digest")
    assert len(producer.table) == 1


def test_a_sealed_handoff_is_offered_with_its_final_size(producer: Producer) -> None:
    handoff = producer.sealed()
    assert producer.table.want(handoff) == wire.Offer(handoff, 90, b"digest")


def test_a_handoff_that_nobody_opened_is_refused_everywhere(producer: Producer) -> None:
    handoff = new_handoff_id()
    refusal = wire.Refuse(handoff, Reason.UNKNOWN_HANDOFF)
    assert producer.table.want(handoff) == refusal
    assert producer.table.subscribe(handoff, RANK_0) == refusal
    assert producer.table.commit(handoff, 0, 1) == refusal
    assert producer.table.heartbeat([handoff]) == wire.Alive({handoff: Reason.UNKNOWN_HANDOFF})
    producer.table.cancel(handoff)
    assert producer.table.drop(handoff) == []
    assert producer.released == []


def test_who_subscribes_early_is_told_at_the_seal(producer: Producer) -> None:
    handoff = producer.open()
    assert producer.table.subscribe(handoff, RANK_0) is None
    assert producer.table.subscribe(handoff, RANK_1) is None
    seal, waiting = producer.table.seal(handoff, 90, BLOCKS)
    assert seal == wire.Seal(handoff, 90, SEAL_BLOCKS)
    assert waiting == [RANK_0, RANK_1]


def test_who_subscribes_late_is_told_at_once(producer: Producer) -> None:
    handoff = producer.sealed()
    assert producer.table.subscribe(handoff, RANK_0) == wire.Seal(handoff, 90, SEAL_BLOCKS)


def test_a_commit_releases_the_blocks(producer: Producer) -> None:
    handoff = producer.sealed("mine")
    assert producer.table.commit(handoff, 0, 1) == wire.Committed(handoff)
    assert producer.released == [("mine", ProducerState.COMMITTED)]
    assert len(producer.table) == 0


def test_a_commit_needs_all_ranks(producer: Producer) -> None:
    handoff = producer.sealed()
    assert producer.table.commit(handoff, 1, 2) == wire.Committed(handoff)
    assert producer.released == []
    assert producer.table.commit(handoff, 0, 2) == wire.Committed(handoff)
    assert producer.released == [("r", ProducerState.COMMITTED)]


def test_one_rank_that_commits_twice_counts_once(producer: Producer) -> None:
    handoff = producer.sealed()
    producer.table.commit(handoff, 1, 2)
    assert producer.table.commit(handoff, 1, 2) == wire.Committed(handoff)
    assert producer.released == []


def test_a_commit_before_the_seal_is_refused_and_changes_nothing(producer: Producer) -> None:
    handoff = producer.open()
    refusal = wire.Refuse(handoff, Reason.MISSING_BLOCKS)
    assert producer.table.commit(handoff, 0, 1) == refusal
    assert isinstance(producer.table.want(handoff), wire.Offer)


def test_a_cancel_releases_the_blocks(producer: Producer) -> None:
    handoff = producer.sealed()
    producer.table.cancel(handoff)
    assert producer.released == [("r", ProducerState.CANCELLED)]


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
    assert producer.table.commit(handoff, 0, 1) == refusal
    assert producer.released == [("r", ProducerState.EXPIRED)]


def test_a_commit_of_the_second_rank_after_the_lease_is_refused(producer: Producer) -> None:
    handoff = producer.sealed()
    producer.table.commit(handoff, 0, 2)
    producer.clock.advance(LEASE_S)
    refusal = wire.Refuse(handoff, Reason.LEASE_EXPIRED)
    assert producer.table.commit(handoff, 1, 2) == refusal


def end(producer: Producer, handoff: HandoffId, state: ProducerState) -> None:
    if state is ProducerState.COMMITTED:
        producer.table.commit(handoff, 0, 1)
    elif state is ProducerState.CANCELLED:
        producer.table.cancel(handoff)
    else:
        producer.clock.advance(LEASE_S)
        producer.table.tick()


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
    assert producer.table.want(handoff) == wire.Refuse(handoff, reason)
    assert producer.table.subscribe(handoff, RANK_0) == wire.Refuse(handoff, reason)
    assert producer.table.commit(handoff, 0, 1) == wire.Refuse(handoff, reason)


@pytest.mark.parametrize("first", [state for state, _ in ENDINGS])
@pytest.mark.parametrize("second", [state for state, _ in ENDINGS])
def test_blocks_are_released_exactly_once(
    producer: Producer, first: ProducerState, second: ProducerState
) -> None:
    handoff = producer.sealed()
    end(producer, handoff, first)
    end(producer, handoff, second)
    producer.table.drop(handoff)
    producer.table.want(handoff)
    assert producer.released == [("r", first)]


def test_heartbeat_renews_a_lease(producer: Producer) -> None:
    handoff = producer.sealed()
    for _ in range(10):
        producer.clock.advance(LEASE_S - 1)
        assert producer.table.heartbeat([handoff]) == wire.Alive({})
    producer.table.tick()
    assert producer.released == []
    assert producer.table.commit(handoff, 0, 1) == wire.Committed(handoff)


@pytest.mark.parametrize("ask", ["want", "subscribe"])
def test_every_question_renews_a_lease(producer: Producer, ask: str) -> None:
    handoff = producer.sealed()
    producer.clock.advance(LEASE_S - 1)
    if ask == "want":
        producer.table.want(handoff)
    else:
        producer.table.subscribe(handoff, RANK_0)
    producer.clock.advance(LEASE_S - 1)
    producer.table.tick()
    assert producer.released == []


def test_heartbeat_names_what_it_cannot_renew(producer: Producer) -> None:
    held, cancelled, committed, expired = (producer.sealed(str(i)) for i in range(4))
    producer.table.cancel(cancelled)
    producer.table.commit(committed, 0, 1)
    producer.clock.advance(LEASE_S - 1)
    producer.table.heartbeat([held])
    producer.clock.advance(1)
    alive = producer.table.heartbeat([held, cancelled, committed, expired])
    lost = {cancelled: Reason.CANCELLED, expired: Reason.LEASE_EXPIRED}
    assert alive == wire.Alive(lost)
    assert ("3", ProducerState.EXPIRED) in producer.released


def test_heartbeat_of_one_handoff_does_not_renew_another(producer: Producer) -> None:
    held, other = producer.sealed("held"), producer.sealed("other")
    producer.clock.advance(LEASE_S - 1)
    producer.table.heartbeat([held])
    producer.clock.advance(1)
    producer.table.tick()
    assert producer.released == [("other", ProducerState.EXPIRED)]
    assert producer.table.commit(other, 0, 1) == wire.Refuse(other, Reason.LEASE_EXPIRED)


def test_a_handoff_that_is_being_produced_never_expires(producer: Producer) -> None:
    handoff = producer.open()
    producer.clock.advance(100 * LEASE_S)
    assert producer.table.tick() is None
    assert isinstance(producer.table.want(handoff), wire.Offer)


def test_the_lease_starts_afresh_at_the_seal(producer: Producer) -> None:
    handoff = producer.open()
    producer.clock.advance(100 * LEASE_S)
    producer.table.seal(handoff, 90, BLOCKS)
    assert producer.table.tick() == producer.clock() + LEASE_S
    assert producer.released == []


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
    producer.table.heartbeat([handoff])
    producer.clock.advance(1000 + LEASE_S - 1)
    producer.table.tick()
    assert producer.released == []


def test_a_dropped_request_tells_who_has_been_waiting(producer: Producer) -> None:
    handoff = producer.open()
    producer.table.subscribe(handoff, RANK_0)
    assert producer.table.drop(handoff) == [RANK_0]
    assert producer.table.want(handoff) == wire.Refuse(handoff, Reason.CANCELLED)
    assert producer.released == []  # it never held blocks for anybody


def test_endings_are_forgotten_in_the_end(producer: Producer) -> None:
    first = producer.sealed()
    producer.table.cancel(first)
    for _ in range(4096):
        producer.table.cancel(producer.sealed())
    assert producer.table.want(first) == wire.Refuse(first, Reason.UNKNOWN_HANDOFF)
    assert len(producer.table) == 0


# The scheduler holds them from the seal on, until it hears of their release.
def test_a_handoff_that_was_cancelled_before_its_seal_releases_its_blocks(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.table.cancel(handoff)
    producer.table.seal(handoff, 90, BLOCKS)
    assert producer.released == [("r", ProducerState.CANCELLED)]


def test_a_handoff_that_was_cancelled_before_its_seal_is_refused_to_everybody(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.table.subscribe(handoff, RANK_0)
    producer.table.cancel(handoff)
    refusal = wire.Refuse(handoff, Reason.CANCELLED)
    assert producer.released == []  # its request still runs
    assert producer.table.want(handoff) == refusal
    assert producer.table.subscribe(handoff, RANK_1) == refusal
    assert producer.table.seal(handoff, 90, BLOCKS) == (refusal, [RANK_0])
    assert producer.table.commit(handoff, 0, 1) == refusal
    assert len(producer.table) == 0


def test_a_request_that_ends_without_kv_after_its_cancel_leaves_nothing(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.table.cancel(handoff)
    producer.table.drop(handoff)
    assert len(producer.table) == 0
    assert producer.released == []


# --- the consumer's table --------------------------------------------------------------------


LATER = 1e9


def source(port: int = 7000, incarnation: Incarnation | None = None) -> Source:
    return Source(new_handoff_id(), ("127.0.0.1", port), incarnation or new_incarnation())


def test_an_offer_reaches_the_request_that_waits_for_it() -> None:
    table, wanted_from = ConsumerTable(), source()
    wanted = table.want("r", wanted_from, LATER)
    assert wanted is not None
    assert not wanted.offered
    assert table.offered(wanted_from.handoff_id, wanted_from.incarnation) is wanted
    assert wanted.offered


def test_an_offer_counts_once() -> None:
    table, wanted_from = ConsumerTable(), source()
    table.want("r", wanted_from, LATER)
    table.offered(wanted_from.handoff_id, wanted_from.incarnation)
    assert table.offered(wanted_from.handoff_id, wanted_from.incarnation) is None


def test_an_offer_of_another_incarnation_is_ignored() -> None:
    table, wanted_from = ConsumerTable(), source()
    wanted = table.want("r", wanted_from, LATER)
    assert table.offered(wanted_from.handoff_id, new_incarnation()) is None
    assert wanted is not None
    assert not wanted.offered


def test_an_offer_that_nobody_waits_for_is_ignored() -> None:
    table = ConsumerTable()
    assert table.offered(new_handoff_id(), new_incarnation()) is None


def test_two_requests_cannot_want_the_same_handoff() -> None:
    table, wanted_from = ConsumerTable(), source()
    wanted = table.want("first", wanted_from, LATER)
    assert table.want("second", wanted_from, LATER) is None
    assert table.close("second") is None
    assert table.get(wanted_from.handoff_id) is wanted


def test_a_closed_handoff_may_be_wanted_again() -> None:
    table, wanted_from = ConsumerTable(), source()
    table.want("first", wanted_from, LATER)
    table.close("first")
    assert table.want("second", wanted_from, LATER) is not None


def test_a_handoff_is_closed_once() -> None:
    table, wanted_from = ConsumerTable(), source()
    wanted = table.want("r", wanted_from, LATER)
    assert len(table) == 1
    assert table.close("r") is wanted
    assert table.close("r") is None
    assert table.get(wanted_from.handoff_id) is None
    assert table.offered(wanted_from.handoff_id, wanted_from.incarnation) is None
    assert len(table) == 0


def test_what_is_wanted_is_found_by_peer() -> None:
    table = ConsumerTable()
    a, b, c = (
        table.want(name, source(port), LATER) for name, port in zip("abc", (1, 2, 1), strict=True)
    )
    assert table.at(("127.0.0.1", 1)) == [a, c]
    assert table.at(("127.0.0.1", 2)) == [b]
    assert table.at(("127.0.0.1", 3)) == []
    assert table.addresses() == {("127.0.0.1", 1), ("127.0.0.1", 2)}
    table.close("b")
    assert table.addresses() == {("127.0.0.1", 1)}


def test_a_request_without_blocks_is_overdue_at_its_deadline() -> None:
    table = ConsumerTable()
    early, late = table.want("early", source(), 10.0), table.want("late", source(), 20.0)
    assert table.next_deadline() == 10.0
    assert table.overdue(9.999) == []
    assert table.overdue(10.0) == [early]
    assert table.overdue(20.0) == [early, late]
    table.close("early")
    assert table.next_deadline() == 20.0


def test_a_request_that_has_its_blocks_is_never_overdue() -> None:
    table = ConsumerTable()
    table.want("r", source(), 10.0)
    table.allocated("r")
    assert table.next_deadline() is None
    assert table.overdue(1e9) == []


def test_blocks_for_a_request_that_is_over_change_nothing() -> None:
    table = ConsumerTable()
    table.allocated("nobody")
    assert len(table) == 0
