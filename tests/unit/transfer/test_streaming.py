"""Handoffs that move while the producer still computes: both engines, on fakes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.fakes.clock import rests
from tests.fakes.engines import full_group, make_layout, sliding_group
from tests.fakes.memory import BLOCK_BYTES, BLOCK_TOKENS, kv_of
from tests.fakes.streaming import HERE, PROMPT, THERE, TIMEOUTS, TOKENS, VOUCH_S, StreamingCluster
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.protocol import framing, wire


@pytest.fixture
def cluster() -> StreamingCluster:
    return StreamingCluster()


# --- reads while the prompt is computed ------------------------------------------------------


def test_reads_start_before_the_seal(cluster: StreamingCluster) -> None:
    cluster.start()
    cluster.compute(range(8))
    cluster.settle()
    assert cluster.consumer.transport.num_posted == 1
    assert cluster.has_arrived(8)
    assert not cluster.consumer.is_reported("c")
    cluster.compute(range(8, TOKENS))
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()
    assert cluster.producer.released() == []
    cluster.producer.seal("p", THERE)
    assert cluster.producer.released() == ["p"]


def test_reads_start_before_the_last_layer_of_the_first_chunk(cluster: StreamingCluster) -> None:
    cluster.start()
    step = cluster.compute(range(8), num_layers=1)
    cluster.settle()
    assert cluster.consumer.transport.num_posted == 1
    consumer = cluster.consumer
    assert np.array_equal(consumer.kv_in(0, HERE[:2]), kv_of(PROMPT, 2, 8)[0])
    assert not consumer.kv_in(1, HERE).any()
    cluster.write(step, range(8), THERE, 2)
    cluster.settle()
    assert cluster.consumer.transport.num_posted == 2
    assert cluster.has_arrived(8)


def test_what_was_computed_before_the_fetch_is_read_at_once(cluster: StreamingCluster) -> None:
    source = cluster.producer.begin("p", TOKENS)
    cluster.compute(range(12))
    cluster.settle()
    cluster.consumer.fetch("c", source, HERE, TOKENS)
    cluster.settle()
    assert cluster.has_arrived(12)
    assert not cluster.consumer.is_reported("c")


def test_groups_that_interleave_are_streamed_layer_by_layer() -> None:
    groups = [full_group("layers.1", "layers.3"), full_group("layers.0", "layers.2")]
    cluster = StreamingCluster(make_layout(groups=groups))
    producer, consumer = cluster.producer, cluster.consumer
    there, here = ([3, 4], [5, 6]), ([7, 9], [2, 4])
    source = producer.begin("p", 8)
    consumer.fetch("c", source, here, 8)
    cluster.settle()
    step = producer.advance("p", 8, there)
    for written, layer in enumerate(producer.layout.forward_order(), start=1):
        producer.write_kv(PROMPT, there, range(8), layer)
        producer.announce(step, written)
        cluster.settle()
        assert consumer.transport.num_posted == written
    assert consumer.outcome("c") is None
    assert consumer.holds_kv(PROMPT, here, 8)
    assert consumer.result("c").counts.stretches == 4
    assert consumer.result("c").counts.wire_bytes == 4 * 2 * BLOCK_BYTES


def test_a_sliding_window_is_streamed_with_full_attention() -> None:
    groups = [full_group("layers.0"), sliding_group(5, "layers.1")]
    cluster = StreamingCluster(make_layout(groups=groups))
    producer, consumer = cluster.producer, cluster.consumer
    there, here = ([3, 4, 5, 6], [0, 0, 8, 9]), ([7, 9, 11, 13], [0, 0, 4, 2])
    source = producer.begin("p", TOKENS)
    consumer.fetch("c", source, here, TOKENS)
    for layer in (0, 1):
        producer.write_kv(PROMPT, there, range(TOKENS), layer)
    producer.announce(producer.advance("p", 8, (there[0][:2], [6, 7])))
    cluster.settle()
    assert consumer.transport.num_posted == 1
    producer.announce(producer.advance("p", TOKENS, there))
    cluster.settle()
    assert consumer.outcome("c") is None
    for layer, first in ((0, 0), (1, 8)):
        ours = consumer.caches[layer][list(here[layer][first // BLOCK_TOKENS :])]
        theirs = producer.caches[layer][list(there[layer][first // BLOCK_TOKENS :])]
        assert ours.tobytes() == theirs.tobytes()
    assert not consumer.caches[1][0].any()  # what has left the window is not moved


def test_at_most_two_reads_are_under_way_and_what_is_announced_meanwhile_is_one(
    cluster: StreamingCluster,
) -> None:
    cluster.consumer.transport.holds_reads = True
    cluster.start()
    for end in (4, 8, 12, 16):
        cluster.compute(range(end - 4, end))
        cluster.settle()
    assert cluster.consumer.transport.num_posted == 2
    assert len(cluster.consumer.transport.unfinished) == 2
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.transport.num_posted == 3
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.result("c").counts.stretches == 3
    assert cluster.consumer.result("c").counts.wire_bytes == 2 * 4 * BLOCK_BYTES
    assert cluster.has_arrived()


def test_only_the_missing_suffix_is_streamed(cluster: StreamingCluster) -> None:
    for layer in (0, 1):
        cluster.consumer.write_kv(PROMPT, (HERE,), range(8), layer)
    cluster.start(first_token=8)
    cluster.compute(range(8))
    cluster.settle()
    assert cluster.consumer.transport.num_posted == 0
    cluster.compute(range(8, TOKENS))
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.result("c").counts.wire_bytes == 2 * 2 * BLOCK_BYTES
    assert cluster.has_arrived()


def test_one_read_may_take_long_as_long_as_it_ends(cluster: StreamingCluster) -> None:
    transport = cluster.consumer.transport
    transport.holds_reads = True
    cluster.start()
    cluster.compute(range(8))
    cluster.pass_time(TIMEOUTS.read_s - 1)
    cluster.compute(range(8, TOKENS))
    cluster.settle()
    assert len(transport.unfinished) == 2
    transport.finish_one(0)
    cluster.pass_time(TIMEOUTS.read_s - 1)
    assert not cluster.consumer.is_reported("c")
    transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.result("c").seconds > TIMEOUTS.queue_s
    assert cluster.has_arrived()


def test_a_fetch_may_wait_for_the_prompt_longer_than_a_read_may_take(
    cluster: StreamingCluster,
) -> None:
    cluster.start()
    cluster.compute(range(8))
    cluster.pass_time(TIMEOUTS.read_s + 10)
    assert not cluster.consumer.is_reported("c")
    cluster.compute(range(8, TOKENS))
    cluster.settle()
    assert cluster.consumer.outcome("c") is None


# --- lost and doubled messages ---------------------------------------------------------------


def test_a_lost_announcement_is_made_up_for_by_the_next(cluster: StreamingCluster) -> None:
    cluster.start()
    cluster.compute(range(8))
    assert cluster.network.lose("announce") == 1
    cluster.compute(range(8, TOKENS))
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()


def test_a_lost_message_leaves_a_gap_and_the_whole_tables_are_asked_for(
    cluster: StreamingCluster,
) -> None:
    cluster.start()
    for end in (8, TOKENS):
        cluster.compute(range(end - 8, end), blocks=THERE[: end // BLOCK_TOKENS])
        cluster.network.deliver_kind("announce")
        if end == 8:
            assert cluster.network.lose("progress") == 1
    cluster.settle()
    assert cluster.network.delivered.count("subscribe") == 2
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()


def test_messages_that_come_twice_count_once_while_streaming(cluster: StreamingCluster) -> None:
    cluster.start()
    for end in (8, TOKENS):
        cluster.compute(range(end - 8, end))
        cluster.settle_with_every_message_twice()
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.result("c").counts.wire_bytes == 2 * 4 * BLOCK_BYTES
    assert cluster.has_arrived()


# --- announcements and restarts --------------------------------------------------------------


def test_an_announcement_of_a_foreign_worker_moves_nothing(cluster: StreamingCluster) -> None:
    cluster.start()
    step = cluster.producer.advance("p", TOKENS, THERE)
    announce = wire.Announce(step, 0, 2)
    frames = framing.encode(
        announce,
        cluster.consumer.worker.incarnation,
        cluster.producer.identity.incarnation,
    )
    cluster.producer.control.receive(b"foreign", frames)
    cluster.settle()
    assert cluster.consumer.transport.num_posted == 0
    assert cluster.producer.control.dropped_messages == 1


def test_a_restart_in_the_middle_of_a_stream_fails_the_fetch(cluster: StreamingCluster) -> None:
    cluster.start()
    cluster.compute(range(8))
    cluster.settle()
    cluster.restart_producer()
    cluster.clock.advance(VOUCH_S)
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.PEER_RESTARTED
    assert cluster.consumer.result("c").valid_tokens == 0


def test_a_handoff_that_is_wanted_of_anybody_is_fetched_from_a_restarted_producer(
    cluster: StreamingCluster,
) -> None:
    source = cluster.producer.enqueue("p", TOKENS)
    cluster.want("c", dataclasses.replace(source, incarnation=None))
    cluster.restart_producer()
    cluster.pass_time(2)
    cluster.producer.begin("p", TOKENS, source.handoff_id)
    cluster.settle()
    (offer,) = cluster.consumer.offers()
    assert offer.source.incarnation == cluster.producer.identity.incarnation
    cluster.consumer.control.allocated("c")
    cluster.consumer.fetch("c", offer.source, HERE, offer.num_tokens)
    cluster.compute(range(TOKENS))
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()


# --- sleeping --------------------------------------------------------------------------------


def test_between_two_stretches_the_thread_sleeps(cluster: StreamingCluster) -> None:
    cluster.start()
    cluster.compute(range(8))
    cluster.settle()
    cluster.clock.advance(VOUCH_S)
    cluster.settle()
    wait = cluster.consumer.plane.turn()
    assert wait is not None
    assert wait > 1.0


# Nothing else wakes the thread then: no read is under way, and the producer is silent.
def test_the_thread_wakes_to_ask_whether_what_arrived_is_valid(cluster: StreamingCluster) -> None:
    cluster.start()
    cluster.compute(range(8))
    cluster.settle()
    wait = cluster.consumer.plane.turn()
    assert wait is not None
    assert 0 < wait <= VOUCH_S


def test_nothing_is_left_open_after_a_stream(cluster: StreamingCluster) -> None:
    cluster.start()
    for end in (8, TOKENS):
        cluster.compute(range(end - 8, end))
        cluster.settle()
    cluster.producer.seal("p", THERE)
    cluster.settle()
    for engine in (cluster.producer, cluster.consumer):
        assert set(engine.open_handoffs().values()) == {0}
        assert rests(engine.plane.turn())


# --- what it costs ---------------------------------------------------------------------------


def test_the_control_traffic_of_a_handoff_is_two_kib_and_128_bytes_a_stretch(
    cluster: StreamingCluster,
) -> None:
    consumer = cluster.consumer
    source = cluster.producer.begin("before", 1)
    consumer.control.want("known", source)
    consumer.fetch("known", source, HERE[:1], 1)
    cluster.settle()  # each has introduced itself

    def traffic() -> int:
        return consumer.control.control_bytes + consumer.plane.control_bytes

    before = traffic()
    cluster.start()
    of_stretches = []
    for end in range(BLOCK_TOKENS, TOKENS + 1, BLOCK_TOKENS):
        up_to_now = traffic()
        cluster.compute(range(end - BLOCK_TOKENS, end))
        cluster.settle()
        of_stretches.append(traffic() - up_to_now)
    cluster.producer.seal("p", THERE)
    cluster.settle()
    result = consumer.result("c")
    assert result.reason is None
    assert result.counts.stretches == len(of_stretches)
    assert all(0 < num_bytes <= 128 for num_bytes in of_stretches[:-1])  # the last is committed
    assert 0 < traffic() - before <= 2048 + 128 * result.counts.stretches
