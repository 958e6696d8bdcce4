from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.fakes.engines import FakeCluster, FakeEngine
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.fetches import FetchResult, FetchSpec
from vllm_pd_plugin.ids import Source, new_handoff_id, new_incarnation
from vllm_pd_plugin.transfer import SERVE_INTERVAL_S, Timeouts

TOKENS = 8
THERE, HERE = [3, 4], [7, 9]
KV, EMPTY = 0x11, 0x00
TIMEOUT_S, LEASE_S = 5.0, 30.0
QUEUE_S, READ_S, DRAIN_S = 100.0, 60.0, 5.0


@pytest.fixture
def cluster() -> FakeCluster:
    cluster = FakeCluster(lease_s=LEASE_S, timeouts=Timeouts(QUEUE_S, READ_S, DRAIN_S))
    cluster.producer.fill(THERE, KV)
    return cluster


def sealed(cluster: FakeCluster, request_id: str = "p") -> Source:
    return cluster.producer.produce(request_id, THERE, TOKENS)


def start(
    cluster: FakeCluster,
    request_id: str = "c",
    source: Source | None = None,
    blocks: Sequence[int] = HERE,
) -> Source:
    """Start a fetch, of a sealed handoff unless another is given."""
    source = source or sealed(cluster, f"p-{request_id}")
    cluster.consumer.fetch(request_id, source, blocks, TOKENS)
    return source


def forged(cluster: FakeCluster) -> Source:
    """A handoff of an incarnation that never was."""
    return Source(new_handoff_id(), cluster.producer_address, new_incarnation())


def reading(cluster: FakeCluster, request_id: str = "c", source: Source | None = None) -> Source:
    """A fetch whose read has been posted and does not end by itself."""
    cluster.consumer.transport.holds_reads = True
    source = start(cluster, request_id, source)
    cluster.settle()
    assert not cluster.consumer.is_reported(request_id)
    assert cluster.consumer.transport.unfinished
    return source


def committing(cluster: FakeCluster, request_id: str = "c") -> Source:
    """A fetch whose read has ended, and whose commit is under way."""
    source = reading(cluster, request_id)
    cluster.consumer.transport.finish_reads()
    cluster.consumer.plane.turn()
    assert [packet.kind for packet in cluster.network.in_flight] == ["commit"]
    return source


def nobody_is_open(engine: FakeEngine) -> bool:
    return engine.plane.turn() is None and not engine.transport.reads


# --- the happy path --------------------------------------------------------------------------


def test_a_fetch_moves_the_bytes_and_nothing_else(cluster: FakeCluster) -> None:
    start(cluster)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.holds(HERE, KV)
    others = [block for block in range(32) if block not in HERE]
    assert cluster.consumer.holds(others, EMPTY)
    assert cluster.producer.holds(THERE, KV)


def test_a_fetch_is_committed_before_it_is_reported(cluster: FakeCluster) -> None:
    committing(cluster)
    assert cluster.producer.released() == []
    cluster.network.deliver_one()
    assert cluster.producer.released() == ["p-c"]
    assert cluster.consumer.results == []
    cluster.network.deliver_one()
    assert cluster.consumer.outcome("c") is None


def test_a_result_counts_bytes_descriptors_and_seconds(cluster: FakeCluster) -> None:
    reading(cluster)
    cluster.clock.advance(2.5)
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    # Two layers of two blocks of 32 bytes; blocks 7 and 9 are no neighbours.
    assert cluster.consumer.results == [FetchResult("c", None, 128, 4, 1, 2.5, TOKENS)]


def test_a_fetch_that_begins_before_the_seal_reads_after_it(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", TOKENS)
    start(cluster, source=source)
    cluster.pass_time(3 * TIMEOUT_S)
    assert cluster.consumer.transport.num_posted == 0
    assert cluster.consumer.results == []
    cluster.producer.seal("p", THERE)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.holds(HERE, KV)


def test_a_fetch_with_nothing_missing_is_committed_without_a_read(cluster: FakeCluster) -> None:
    source = cluster.producer.produce("p", [], 0)
    cluster.consumer.fetch("c", source, [], 0)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.producer.released() == ["p"]
    assert cluster.consumer.transport.num_posted == 0


def test_fetches_of_one_peer_share_one_connection(cluster: FakeCluster) -> None:
    for request_id in "abc":
        start(cluster, request_id)
    cluster.settle()
    assert [result.reason for result in cluster.consumer.results] == [None] * 3
    assert cluster.network.delivered.count("hello") == 1
    assert len(cluster.consumer.transport.connected) == 1
    assert nobody_is_open(cluster.consumer)


# --- refusals --------------------------------------------------------------------------------


def test_a_stale_read_is_refused(cluster: FakeCluster) -> None:
    reading(cluster)
    cluster.clock.advance(LEASE_S)
    cluster.producer.turn()
    assert cluster.producer.released() == ["p-c"]
    cluster.producer.fill(THERE, 0x99)  # another request's KV
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.LEASE_EXPIRED


def test_a_stale_read_is_refused_though_the_producer_has_not_noticed(cluster: FakeCluster) -> None:
    reading(cluster)
    cluster.clock.advance(LEASE_S)
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.LEASE_EXPIRED


def test_a_handoff_that_the_producer_does_not_know_fails(cluster: FakeCluster) -> None:
    incarnation = cluster.producer.identity.incarnation
    start(cluster, source=Source(new_handoff_id(), cluster.producer_address, incarnation))
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.UNKNOWN_HANDOFF
    assert cluster.consumer.transport.num_posted == 0


def test_a_request_that_ended_without_kv_fails_its_fetch(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", TOKENS)
    start(cluster, source=source)
    cluster.settle()
    cluster.producer.drop("p")
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.PRODUCER_ENDED


def test_a_seal_of_fewer_tokens_than_offered_fails(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", TOKENS)
    cluster.producer.seal("p", THERE, num_tokens=TOKENS - 1)
    start(cluster, source=source)
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.MISSING_BLOCKS
    assert cluster.consumer.transport.num_posted == 0


@pytest.mark.parametrize("blocks", [[3], [3, 0], [3, 1000]], ids=["short", "null", "outside"])
def test_a_seal_with_unusable_blocks_fails(cluster: FakeCluster, blocks: list[int]) -> None:
    start(cluster, source=cluster.producer.produce("p", blocks, TOKENS))
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.MISSING_BLOCKS
    assert cluster.consumer.holds(HERE, EMPTY)


def test_a_seal_with_a_negative_block_fails_at_once(cluster: FakeCluster) -> None:
    start(cluster, source=cluster.producer.produce("p", [3, -1], TOKENS))
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.MISSING_BLOCKS


def test_a_read_that_cannot_start_fails(cluster: FakeCluster) -> None:
    cluster.consumer.transport.refuses_reads = True
    start(cluster)
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.READ_FAILED


def test_a_peer_that_the_transport_cannot_use_fails(cluster: FakeCluster) -> None:
    start(cluster)
    del cluster.fabric.transports[cluster.producer.transport.name]
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.PEER_INCOMPATIBLE


def test_a_read_that_fails_is_not_committed(cluster: FakeCluster) -> None:
    reading(cluster)
    cluster.consumer.transport.fail_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.READ_FAILED
    assert "commit" not in cluster.network.delivered
    assert not cluster.consumer.transport.reads


# FAILED does not say that the rest of it has stopped: only DONE, or remove_peer, does.
def test_a_read_that_fails_is_reported_only_when_the_rest_of_it_cannot_write(
    cluster: FakeCluster,
) -> None:
    cluster.consumer.transport.failed_reads_write = True
    reading(cluster)
    cluster.consumer.transport.fail_reads()
    cluster.settle()  # FakeEngine checks every report
    cluster.pass_time(2 * DRAIN_S)
    assert cluster.consumer.outcome("c") is Reason.READ_FAILED


# --- restarts and silence --------------------------------------------------------------------


def test_a_restarted_producer_refuses_the_old_commit_and_serves_the_next_request(
    cluster: FakeCluster,
) -> None:
    committing(cluster, "old")
    old = cluster.restart_producer()
    cluster.settle()
    assert cluster.consumer.outcome("old") is Reason.PEER_RESTARTED
    cluster.consumer.transport.holds_reads = False
    cluster.producer.fill(THERE, 0x22)
    start(cluster, "new")
    cluster.settle()
    assert cluster.consumer.outcome("new") is None
    assert cluster.consumer.holds(HERE, 0x22)
    assert cluster.consumer.transport.removed == [old.transport.name]
    assert cluster.consumer.transport.connected == {cluster.producer.transport.name}


def test_a_new_request_finds_the_restarted_producer_while_an_old_read_hangs(
    cluster: FakeCluster,
) -> None:
    reading(cluster, "old")
    old = cluster.restart_producer()
    cluster.producer.fill(THERE, 0x22)
    start(cluster, "new", blocks=[11, 12])
    cluster.settle()
    assert cluster.consumer.outcome("old") is Reason.PEER_RESTARTED
    assert cluster.consumer.transport.removed == [old.transport.name]
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("new") is None
    assert cluster.consumer.holds([11, 12], 0x22)
    assert cluster.consumer.holds(HERE, EMPTY)


def test_a_handoff_of_the_incarnation_before_fails(cluster: FakeCluster) -> None:
    stale = sealed(cluster)
    start(cluster, "first")
    cluster.settle()
    cluster.restart_producer()
    start(cluster, "stale", stale)
    cluster.settle()
    assert cluster.consumer.outcome("stale") is Reason.PEER_RESTARTED


def test_a_wrong_incarnation_does_not_disturb_another_fetch_from_the_same_address(
    cluster: FakeCluster,
) -> None:
    reading(cluster, "honest")
    start(cluster, "forged", forged(cluster), blocks=[11, 12])
    cluster.settle()
    assert cluster.consumer.outcome("forged") is Reason.PEER_RESTARTED
    assert cluster.consumer.transport.removed == []
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("honest") is None


def test_a_wrong_incarnation_at_an_address_not_yet_known_fails_alone(cluster: FakeCluster) -> None:
    start(cluster, "forged", forged(cluster), blocks=[11, 12])
    start(cluster, "honest")
    cluster.settle()
    assert cluster.consumer.outcome("forged") is Reason.PEER_RESTARTED
    assert cluster.consumer.outcome("honest") is None


def test_a_silent_peer_is_unreachable_after_the_timeout(cluster: FakeCluster) -> None:
    source = sealed(cluster)
    cluster.producer.kill()
    start(cluster, source=source)
    cluster.settle()
    assert cluster.consumer.plane.turn() == pytest.approx(TIMEOUT_S)
    cluster.clock.advance(TIMEOUT_S - 0.001)
    cluster.settle()
    assert cluster.consumer.results == []
    cluster.clock.advance(0.001)
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.PEER_UNREACHABLE
    assert nobody_is_open(cluster.consumer)


def test_a_commit_that_is_never_answered_makes_the_peer_unreachable(cluster: FakeCluster) -> None:
    committing(cluster)
    cluster.network.silence(cluster.producer_address)
    cluster.settle()
    cluster.clock.advance(TIMEOUT_S)
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.PEER_UNREACHABLE


def test_a_seal_that_never_comes_ends_at_the_fetch_s_own_deadline(cluster: FakeCluster) -> None:
    start(cluster, source=cluster.producer.begin("p", TOKENS))
    cluster.pass_time(QUEUE_S - 1)
    assert cluster.consumer.results == []
    cluster.pass_time(1)
    assert cluster.consumer.outcome("c") is Reason.FETCH_TIMEOUT


def test_a_peer_that_comes_back_is_introduced_afresh(cluster: FakeCluster) -> None:
    source = sealed(cluster)
    cluster.network.silence(cluster.producer_address)
    start(cluster, "early", source)
    cluster.settle()
    cluster.clock.advance(TIMEOUT_S)
    cluster.settle()
    cluster.network.listen(cluster.producer_address, cluster.producer.control.receive)
    start(cluster, "late", source)
    cluster.settle()
    assert cluster.consumer.outcome("early") is Reason.PEER_UNREACHABLE
    assert cluster.consumer.outcome("late") is None


# --- cancelling ------------------------------------------------------------------------------


def test_a_cancelled_read_is_drained_before_it_is_reported(cluster: FakeCluster) -> None:
    reading(cluster)
    cluster.consumer.plane.cancel("c", Reason.ABORTED)
    cluster.settle()
    assert cluster.consumer.results == []
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.ABORTED
    assert "commit" not in cluster.network.delivered
    assert cluster.consumer.transport.removed == []


def test_a_cancelled_read_that_fails_keeps_the_reason_of_the_cancel(cluster: FakeCluster) -> None:
    reading(cluster)
    cluster.consumer.plane.cancel("c", Reason.ABORTED)
    cluster.consumer.plane.cancel("c", Reason.CANCELLED)
    cluster.consumer.transport.fail_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.ABORTED


def test_a_read_that_never_ends_is_cut_off_and_then_reported(cluster: FakeCluster) -> None:
    reading(cluster)
    cluster.consumer.plane.cancel("c", Reason.ABORTED)
    cluster.pass_time(DRAIN_S - 0.5)
    assert cluster.consumer.results == []
    assert cluster.consumer.transport.removed == []
    cluster.pass_time(0.5)
    assert cluster.consumer.outcome("c") is Reason.ABORTED
    assert cluster.consumer.transport.removed == [cluster.producer.transport.name]
    cluster.consumer.transport.write_late()
    assert cluster.consumer.holds(HERE, EMPTY)


def test_a_read_that_never_ends_times_out_and_is_cut_off(cluster: FakeCluster) -> None:
    reading(cluster)
    cluster.pass_time(READ_S + DRAIN_S - 0.5)
    assert cluster.consumer.results == []
    cluster.pass_time(0.5)
    assert cluster.consumer.outcome("c") is Reason.FETCH_TIMEOUT
    assert cluster.consumer.transport.removed == [cluster.producer.transport.name]


def test_a_refusal_while_reading_is_drained_too(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", TOKENS)
    cluster.producer.compute("p", TOKENS, THERE)
    reading(cluster, source=source)
    cluster.producer.drop("p")
    cluster.settle()
    assert cluster.network.delivered[-1] == "refuse"
    assert cluster.consumer.results == []
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.PRODUCER_ENDED
    assert "commit" not in cluster.network.delivered


def test_a_read_is_released_only_when_its_peer_was_removed(cluster: FakeCluster) -> None:
    reading(cluster)
    cluster.consumer.plane.cancel("c", Reason.ABORTED)
    cluster.pass_time(DRAIN_S)
    assert cluster.consumer.is_reported("c")
    assert cluster.consumer.transport.released_while_pending == 0


@pytest.mark.parametrize("stage", ["connecting", "subscribed", "committing"])
def test_a_fetch_without_a_read_is_cancelled_at_once(cluster: FakeCluster, stage: str) -> None:
    if stage == "committing":
        committing(cluster)
    else:
        start(cluster, source=cluster.producer.begin("p", TOKENS))
        if stage == "subscribed":
            cluster.settle()
    cluster.consumer.plane.cancel("c", Reason.ABORTED)
    assert cluster.consumer.outcome("c") is Reason.ABORTED
    cluster.settle()
    assert len(cluster.consumer.results) == 1


def test_cancelling_what_is_over_or_unknown_does_nothing(cluster: FakeCluster) -> None:
    start(cluster)
    cluster.settle()
    cluster.consumer.plane.cancel("c", Reason.ABORTED)
    cluster.consumer.plane.cancel("nobody", Reason.ABORTED)
    assert len(cluster.consumer.results) == 1
    assert cluster.consumer.outcome("c") is None


def test_a_request_may_fetch_again_after_a_failure(cluster: FakeCluster) -> None:
    source = reading(cluster)
    cluster.consumer.transport.fail_reads()
    cluster.settle()
    cluster.consumer.results.clear()
    cluster.consumer.transport.holds_reads = False
    start(cluster, "c", source)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.holds(HERE, KV)


# --- messages out of turn --------------------------------------------------------------------


def test_messages_that_come_twice_count_once(cluster: FakeCluster) -> None:
    start(cluster)
    while in_flight := cluster.network.in_flight:
        in_flight.insert(0, in_flight[0])
        cluster.network.deliver_one()
        cluster.network.deliver_one()
        cluster.consumer.turn()
    assert cluster.network.delivered.count("commit") == 2
    assert cluster.consumer.transport.num_posted == 1
    assert cluster.consumer.outcome("c") is None


def test_a_seal_that_comes_after_the_end_is_ignored(cluster: FakeCluster) -> None:
    start(cluster)
    while cluster.network.in_flight[0].kind != "seal":
        cluster.network.deliver_one()
    cluster.consumer.plane.cancel("c", Reason.ABORTED)
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.ABORTED
    assert cluster.consumer.transport.num_posted == 0


# --- serving, sleeping, closing --------------------------------------------------------------


def test_a_side_that_is_read_from_drives_its_transport(cluster: FakeCluster) -> None:
    plane, transport = cluster.producer.plane, cluster.producer.transport
    assert plane.turn() is None
    assert transport.num_progress == 0
    plane.set_serving(True)
    assert plane.turn() == SERVE_INTERVAL_S
    assert transport.num_progress == 1
    plane.set_serving(False)
    assert plane.turn() is None
    assert transport.num_progress == 1


def test_a_read_is_polled_soon_at_first_and_less_often_later(cluster: FakeCluster) -> None:
    reading(cluster)
    first = cluster.consumer.plane.turn()
    cluster.clock.advance(0.02)
    later = cluster.consumer.plane.turn()
    cluster.clock.advance(10.0)
    last = cluster.consumer.plane.turn()
    assert first is not None
    assert later is not None
    assert last is not None
    assert 0 < first < later < last <= 0.002


def test_a_fetch_that_waits_for_the_seal_lets_the_thread_sleep(cluster: FakeCluster) -> None:
    start(cluster, source=cluster.producer.begin("p", TOKENS))
    cluster.settle()
    assert cluster.consumer.plane.turn() == pytest.approx(2.0)  # then it asks again


def test_a_fetch_whose_news_were_lost_asks_for_them(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", TOKENS)
    start(cluster, source=source)
    cluster.settle()
    cluster.producer.control.seal(source.handoff_id, TOKENS, (THERE,))
    assert cluster.network.lose("seal") == 1
    cluster.pass_time(2.0)
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.holds(HERE, KV)


def test_a_fetch_that_waits_long_ends_with_the_queue_timeout(cluster: FakeCluster) -> None:
    start(cluster, source=cluster.producer.begin("p", TOKENS))
    cluster.pass_time(QUEUE_S - 1)
    assert cluster.consumer.results == []
    cluster.pass_time(2)
    assert cluster.consumer.outcome("c") is Reason.FETCH_TIMEOUT


def test_a_closed_plane_serves_nobody(cluster: FakeCluster) -> None:
    plane, transport = cluster.producer.plane, cluster.producer.transport
    plane.set_serving(True)
    plane.close()
    before = transport.num_progress
    assert plane.turn() is None
    assert transport.num_progress == before


def test_closing_reports_every_fetch_and_leaves_nothing_that_writes(cluster: FakeCluster) -> None:
    reading(cluster, "reading")
    start(cluster, "subscribed", cluster.producer.begin("p", TOKENS))
    cluster.settle()
    elsewhere = Source(new_handoff_id(), ("127.0.0.1", 7999), new_incarnation())
    start(cluster, "connecting", elsewhere)
    cluster.consumer.plane.close()
    for request_id in ("reading", "subscribed", "connecting"):
        assert cluster.consumer.outcome(request_id) is Reason.CANCELLED
    transport = cluster.consumer.transport
    assert transport.is_closed
    assert transport.reads == {}
    assert transport.removed == [cluster.producer.transport.name]
    assert cluster.network.open_links(cluster.producer_address) == 0
    assert cluster.network.open_links(elsewhere.address) == 0


def test_a_closed_plane_hears_nothing_more(cluster: FakeCluster) -> None:
    committing(cluster)
    cluster.network.deliver_one()
    cluster.consumer.plane.close()
    cluster.network.deliver()
    assert cluster.consumer.outcome("c") is Reason.CANCELLED
    assert cluster.consumer.plane.turn() is None


def test_malformed_messages_are_counted(cluster: FakeCluster) -> None:
    start(cluster)
    cluster.settle()
    (link,) = cluster.network.links.values()
    link.on_message([b"rubbish"])
    assert cluster.consumer.plane.dropped_messages == 1


# --- several producers -----------------------------------------------------------------------


def begin(cluster: FakeCluster, source: Source, is_last: bool = True, attempt: int = 0) -> None:
    """Start a fetch that may not be the last chance."""
    spec = FetchSpec("c", source, 0, TOKENS, (tuple(HERE),), attempt, is_last)
    cluster.consumer.specs["c"] = spec
    cluster.consumer.plane.fetch(spec)


def test_a_fetch_from_elsewhere_takes_the_place_of_one_that_is_under_way(
    cluster: FakeCluster,
) -> None:
    transport = cluster.consumer.transport
    transport.holds_reads = True
    begin(cluster, sealed(cluster, "first"), is_last=False)
    cluster.settle()
    begin(cluster, sealed(cluster, "second"), attempt=1)
    cluster.settle()
    assert transport.num_posted == 1  # the first read may still write to the same blocks
    transport.finish_reads()
    cluster.settle()
    assert transport.num_posted == 2
    transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.results[0].attempt == 1
    assert cluster.consumer.holds(HERE, KV)


def test_a_rank_that_has_succeeded_reports_nothing_more(cluster: FakeCluster) -> None:
    begin(cluster, sealed(cluster), is_last=False)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    begin(cluster, sealed(cluster, "second"), attempt=1)
    cluster.consumer.plane.refuse("c")
    cluster.settle()
    assert cluster.consumer.outcome("c") is None  # and only once


def test_a_refusal_is_reported_when_the_reads_have_ended(cluster: FakeCluster) -> None:
    transport = cluster.consumer.transport
    transport.holds_reads = True
    begin(cluster, sealed(cluster), is_last=False)
    cluster.settle()
    cluster.consumer.plane.refuse("c")
    cluster.settle()
    assert not cluster.consumer.is_reported("c")
    transport.finish_reads()
    cluster.settle()
    (result,) = cluster.consumer.results
    assert result.reason is Reason.INTERNAL
    assert result.is_final


def test_a_refusal_of_what_was_never_begun_is_reported_at_once(cluster: FakeCluster) -> None:
    cluster.consumer.specs["c"] = FetchSpec("c", forged(cluster), 0, TOKENS, (tuple(HERE),))
    cluster.consumer.plane.refuse("c")
    (result,) = cluster.consumer.results
    assert (result.reason, result.is_final) == (Reason.INTERNAL, True)
