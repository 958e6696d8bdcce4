"""Handoffs that move while the producer still computes: both engines, on fakes."""

from __future__ import annotations

import dataclasses

import pytest

from tests.fakes.engines import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    FakeCluster,
    FakeEngine,
    full_group,
    make_layout,
    sliding_group,
)
from vllm_pd_plugin import wire
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import Source
from vllm_pd_plugin.transfer import Timeouts

TOKENS = 16
PROMPT, ANOTHER = 1, 2
THERE, ELSEWHERE = [3, 4, 5, 6], [13, 14, 15, 16]
HERE = [7, 9, 11, 13]
TIMEOUT_S, LEASE_S = 5.0, 30.0
VOUCH_S = 0.25
TIMEOUTS = Timeouts(queue_s=100.0, read_s=60.0, drain_s=5.0)


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(lease_s=LEASE_S, timeouts=TIMEOUTS)


def start(cluster: FakeCluster, first_token: int = 0) -> Source:
    """A fetch of a prompt whose first token is still to be computed."""
    source = cluster.producer.begin("p", TOKENS)
    cluster.consumer.fetch("c", source, HERE, TOKENS, first_token)
    cluster.settle()
    return source


def compute(
    cluster: FakeCluster,
    tokens: range,
    blocks: list[int] = THERE,
    num_layers: int | None = None,
) -> int:
    """A step of the producer: it writes some layers, announces them, and no message is delivered.

    Returns the step.
    """
    producer = cluster.producer
    step = producer.advance("p", tokens.stop, blocks)
    write(producer, step, tokens, blocks, num_layers or producer.num_layers)
    return step


def write(
    producer: FakeEngine, step: int, tokens: range, blocks: list[int], num_layers: int
) -> None:
    for layer in producer.layout.forward_order()[:num_layers]:
        producer.write_kv(PROMPT, (blocks,), tokens, layer)
    producer.announce(step, num_layers)


def overwrite(cluster: FakeCluster, blocks: list[int] = THERE) -> None:
    """Another request computes in the blocks that were given back."""
    for layer in range(cluster.producer.num_layers):
        cluster.producer.write_kv(ANOTHER, (blocks,), range(TOKENS), layer)


def arrived(cluster: FakeCluster, num_tokens: int = TOKENS) -> bool:
    return cluster.consumer.holds_kv(PROMPT, (HERE,), num_tokens)


def holds_stale_bytes(cluster: FakeCluster) -> bool:
    """The consumer has bytes of another prompt where its own should be."""
    return any(
        cluster.consumer.caches[layer][here].tobytes()
        == cluster.producer.caches[layer][there].tobytes()
        and not arrived(cluster)
        for layer in range(cluster.consumer.num_layers)
        for here, there in zip(HERE, THERE, strict=True)
    )


# --- reads while the prompt is computed ------------------------------------------------------


def test_reads_start_before_the_seal(cluster: FakeCluster) -> None:
    start(cluster)
    compute(cluster, range(8))
    cluster.settle()
    assert cluster.consumer.transport.num_posted == 1
    assert arrived(cluster, 8)
    assert not cluster.consumer.is_reported("c")
    compute(cluster, range(8, TOKENS))
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert arrived(cluster)
    assert cluster.producer.released() == []
    cluster.producer.seal("p", THERE)
    assert cluster.producer.released() == ["p"]


def test_reads_start_before_the_last_layer_of_the_first_chunk(cluster: FakeCluster) -> None:
    start(cluster)
    step = compute(cluster, range(8), num_layers=1)
    cluster.settle()
    assert cluster.consumer.transport.num_posted == 1
    first, second = cluster.consumer.caches
    assert first[HERE[:2]].any()
    assert not second[HERE].any()
    write(cluster.producer, step, range(8), THERE, 2)
    cluster.settle()
    assert cluster.consumer.transport.num_posted == 2
    assert arrived(cluster, 8)


def test_what_was_computed_before_the_fetch_is_read_at_once(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", TOKENS)
    compute(cluster, range(12))
    cluster.settle()
    cluster.consumer.fetch("c", source, HERE, TOKENS)
    cluster.settle()
    assert arrived(cluster, 12)
    assert not cluster.consumer.is_reported("c")


def test_groups_that_interleave_are_streamed_layer_by_layer() -> None:
    groups = [full_group("layers.1", "layers.3"), full_group("layers.0", "layers.2")]
    cluster = FakeCluster(layout=make_layout(groups=groups), timeouts=TIMEOUTS)
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
    assert consumer.result("c").num_stretches == 4
    assert consumer.result("c").num_bytes == 4 * 2 * BLOCK_BYTES


def test_a_sliding_window_is_streamed_with_full_attention() -> None:
    groups = [full_group("layers.0"), sliding_group(5, "layers.1")]
    cluster = FakeCluster(layout=make_layout(groups=groups), timeouts=TIMEOUTS)
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
    cluster: FakeCluster,
) -> None:
    cluster.consumer.transport.holds_reads = True
    start(cluster)
    for end in (4, 8, 12, 16):
        compute(cluster, range(end - 4, end))
        cluster.settle()
    assert cluster.consumer.transport.num_posted == 2
    assert len(cluster.consumer.transport.unfinished) == 2
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.transport.num_posted == 3
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.result("c").num_stretches == 3
    assert cluster.consumer.result("c").num_bytes == 2 * 4 * BLOCK_BYTES
    assert arrived(cluster)


def test_only_the_missing_suffix_is_streamed(cluster: FakeCluster) -> None:
    start(cluster, first_token=8)
    compute(cluster, range(8))
    cluster.settle()
    assert cluster.consumer.transport.num_posted == 0
    compute(cluster, range(8, TOKENS))
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.result("c").num_bytes == 2 * 2 * BLOCK_BYTES
    assert not any(cache[HERE[:2]].any() for cache in cluster.consumer.caches)


def test_one_read_may_take_long_as_long_as_it_ends(cluster: FakeCluster) -> None:
    start(cluster)
    for end in (4, 8, 12, 16):
        cluster.clock.advance(TIMEOUTS.read_s / 2)
        compute(cluster, range(end - 4, end))
        cluster.network.deliver()
        if end == 8:  # by now the fetch is as old as a read may become
            assert not cluster.consumer.is_reported("c")
        cluster.clock.now -= TIMEOUTS.read_s / 2 - 1
        cluster.settle()
    assert cluster.consumer.outcome("c") is None


def test_a_fetch_may_wait_for_the_prompt_longer_than_a_read_may_take(
    cluster: FakeCluster,
) -> None:
    start(cluster)
    compute(cluster, range(8))
    cluster.pass_time(TIMEOUTS.read_s + 10)
    assert not cluster.consumer.is_reported("c")
    compute(cluster, range(8, TOKENS))
    cluster.settle()
    assert cluster.consumer.outcome("c") is None


# --- lost messages ---------------------------------------------------------------------------


def test_a_lost_announcement_is_made_up_for_by_the_next(cluster: FakeCluster) -> None:
    start(cluster)
    compute(cluster, range(8))
    assert cluster.network.lose("announce") == 1
    compute(cluster, range(8, TOKENS))
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert arrived(cluster)


def test_a_lost_message_leaves_a_gap_and_the_whole_tables_are_asked_for(
    cluster: FakeCluster,
) -> None:
    start(cluster)
    for end in (8, TOKENS):
        compute(cluster, range(end - 8, end), blocks=THERE[: end // BLOCK_TOKENS])
        cluster.network.deliver_kind("announce")
        if end == 8:
            assert cluster.network.lose("progress") == 1
    cluster.settle()
    assert cluster.network.delivered.count("subscribe") == 2
    assert cluster.consumer.outcome("c") is None
    assert arrived(cluster)


def test_messages_that_come_twice_count_once_while_streaming(cluster: FakeCluster) -> None:
    start(cluster)
    for end in (8, TOKENS):
        compute(cluster, range(end - 8, end))
        while cluster.network.in_flight:
            cluster.network.in_flight.insert(0, cluster.network.in_flight[0])
            cluster.network.deliver_one()
            cluster.network.deliver_one()
            cluster.consumer.turn()
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.result("c").num_bytes == 2 * 4 * BLOCK_BYTES
    assert arrived(cluster)


# --- preemption ------------------------------------------------------------------------------


def test_after_a_preemption_everything_is_read_again(cluster: FakeCluster) -> None:
    start(cluster)
    compute(cluster, range(8))
    cluster.settle()
    cluster.producer.preempt("p")
    overwrite(cluster)
    cluster.settle()
    assert not cluster.consumer.is_reported("c")
    compute(cluster, range(TOKENS), blocks=ELSEWHERE)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert arrived(cluster)
    assert cluster.consumer.result("c").num_bytes == 2 * 6 * BLOCK_BYTES


def test_reads_of_an_earlier_epoch_end_before_new_ones_are_posted(cluster: FakeCluster) -> None:
    transport = cluster.consumer.transport
    transport.holds_reads = True
    start(cluster)
    compute(cluster, range(4))
    cluster.settle()
    compute(cluster, range(4, 8))
    cluster.settle()
    assert transport.num_posted == 2
    cluster.producer.preempt("p")
    overwrite(cluster)
    compute(cluster, range(TOKENS), blocks=ELSEWHERE)
    cluster.settle()
    assert transport.num_posted == 2
    transport.finish_reads()
    assert holds_stale_bytes(cluster)
    cluster.settle()
    assert transport.num_posted == 3
    assert not cluster.consumer.is_reported("c")
    transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert arrived(cluster)


def test_a_preemption_while_the_commit_is_under_way_starts_the_fetch_afresh(
    cluster: FakeCluster,
) -> None:
    start(cluster)
    compute(cluster, range(TOKENS))
    while "commit" not in [packet.kind for packet in cluster.network.in_flight]:
        cluster.network.deliver_one()
        cluster.consumer.turn()
    cluster.producer.preempt("p")
    overwrite(cluster)
    cluster.settle()
    assert not cluster.consumer.is_reported("c")
    compute(cluster, range(TOKENS), blocks=ELSEWHERE)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert arrived(cluster)


def test_a_preemption_that_is_learnt_of_by_a_gap_while_committing_starts_the_fetch_afresh(
    cluster: FakeCluster,
) -> None:
    start(cluster)
    compute(cluster, range(TOKENS))
    while "commit" not in [packet.kind for packet in cluster.network.in_flight]:
        cluster.network.deliver_one()
        cluster.consumer.turn()
    commit = cluster.network.in_flight.pop()
    cluster.producer.preempt("p")
    overwrite(cluster)
    cluster.network.lose("progress")
    compute(cluster, range(4), blocks=ELSEWHERE[:1])
    cluster.network.deliver_kind("announce")
    cluster.network.lose("progress")
    compute(cluster, range(4, TOKENS), blocks=ELSEWHERE)
    cluster.settle()
    cluster.network.in_flight.append(commit)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert arrived(cluster)


def test_announcements_of_a_step_that_was_preempted_start_no_read(cluster: FakeCluster) -> None:
    start(cluster)
    compute(cluster, range(8))  # announced, and under way
    cluster.producer.preempt("p")
    cluster.settle()
    assert cluster.consumer.transport.num_posted == 0


# Heard of by its first progress only, and that with a gap: the news itself was lost.
@pytest.mark.parametrize("order", ["progress first", "commit answered first"])
def test_a_new_epoch_that_begins_with_a_gap_voids_what_was_read_before(
    cluster: FakeCluster, order: str
) -> None:
    start(cluster)
    compute(cluster, range(8))
    cluster.settle()
    cluster.producer.preempt("p")
    assert cluster.network.lose("progress") == 1
    compute(cluster, range(4), blocks=ELSEWHERE[:1])
    cluster.network.deliver_kind("announce")
    assert cluster.network.lose("progress") == 1
    if order == "commit answered first":
        cluster.clock.advance(VOUCH_S)
        cluster.consumer.turn()
    overwrite(cluster)
    compute(cluster, range(4, 8), blocks=ELSEWHERE[:2])
    cluster.settle()
    cluster.clock.advance(VOUCH_S)
    cluster.settle()
    compute(cluster, range(8, TOKENS), blocks=ELSEWHERE)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert arrived(cluster)


def test_bytes_of_an_earlier_epoch_are_never_vouched_for_by_a_later_one(
    cluster: FakeCluster,
) -> None:
    transport = cluster.consumer.transport
    start(cluster)
    compute(cluster, range(8))
    cluster.network.deliver()  # the read is posted, and waits for its first poll
    overwrite(cluster)
    cluster.producer.preempt("p")
    assert cluster.network.lose("progress") == 1
    cluster.consumer.turn()
    assert holds_stale_bytes(cluster)
    compute(cluster, range(4), blocks=ELSEWHERE[:1])
    cluster.network.deliver_kind("announce")
    assert cluster.network.lose("progress") == 1
    compute(cluster, range(4, 8), blocks=ELSEWHERE[:2])
    transport.holds_reads = True
    cluster.network.deliver()
    for _ in range(3):
        cluster.clock.advance(VOUCH_S)
        cluster.settle()
    transport.fail_reads()
    cluster.settle()
    result = cluster.consumer.result("c")
    assert result.reason is Reason.READ_FAILED
    assert arrived(cluster, result.valid_tokens)
    assert result.valid_tokens == 0


# --- what is kept when it fails --------------------------------------------------------------


def vouched(cluster: FakeCluster) -> None:
    """A fetch of which the first half has arrived, and the producer has vouched for it."""
    start(cluster)
    compute(cluster, range(8))
    cluster.settle()
    assert "commit" not in cluster.network.delivered
    cluster.clock.advance(VOUCH_S)
    cluster.settle()
    assert cluster.network.delivered.count("commit") == 1
    assert cluster.network.delivered.count("committed") == 1


def test_what_was_vouched_for_is_kept_when_the_producer_dies(cluster: FakeCluster) -> None:
    vouched(cluster)
    compute(cluster, range(8, 12))
    cluster.settle()  # arrived, but nobody has said that it is valid
    cluster.producer.kill()
    cluster.clock.advance(VOUCH_S)
    cluster.settle()
    cluster.clock.advance(TIMEOUT_S)
    cluster.settle()
    result = cluster.consumer.result("c")
    assert (result.reason, result.valid_tokens) == (Reason.PEER_UNREACHABLE, 8)
    assert arrived(cluster, 8)


def test_what_was_vouched_for_is_kept_when_the_producer_s_request_is_aborted(
    cluster: FakeCluster,
) -> None:
    vouched(cluster)
    cluster.producer.drop("p")
    overwrite(cluster)
    cluster.settle()
    result = cluster.consumer.result("c")
    assert (result.reason, result.valid_tokens) == (Reason.PRODUCER_ENDED, 8)
    assert arrived(cluster, 8)


def test_what_was_vouched_for_before_a_preemption_is_not_kept(cluster: FakeCluster) -> None:
    vouched(cluster)
    cluster.producer.preempt("p")
    cluster.settle()
    cluster.producer.drop("p")
    cluster.settle()
    assert cluster.consumer.result("c").valid_tokens == 0


def test_nothing_is_kept_that_nobody_has_vouched_for(cluster: FakeCluster) -> None:
    start(cluster)
    compute(cluster, range(8))
    cluster.settle()
    assert arrived(cluster, 8)
    cluster.producer.drop("p")
    cluster.settle()
    assert cluster.consumer.result("c").valid_tokens == 0


def test_a_question_now_and_then_is_enough(cluster: FakeCluster) -> None:
    vouched(cluster)
    cluster.pass_time(10 * VOUCH_S, step_s=0.05)
    assert cluster.network.delivered.count("commit") == 1  # nothing more has arrived
    for end in (12, 14, 15):
        compute(cluster, range(end - 1, end))
        cluster.settle()
    cluster.pass_time(VOUCH_S, step_s=0.05)
    assert cluster.network.delivered.count("commit") == 2


# The answer to one question says nothing of what arrived after it was asked.
def test_an_answer_vouches_only_for_what_had_arrived_when_it_was_asked_for(
    cluster: FakeCluster,
) -> None:
    start(cluster)
    compute(cluster, range(8))
    cluster.settle()
    cluster.consumer.transport.holds_reads = True
    compute(cluster, range(8, 12))
    cluster.network.deliver()
    cluster.clock.advance(VOUCH_S)
    cluster.consumer.turn()
    cluster.network.deliver_kind("commit")  # granted; the answer takes its time
    cluster.producer.drop("p")
    read_stale(cluster)
    cluster.clock.advance(VOUCH_S)
    cluster.consumer.turn()
    assert not arrived(cluster, 12)
    under_way = [packet.kind for packet in cluster.network.in_flight]
    assert under_way[:2] == ["committed", "refuse"]
    cluster.settle()
    result = cluster.consumer.result("c")
    assert result.reason is Reason.PRODUCER_ENDED
    assert arrived(cluster, result.valid_tokens)
    assert result.valid_tokens == 8


# --- nothing stale is ever used --------------------------------------------------------------


def read_stale(cluster: FakeCluster) -> None:
    """The reads that are under way end, too late: their bytes are another's by now."""
    overwrite(cluster)
    cluster.consumer.transport.finish_reads()
    cluster.consumer.transport.holds_reads = False


def reading(cluster: FakeCluster) -> Source:
    cluster.consumer.transport.holds_reads = True
    source = start(cluster)
    compute(cluster, range(TOKENS))
    cluster.settle()
    assert cluster.consumer.transport.unfinished
    return source


def test_a_read_that_comes_after_an_abort_is_never_used(cluster: FakeCluster) -> None:
    reading(cluster)
    cluster.producer.drop("p")
    read_stale(cluster)
    assert holds_stale_bytes(cluster)
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.PRODUCER_ENDED
    assert cluster.consumer.result("c").valid_tokens == 0


def test_a_read_that_comes_after_the_lease_is_never_used(cluster: FakeCluster) -> None:
    reading(cluster)
    cluster.producer.seal("p", THERE)
    cluster.clock.advance(LEASE_S)
    cluster.producer.turn()
    assert cluster.producer.released() == ["p"]
    read_stale(cluster)
    assert holds_stale_bytes(cluster)
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.LEASE_EXPIRED
    assert cluster.consumer.result("c").valid_tokens == 0


def test_a_read_that_comes_after_a_preemption_is_never_used(cluster: FakeCluster) -> None:
    reading(cluster)
    cluster.producer.preempt("p")
    read_stale(cluster)
    assert holds_stale_bytes(cluster)
    cluster.settle()
    assert not cluster.consumer.is_reported("c")
    compute(cluster, range(TOKENS), blocks=ELSEWHERE)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert arrived(cluster)


@pytest.mark.parametrize("how", ["abort", "expiry", "preemption"])
def test_but_for_the_commit_stale_bytes_would_be_used(cluster: FakeCluster, how: str) -> None:
    """The three tests above mean nothing if the bytes were right by chance. Here the producer's
    answer is replaced by the yes that it refuses, and the consumer takes stale bytes for KV."""
    source = reading(cluster)
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
    read_stale(cluster)
    cluster.consumer.turn()
    (commit,) = cluster.network.in_flight
    assert commit.message == wire.Commit(source.handoff_id, 0, 0, True)
    commit.deliver()
    cluster.network.in_flight.remove(commit)
    (refusal,) = cluster.network.in_flight
    assert not isinstance(refusal.message, wire.Committed)
    assert holds_stale_bytes(cluster)  # at the very moment at which the no is on its way
    header, _ = wire.decode(refusal.frames)
    yes = wire.Committed(source.handoff_id, 0, True)
    cluster.network.links[refusal.lane[0]].on_message(
        wire.encode(yes, header.sender, header.target)
    )
    assert cluster.consumer.outcome("c") is None
    assert holds_stale_bytes(cluster)


# --- announcements and restarts --------------------------------------------------------------


def test_an_announcement_of_a_foreign_worker_moves_nothing(cluster: FakeCluster) -> None:
    start(cluster)
    step = cluster.producer.advance("p", TOKENS, THERE)
    announce = wire.Announce(step, 0, 2)
    frames = wire.encode(
        announce,
        cluster.consumer.worker.incarnation,
        cluster.producer.identity.incarnation,
    )
    cluster.producer.control.receive(b"foreign", frames)
    cluster.settle()
    assert cluster.consumer.transport.num_posted == 0
    assert cluster.producer.control.dropped_messages == 1


def test_a_restart_in_the_middle_of_a_stream_fails_the_fetch(cluster: FakeCluster) -> None:
    start(cluster)
    compute(cluster, range(8))
    cluster.settle()
    cluster.restart_producer()
    cluster.clock.advance(VOUCH_S)
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.PEER_RESTARTED
    assert cluster.consumer.result("c").valid_tokens == 0


def test_a_handoff_that_is_wanted_of_anybody_is_fetched_from_a_restarted_producer(
    cluster: FakeCluster,
) -> None:
    source = cluster.producer.enqueue("p", TOKENS)
    cluster.consumer.control.want("c", dataclasses.replace(source, incarnation=None))
    cluster.settle()
    cluster.restart_producer()
    cluster.pass_time(2)
    cluster.producer.enqueue("p", TOKENS, source.handoff_id)
    cluster.producer.control.open(source.handoff_id)
    cluster.settle()
    (offer,) = cluster.consumer.offers()
    assert offer.source.incarnation == cluster.producer.identity.incarnation
    cluster.consumer.control.allocated("c")
    cluster.consumer.fetch("c", offer.source, HERE, offer.num_tokens)
    compute(cluster, range(TOKENS))
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert arrived(cluster)


# --- sleeping --------------------------------------------------------------------------------


def test_between_two_stretches_the_thread_sleeps(cluster: FakeCluster) -> None:
    start(cluster)
    compute(cluster, range(8))
    cluster.settle()
    cluster.clock.advance(VOUCH_S)
    cluster.settle()
    wait = cluster.consumer.plane.turn()
    assert wait is not None
    assert wait > 1.0


# Nothing else wakes the thread then: no read is under way, and the producer is silent.
def test_the_thread_wakes_to_ask_whether_what_arrived_is_valid(cluster: FakeCluster) -> None:
    start(cluster)
    compute(cluster, range(8))
    cluster.settle()
    wait = cluster.consumer.plane.turn()
    assert wait is not None
    assert wait <= VOUCH_S


def test_nothing_is_left_open_after_a_stream(cluster: FakeCluster) -> None:
    start(cluster)
    for end in (8, TOKENS):
        compute(cluster, range(end - 8, end))
        cluster.settle()
    cluster.producer.seal("p", THERE)
    cluster.settle()
    for engine in (cluster.producer, cluster.consumer):
        assert set(engine.open_handoffs().values()) == {0}
        assert engine.plane.turn() is None


# --- what it costs ---------------------------------------------------------------------------


def test_the_control_traffic_of_a_handoff_is_two_kib_and_128_bytes_a_stretch(
    cluster: FakeCluster,
) -> None:
    consumer = cluster.consumer
    source = cluster.producer.begin("before", 1)
    consumer.control.want("known", source)
    consumer.fetch("known", source, HERE[:1], 1)
    cluster.settle()  # each has introduced itself

    def traffic() -> int:
        return consumer.control.control_bytes + consumer.plane.control_bytes

    before = traffic()
    start(cluster)
    for end in range(1, TOKENS + 1):
        compute(cluster, range(end - 1, end))
        cluster.settle()
    cluster.producer.seal("p", THERE)
    cluster.settle()
    result = consumer.result("c")
    assert result.reason is None
    assert result.num_stretches >= 3
    assert 0 < traffic() - before <= 2048 + 128 * TOKENS
