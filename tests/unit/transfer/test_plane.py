"""The transfer plane: a fetch moves the bytes, or says why it does not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.fakes.engines import PEER_TIMEOUT_S
from tests.fakes.fetching import EMPTY, HERE, KV, LEASE_S, THERE, TOKENS, FetchingCluster
from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.transfer.plane import LENDING_INTERVAL_S
from vllm_pd_plugin.transfer.specs import FetchCounts, FetchResult
from vllm_pd_plugin.transfer.states import FetchState


@pytest.fixture
def cluster() -> FetchingCluster:
    return FetchingCluster()


# --- the happy path --------------------------------------------------------------------------


def test_a_fetch_moves_the_bytes_and_nothing_else(cluster: FetchingCluster) -> None:
    cluster.start()
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.holds(HERE, KV)
    others = [block for block in range(32) if block not in HERE]
    assert cluster.consumer.holds(others, EMPTY)
    assert cluster.producer.holds(THERE, KV)


def test_a_fetch_is_committed_before_it_is_reported(cluster: FetchingCluster) -> None:
    cluster.start_committing()
    assert cluster.producer.released() == []
    cluster.network.deliver_one()
    assert cluster.producer.released() == ["p-c"]
    assert cluster.consumer.results == []
    cluster.network.deliver_one()
    assert cluster.consumer.outcome("c") is None


def test_a_result_counts_bytes_descriptors_and_seconds(cluster: FetchingCluster) -> None:
    cluster.start_reading()
    cluster.clock.advance(2.5)
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    # Two layers of two blocks of 32 bytes; blocks 7 and 9 are no neighbours.
    counts = FetchCounts(wire_bytes=128, kv_bytes=128, descriptors=4, stretches=1, packed=0)
    (result,) = cluster.consumer.results
    assert result.seconds == pytest.approx(2.5, abs=0.01)
    assert result == FetchResult("c", None, counts, Codec.RAW, result.seconds, TOKENS)


def test_a_fetch_that_begins_before_the_seal_reads_after_it(cluster: FetchingCluster) -> None:
    source = cluster.producer.begin("p", TOKENS)
    cluster.start(source=source)
    cluster.pass_time(3 * PEER_TIMEOUT_S)
    assert cluster.consumer.transport.num_posted == 0
    assert cluster.consumer.results == []
    cluster.producer.seal("p", THERE)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.holds(HERE, KV)


def test_a_fetch_with_nothing_missing_is_committed_without_a_read(cluster: FetchingCluster) -> None:
    source = cluster.producer.produce("p", [], 0)
    cluster.consumer.fetch("c", source, [], 0)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.producer.released() == ["p"]
    assert cluster.consumer.transport.num_posted == 0


def test_fetches_of_one_peer_share_one_connection(cluster: FetchingCluster) -> None:
    for request_id in "abc":
        cluster.start(request_id)
    cluster.settle()
    assert [result.reason for result in cluster.consumer.results] == [None] * 3
    assert cluster.network.delivered.count("hello") == 1
    assert len(cluster.consumer.transport.connected) == 1
    assert cluster.consumer_is_idle()


# --- refusals --------------------------------------------------------------------------------


def test_a_stale_read_is_refused(cluster: FetchingCluster) -> None:
    cluster.start_reading()
    cluster.clock.advance(LEASE_S)
    cluster.producer.turn()
    assert cluster.producer.released() == ["p-c"]
    cluster.producer.fill(THERE, 0x99)  # another request's KV
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.LEASE_EXPIRED


def test_a_stale_read_is_refused_though_the_producer_has_not_noticed(
    cluster: FetchingCluster,
) -> None:
    cluster.start_reading()
    cluster.clock.advance(LEASE_S)
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.LEASE_EXPIRED


def test_a_handoff_that_the_producer_does_not_know_fails(cluster: FetchingCluster) -> None:
    cluster.start(source=cluster.unheard_of())
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.UNKNOWN_HANDOFF
    assert cluster.consumer.transport.num_posted == 0


def test_a_request_that_ended_without_kv_fails_its_fetch(cluster: FetchingCluster) -> None:
    source = cluster.producer.begin("p", TOKENS)
    cluster.start(source=source)
    cluster.settle()
    cluster.producer.drop("p")
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.PRODUCER_ENDED


def test_a_seal_of_fewer_tokens_than_offered_fails(cluster: FetchingCluster) -> None:
    source = cluster.producer.begin("p", TOKENS)
    cluster.producer.seal("p", THERE, num_tokens=TOKENS - 1)
    cluster.start(source=source)
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.MISSING_BLOCKS
    assert cluster.consumer.transport.num_posted == 0


@pytest.mark.parametrize("blocks", [[3], [3, 0], [3, 1000]], ids=["short", "null", "outside"])
def test_a_seal_with_unusable_blocks_fails(cluster: FetchingCluster, blocks: list[int]) -> None:
    cluster.start(source=cluster.producer.produce("p", blocks, TOKENS))
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.MISSING_BLOCKS
    assert cluster.consumer.transport.num_posted == 0
    assert cluster.consumer.holds(HERE, EMPTY)


def test_a_seal_with_a_negative_block_fails_at_once(cluster: FetchingCluster) -> None:
    cluster.start(source=cluster.producer.produce("p", [3, -1], TOKENS))
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.MISSING_BLOCKS
    assert cluster.consumer.transport.num_posted == 0


def test_a_read_that_cannot_start_fails(cluster: FetchingCluster) -> None:
    cluster.consumer.transport.refuses_reads = True
    cluster.start()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.READ_FAILED


def test_a_peer_that_the_transport_cannot_use_fails(cluster: FetchingCluster) -> None:
    cluster.start()
    del cluster.fabric.transports[cluster.producer.transport.name]
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.PEER_INCOMPATIBLE


def test_a_read_that_fails_is_not_committed(cluster: FetchingCluster) -> None:
    cluster.start_reading()
    cluster.consumer.transport.fail_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.READ_FAILED
    assert "commit" not in cluster.network.delivered
    assert not cluster.consumer.transport.reads


# FAILED does not say that the rest of it has stopped: only DONE, or remove_peer, does.
def test_a_read_that_fails_is_reported_only_when_the_rest_of_it_cannot_write(
    cluster: FetchingCluster,
) -> None:
    cluster.consumer.transport.failed_reads_write = True
    cluster.start_reading()
    cluster.consumer.transport.fail_reads()
    assert cluster.consumer.transport.unfinished
    cluster.settle()  # FakeEngine checks every report
    assert cluster.consumer.outcome("c") is Reason.READ_FAILED
    assert cluster.consumer.transport.removed == [cluster.producer.transport.name]


def test_a_fetch_ends_once_where_there_is_no_connecting_again(cluster: FetchingCluster) -> None:
    """A connection is closed for a failed read's sake: one fetch would connect again, and its
    failure to ends another one, whose successor begins meanwhile."""
    cluster.start_reading("a")
    cluster.start_reading("b")
    plane = cluster.consumer.plane
    one, other = cluster.consumer.attempt("a"), cluster.consumer.attempt("b")
    plane.fetch(dataclasses.replace(cluster.consumer.specs["b"], attempt=1))
    assert other.state is FetchState.DRAINING
    assert one.peer is not None

    def refuse(*_: object) -> Any:
        raise PeerError(Reason.PEER_UNREACHABLE, "no descriptors left")

    plane._peers._peers._connect = refuse
    plane._peers.drop(one.peer, PeerError(Reason.READ_FAILED, "a read failed"))
    cluster.settle()
    for name in ("a", "b"):
        assert cluster.consumer.outcome(name) is Reason.PEER_UNREACHABLE
    assert plane._fetches == {}
    assert plane.faults == 0


# --- lost, late and doubled messages ---------------------------------------------------------


def test_messages_that_come_twice_count_once(cluster: FetchingCluster) -> None:
    cluster.start()
    cluster.settle_with_every_message_twice()
    assert cluster.network.delivered.count("commit") == 2
    assert cluster.consumer.transport.num_posted == 1
    assert cluster.consumer.outcome("c") is None


def test_a_seal_that_comes_after_the_end_is_ignored(cluster: FetchingCluster) -> None:
    cluster.start()
    cluster.deliver_until("seal")
    cluster.consumer.plane.cancel("c", Reason.ABORTED)
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.ABORTED
    assert cluster.network.delivered[-1] == "seal"
    assert cluster.consumer.transport.num_posted == 0


def test_a_fetch_whose_news_were_lost_asks_for_them(cluster: FetchingCluster) -> None:
    source = cluster.producer.begin("p", TOKENS)
    cluster.start(source=source)
    cluster.settle()
    cluster.producer.control.seal(source.handoff_id, "p", TOKENS, (THERE,))
    assert cluster.network.lose("seal") == 1
    cluster.pass_time(2.0)
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.holds(HERE, KV)


def test_malformed_messages_are_counted(cluster: FetchingCluster) -> None:
    cluster.start()
    cluster.settle()
    (link,) = cluster.network.links.values()
    link.on_message([b"rubbish"])
    assert cluster.consumer.plane.dropped_messages == 1


# --- serving and sleeping --------------------------------------------------------------------


def test_a_side_that_is_read_from_drives_its_transport(cluster: FetchingCluster) -> None:
    plane, transport = cluster.producer.plane, cluster.producer.transport
    assert plane.turn() is None
    assert transport.num_progress == 0
    plane.set_lending(True)
    assert plane.turn() == LENDING_INTERVAL_S
    assert transport.num_progress == 1
    plane.set_lending(False)
    assert plane.turn() is None
    assert transport.num_progress == 1


def test_a_read_is_polled_soon_at_first_and_less_often_later(cluster: FetchingCluster) -> None:
    cluster.start_reading()
    first = cluster.consumer.plane.turn()
    cluster.clock.advance(0.02)
    later = cluster.consumer.plane.turn()
    cluster.clock.advance(10.0)
    last = cluster.consumer.plane.turn()
    assert first is not None
    assert later is not None
    assert last is not None
    assert 0 < first < later < last <= 0.002


def test_a_fetch_that_waits_for_the_seal_lets_the_thread_sleep(cluster: FetchingCluster) -> None:
    cluster.start(source=cluster.producer.begin("p", TOKENS))
    cluster.settle()
    assert cluster.consumer.plane.turn() == pytest.approx(2.0)  # then it asks again
