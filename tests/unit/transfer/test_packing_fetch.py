"""Fetches of packed pieces: they arrive whole, and nothing stays in either staging memory."""

from __future__ import annotations

import pytest

from tests.fakes.clock import rests
from tests.fakes.packing import GIVEN_BACK, PackingCluster
from tests.fakes.streaming import ELSEWHERE, HERE, LEASE_S, THERE, TIMEOUTS, TOKENS
from vllm_pd_plugin.errors import Reason

STAGES = range(27)
"""A fetch in two stretches takes 25 messages and steps."""

HELD = pytest.mark.parametrize("are_held", [False, True], ids=["reads end", "reads are held"])


@pytest.fixture
def cluster() -> PackingCluster:
    return PackingCluster()


# --- when nothing goes wrong -----------------------------------------------------------------


def test_a_streamed_handoff_arrives_whole(cluster: PackingCluster) -> None:
    cluster.start_and_compute()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()
    counts = cluster.consumer.result("c").counts
    assert (counts.stretches, counts.packed, counts.descriptors) == (2, 2, 2)
    assert counts.wire_bytes == counts.kv_bytes == 2 * 4 * 32


def test_one_descriptor_moves_what_lies_scattered(cluster: PackingCluster) -> None:
    """``HERE`` are no neighbours: as it lies it would take one for each block and layer."""
    cluster.start()
    cluster.compute(range(TOKENS))
    cluster.settle()
    assert cluster.consumer.result("c").counts.descriptors == 1
    assert cluster.has_arrived()


def test_a_piece_is_given_back_as_soon_as_it_was_read(cluster: PackingCluster) -> None:
    cluster.start()
    cluster.settle()
    cluster.compute(range(8))
    cluster.settle()
    assert cluster.has_arrived(8)
    assert not cluster.consumer.is_reported("c")
    assert cluster.is_empty()


def test_nothing_stays_after_success(cluster: PackingCluster) -> None:
    cluster.start_and_compute()
    cluster.close()
    cluster.producer.seal("p", THERE)
    cluster.settle()
    assert cluster.producer.released() == ["p"]
    for engine in (cluster.producer, cluster.consumer):
        assert set(engine.open_handoffs().values()) == {0}
        assert rests(engine.plane.turn())


def test_only_the_missing_suffix_is_packed(cluster: PackingCluster) -> None:
    cluster.start(first_token=8)
    cluster.compute(range(TOKENS))
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.result("c").counts.wire_bytes == 2 * 2 * 32
    assert not cluster.consumer.kv_in(0, HERE[:2]).any()


def test_a_handoff_that_is_sealed_before_it_is_fetched_is_packed(cluster: PackingCluster) -> None:
    source = cluster.producer.begin("p", TOKENS)
    cluster.compute(range(TOKENS))
    cluster.producer.seal("p", THERE)
    cluster.settle()
    cluster.consumer.fetch("c", source, HERE, TOKENS)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()
    assert cluster.is_empty()


def test_the_thread_sleeps_while_the_producer_packs(cluster: PackingCluster) -> None:
    cluster.start()
    cluster.settle()
    cluster.compute(range(TOKENS))
    cluster.deliver_until("pack")
    wait = cluster.consumer.plane.turn()
    assert wait is not None
    assert wait > 0.1


def test_the_control_traffic_of_a_packed_stretch_is_640_bytes(cluster: PackingCluster) -> None:
    cluster.start()
    cluster.settle()
    for end in range(4, TOKENS, 4):
        before = cluster.consumer.plane.control_bytes
        cluster.compute(range(end - 4, end))
        cluster.settle()
        assert 0 < cluster.consumer.plane.control_bytes - before <= 128 + 512


# --- what may happen at any time -------------------------------------------------------------


def check_untouched(cluster: PackingCluster) -> None:
    """What the consumer was told is over writes nothing any more, and holds nothing."""
    decoded = cluster.consumer.coder.num_decoded
    cluster.consumer.fill(HERE, GIVEN_BACK)
    cluster.finish()
    cluster.pass_time(3)
    assert cluster.consumer.holds(HERE, GIVEN_BACK)
    assert cluster.consumer.coder.num_decoded == decoded


@HELD
@pytest.mark.parametrize("stage", STAGES)
def test_nothing_stays_of_a_fetch_that_is_cancelled(
    cluster: PackingCluster, stage: int, are_held: bool
) -> None:
    cluster.consumer.transport.holds_reads = are_held
    cluster.start()
    cluster.go_on(stage)
    if cluster.consumer.is_reported("c"):
        assert cluster.consumer.outcome("c") is None
        return
    decoded = cluster.consumer.coder.num_decoded
    cluster.abort()
    cluster.settle()
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.ABORTED
    assert cluster.consumer.coder.num_decoded == decoded
    check_untouched(cluster)
    assert cluster.is_empty()
    for engine in (cluster.producer, cluster.consumer):
        assert set(engine.open_handoffs().values()) == {0}


def test_a_read_that_ends_after_its_fetch_was_cancelled_is_not_unpacked(
    cluster: PackingCluster,
) -> None:
    cluster.consumer.transport.holds_reads = True
    cluster.start()
    cluster.settle()
    cluster.compute(range(TOKENS))
    cluster.settle()
    assert len(cluster.consumer.transport.unfinished) == 1
    cluster.consumer.plane.cancel("c", Reason.ABORTED)
    cluster.settle()
    assert not cluster.consumer.is_reported("c")
    assert cluster.consumer.incoming.taken_bytes > 0
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.ABORTED
    assert cluster.consumer.coder.num_decoded == 0
    assert not cluster.consumer.kv_in(0, HERE).any()
    assert cluster.is_empty()


def test_a_read_that_does_not_end_after_a_cancel_is_cut_off(cluster: PackingCluster) -> None:
    cluster.consumer.transport.holds_reads = True
    cluster.start()
    cluster.settle()
    cluster.compute(range(TOKENS))
    cluster.settle()
    cluster.abort()
    cluster.pass_time(TIMEOUTS.drain_s + 1)
    assert cluster.consumer.outcome("c") is Reason.ABORTED
    assert cluster.consumer.transport.unfinished == []
    assert cluster.is_empty()


@HELD
@pytest.mark.parametrize("stage", STAGES)
def test_nothing_stays_at_the_consumer_of_a_producer_that_died(
    cluster: PackingCluster, stage: int, are_held: bool
) -> None:
    cluster.consumer.transport.holds_reads = are_held
    cluster.start()
    cluster.go_on(stage)
    cluster.restart_producer()
    cluster.pass_time(8)
    if not cluster.consumer.is_reported("c"):  # a read that is held says nothing
        assert cluster.consumer.lost() == {"c": Reason.PEER_RESTARTED}
        cluster.consumer.plane.cancel("c", Reason.PEER_RESTARTED)
        cluster.pass_time(TIMEOUTS.drain_s + 1)
    cluster.close()
    assert cluster.consumer.outcome("c") is not None or cluster.has_arrived()
    check_untouched(cluster)
    assert cluster.is_empty()
    assert set(cluster.consumer.open_handoffs().values()) == {0}


@HELD
@pytest.mark.parametrize("stage", STAGES)
def test_after_a_preemption_the_new_blocks_arrive_and_nothing_stays(
    cluster: PackingCluster, stage: int, are_held: bool
) -> None:
    cluster.consumer.transport.holds_reads = are_held
    cluster.start()
    cluster.go_on(stage)
    is_committed = "commit" in cluster.network.delivered
    cluster.producer.preempt("p")
    cluster.overwrite()
    cluster.settle()
    cluster.finish_reads_too_late()
    cluster.settle()
    assert cluster.consumer.is_reported("c") == is_committed
    cluster.compute(range(TOKENS), blocks=ELSEWHERE)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()
    cluster.close()
    cluster.producer.seal("p", ELSEWHERE)
    cluster.settle()
    assert cluster.is_empty()


@pytest.mark.parametrize("stage", STAGES)
def test_a_producer_s_request_that_ends_takes_its_pieces_with_it(
    cluster: PackingCluster, stage: int
) -> None:
    cluster.start()
    cluster.go_on(stage)
    is_committed = "commit" in cluster.network.delivered
    is_subscribed = "subscribe" in cluster.network.delivered
    cluster.producer.drop("p")
    cluster.overwrite()
    cluster.settle()
    reason = Reason.PRODUCER_ENDED if is_subscribed else Reason.CANCELLED
    assert cluster.consumer.outcome("c") is (None if is_committed else reason)
    assert cluster.has_arrived() or not is_committed
    cluster.close()
    cluster.settle()
    assert cluster.is_empty()
    assert set(cluster.producer.open_handoffs().values()) == {0}


@HELD
def test_a_lease_that_expires_takes_its_pieces_with_it(
    cluster: PackingCluster, are_held: bool
) -> None:
    """The consumer is silent for so long that the producer gives up."""
    cluster.consumer.transport.holds_reads = are_held
    cluster.start()
    cluster.settle()
    cluster.compute(range(TOKENS))
    cluster.producer.seal("p", THERE)
    cluster.deliver_until("packed")
    assert cluster.producer.outgoing.taken_bytes > 0
    cluster.clock.advance(LEASE_S)
    cluster.producer.turn()
    cluster.network.deliver_kind("unstage")
    assert cluster.producer.outgoing.taken_bytes == 0
    assert cluster.producer.released() == ["p"]
    cluster.overwrite()
    cluster.producer.coder.outgoing[:] = 0xEE
    cluster.network.deliver_kind("packed")
    cluster.settle()
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.LEASE_EXPIRED
    cluster.close()
    cluster.settle()
    assert cluster.is_empty()
