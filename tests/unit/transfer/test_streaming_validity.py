"""Only bytes that the producer has vouched for are ever used."""

from __future__ import annotations

import pytest

from tests.fakes.engines import PEER_TIMEOUT_S
from tests.fakes.streaming import ELSEWHERE, LEASE_S, THERE, TOKENS, VOUCH_S, StreamingCluster
from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import OTHER_KV, PeerError, Reason
from vllm_pd_plugin.protocol import framing, wire


@pytest.fixture
def cluster() -> StreamingCluster:
    return StreamingCluster()


# --- what is kept when it fails --------------------------------------------------------------


def vouched(cluster: StreamingCluster) -> None:
    """A fetch of which the first half has arrived, and the producer has vouched for it."""
    cluster.start()
    cluster.compute(range(8))
    cluster.settle()
    assert "commit" not in cluster.network.delivered
    cluster.clock.advance(VOUCH_S)
    cluster.settle()
    assert cluster.network.delivered.count("commit") == 1
    assert cluster.network.delivered.count("committed") == 1


def test_what_was_vouched_for_is_kept_when_the_producer_dies(cluster: StreamingCluster) -> None:
    vouched(cluster)
    cluster.compute(range(8, 12))
    cluster.settle()
    assert cluster.has_arrived(12)  # but nobody has said that it is valid
    cluster.producer.kill()
    cluster.clock.advance(VOUCH_S)
    cluster.settle()
    cluster.clock.advance(PEER_TIMEOUT_S)
    cluster.settle()
    result = cluster.consumer.result("c")
    assert (result.reason, result.valid_tokens) == (Reason.PEER_UNREACHABLE, 8)
    assert cluster.has_arrived(8)


@pytest.mark.parametrize("reason", sorted(OTHER_KV))
def test_nothing_is_kept_where_it_may_be_another_model_s(
    cluster: StreamingCluster, reason: Reason
) -> None:
    vouched(cluster)
    (fetch,) = cluster.consumer.plane._fetches.values()
    fetch.fail(reason)
    cluster.settle()
    result = cluster.consumer.result("c")
    assert (result.reason, result.valid_tokens) == (reason, 0)


def test_what_is_kept_of_a_connection_that_was_closed_is_told_with_its_codec(
    cluster: StreamingCluster,
) -> None:
    """Another fetch's read has failed, and the producer dies before this one has connected again:
    what vLLM caches of it must not count as exact."""
    vouched(cluster)
    plane = cluster.consumer.plane
    attempt = cluster.consumer.attempt("c")
    assert attempt.peer is not None
    assert attempt._reads is not None
    attempt._reads.pieces.codec = Codec.INT8
    cluster.producer.kill()
    plane._peers.drop(attempt.peer, PeerError(Reason.READ_FAILED, "for another's sake"))
    cluster.settle()
    cluster.clock.advance(PEER_TIMEOUT_S)
    cluster.settle()
    result = cluster.consumer.result("c")
    assert (result.reason, result.valid_tokens) == (Reason.PEER_UNREACHABLE, 8)
    assert result.codec is Codec.INT8
    assert result.counts.kv_bytes > 0


def test_what_was_vouched_for_is_kept_when_the_producer_s_request_is_aborted(
    cluster: StreamingCluster,
) -> None:
    vouched(cluster)
    cluster.producer.drop("p")
    cluster.overwrite()
    cluster.settle()
    result = cluster.consumer.result("c")
    assert (result.reason, result.valid_tokens) == (Reason.PRODUCER_ENDED, 8)
    assert cluster.has_arrived(8)


def test_what_was_vouched_for_before_a_preemption_is_not_kept(cluster: StreamingCluster) -> None:
    vouched(cluster)
    cluster.producer.preempt("p")
    cluster.settle()
    cluster.producer.drop("p")
    cluster.settle()
    result = cluster.consumer.result("c")
    assert (result.reason, result.valid_tokens) == (Reason.PRODUCER_ENDED, 0)


def test_nothing_is_kept_that_nobody_has_vouched_for(cluster: StreamingCluster) -> None:
    cluster.start()
    cluster.compute(range(8))
    cluster.settle()
    assert cluster.has_arrived(8)
    cluster.producer.drop("p")
    cluster.settle()
    result = cluster.consumer.result("c")
    assert (result.reason, result.valid_tokens) == (Reason.PRODUCER_ENDED, 0)


def test_a_question_now_and_then_is_enough(cluster: StreamingCluster) -> None:
    delivered = cluster.network.delivered
    cluster.start()
    cluster.compute(range(4))
    cluster.settle()
    cluster.clock.advance(VOUCH_S)
    cluster.settle()
    assert delivered.count("commit") == 1
    for end in (8, 12):
        cluster.compute(range(end - 4, end))
        cluster.settle()
    assert delivered.count("commit") == 1
    cluster.pass_time(VOUCH_S, step_s=0.05)
    assert delivered.count("commit") == 2
    cluster.pass_time(10 * VOUCH_S, step_s=0.05)
    assert delivered.count("commit") == 2  # nothing more has arrived


# The answer to one question says nothing of what arrived after it was asked.
def test_an_answer_vouches_only_for_what_had_arrived_when_it_was_asked_for(
    cluster: StreamingCluster,
) -> None:
    cluster.start()
    cluster.compute(range(8))
    cluster.settle()
    cluster.consumer.transport.holds_reads = True
    cluster.compute(range(8, 12))
    cluster.network.deliver()
    cluster.clock.advance(VOUCH_S)
    cluster.consumer.turn()
    cluster.network.deliver_kind("commit")  # granted; the answer takes its time
    cluster.producer.drop("p")
    cluster.finish_reads_too_late()
    cluster.clock.advance(VOUCH_S)
    cluster.consumer.turn()
    assert not cluster.has_arrived(12)
    under_way = [packet.kind for packet in cluster.network.in_flight]
    assert under_way[:2] == ["committed", "refuse"]
    cluster.settle()
    result = cluster.consumer.result("c")
    assert result.reason is Reason.PRODUCER_ENDED
    assert result.valid_tokens == 8
    assert cluster.has_arrived(8)


# --- nothing stale is ever used --------------------------------------------------------------


def test_a_read_that_comes_after_an_abort_is_never_used(cluster: StreamingCluster) -> None:
    cluster.start_reading()
    cluster.producer.drop("p")
    cluster.finish_reads_too_late()
    assert cluster.holds_stale_bytes()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.PRODUCER_ENDED
    assert cluster.consumer.result("c").valid_tokens == 0


def test_a_read_that_comes_after_the_lease_is_never_used(cluster: StreamingCluster) -> None:
    cluster.start_reading()
    cluster.producer.seal("p", THERE)
    cluster.clock.advance(LEASE_S)
    cluster.producer.turn()
    assert cluster.producer.released() == ["p"]
    cluster.finish_reads_too_late()
    assert cluster.holds_stale_bytes()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.LEASE_EXPIRED
    assert cluster.consumer.result("c").valid_tokens == 0


def test_a_read_that_comes_after_a_preemption_is_never_used(cluster: StreamingCluster) -> None:
    cluster.start_reading()
    cluster.producer.preempt("p")
    cluster.finish_reads_too_late()
    assert cluster.holds_stale_bytes()
    cluster.settle()
    assert not cluster.consumer.is_reported("c")
    cluster.compute(range(TOKENS), blocks=ELSEWHERE)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()


@pytest.mark.parametrize("how", ["abort", "expiry", "preemption"])
def test_but_for_the_commit_stale_bytes_would_be_used(cluster: StreamingCluster, how: str) -> None:
    """The three tests above mean nothing if the bytes were right by chance. Here the producer's
    answer is replaced by the yes that it refuses, and the consumer takes stale bytes for KV."""
    source = cluster.start_reading()
    if how == "expiry":
        cluster.producer.seal("p", THERE)
        cluster.network.deliver()
        cluster.clock.advance(LEASE_S)
        cluster.producer.turn()
    elif how == "abort":
        cluster.producer.drop("p")
    else:
        cluster.producer.preempt("p")
    cluster.network.in_flight.clear()  # the consumer does not hear of it
    cluster.finish_reads_too_late()
    cluster.consumer.turn()
    (commit,) = cluster.network.in_flight
    assert commit.message == wire.Commit(source.handoff_id, 0, 0, True)
    commit.deliver()
    cluster.network.in_flight.remove(commit)
    (refusal,) = cluster.network.in_flight
    assert not isinstance(refusal.message, wire.Committed)
    assert cluster.holds_stale_bytes()  # at the very moment at which the no is on its way
    header, _ = framing.decode(refusal.frames)
    yes = wire.Committed(source.handoff_id, 0, True)
    cluster.network.links[refusal.lane[0]].on_message(
        framing.encode(yes, header.sender, header.target)
    )
    assert cluster.consumer.outcome("c") is None
    assert cluster.holds_stale_bytes()
