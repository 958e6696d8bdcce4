"""A prompt that is preempted while it is fetched is fetched again."""

from __future__ import annotations

import pytest

from tests.fakes.memory import BLOCK_BYTES
from tests.fakes.streaming import ELSEWHERE, TOKENS, VOUCH_S, StreamingCluster
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.protocol import wire


@pytest.fixture
def cluster() -> StreamingCluster:
    return StreamingCluster()


def start_committing(cluster: StreamingCluster) -> None:
    """A fetch that has read everything, and whose commit is under way."""
    cluster.start()
    cluster.compute(range(TOKENS))
    cluster.deliver_until("commit")


def test_after_a_preemption_everything_is_read_again(cluster: StreamingCluster) -> None:
    cluster.start()
    cluster.compute(range(8))
    cluster.settle()
    cluster.producer.preempt("p")
    cluster.overwrite()
    cluster.settle()
    assert not cluster.consumer.is_reported("c")
    cluster.compute(range(TOKENS), blocks=ELSEWHERE)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()
    assert cluster.consumer.result("c").counts.wire_bytes == 2 * 6 * BLOCK_BYTES


def test_no_block_is_written_by_a_new_read_while_an_old_one_may_still_write_to_it(
    cluster: StreamingCluster,
) -> None:
    transport = cluster.consumer.transport
    transport.holds_reads = True
    cluster.start()
    cluster.compute(range(8))
    cluster.settle()
    assert transport.num_posted == 1
    cluster.producer.preempt("p")
    cluster.overwrite()
    cluster.compute(range(TOKENS), blocks=ELSEWHERE)
    cluster.settle()
    assert transport.num_posted == 1
    transport.finish_reads()
    cluster.settle()
    assert cluster.holds_stale_bytes()
    assert transport.num_posted == 2
    transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()


def test_reads_of_an_earlier_epoch_end_before_new_ones_are_posted(
    cluster: StreamingCluster,
) -> None:
    transport = cluster.consumer.transport
    transport.holds_reads = True
    cluster.start()
    cluster.compute(range(4))
    cluster.settle()
    cluster.compute(range(4, 8))
    cluster.settle()
    assert transport.num_posted == 2
    cluster.producer.preempt("p")
    cluster.overwrite()
    cluster.compute(range(TOKENS), blocks=ELSEWHERE)
    cluster.settle()
    assert transport.num_posted == 2
    transport.finish_reads()
    assert cluster.holds_stale_bytes()
    cluster.settle()
    assert transport.num_posted == 3
    assert not cluster.consumer.is_reported("c")
    transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()


def test_a_preemption_while_the_commit_is_under_way_starts_the_fetch_afresh(
    cluster: StreamingCluster,
) -> None:
    start_committing(cluster)
    cluster.producer.preempt("p")
    cluster.overwrite()
    cluster.settle()
    assert not cluster.consumer.is_reported("c")
    cluster.compute(range(TOKENS), blocks=ELSEWHERE)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()


def test_a_preemption_that_is_learnt_of_by_a_gap_while_committing_starts_the_fetch_afresh(
    cluster: StreamingCluster,
) -> None:
    start_committing(cluster)
    commit = cluster.network.in_flight.pop()
    assert isinstance(commit.message, wire.Commit)
    cluster.preempt_unheard()
    cluster.compute(range(4, TOKENS), blocks=ELSEWHERE)
    cluster.settle()
    cluster.network.in_flight.append(commit)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()


def test_announcements_of_a_step_that_was_preempted_start_no_read(
    cluster: StreamingCluster,
) -> None:
    cluster.start()
    cluster.compute(range(8))  # announced, and under way
    cluster.producer.preempt("p")
    cluster.settle()
    assert cluster.consumer.transport.num_posted == 0


# Heard of by its first progress only, and that with a gap: the news itself was lost.
@pytest.mark.parametrize("order", ["progress first", "commit answered first"])
def test_a_new_epoch_that_begins_with_a_gap_voids_what_was_read_before(
    cluster: StreamingCluster, order: str
) -> None:
    cluster.start()
    cluster.compute(range(8))
    cluster.settle()
    cluster.preempt_unheard()
    if order == "commit answered first":
        cluster.clock.advance(VOUCH_S)
        cluster.consumer.turn()
    cluster.compute(range(4, 8), blocks=ELSEWHERE[:2])
    cluster.settle()
    cluster.clock.advance(VOUCH_S)
    cluster.settle()
    cluster.compute(range(8, TOKENS), blocks=ELSEWHERE)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()


def test_bytes_of_an_earlier_epoch_are_never_vouched_for_by_a_later_one(
    cluster: StreamingCluster,
) -> None:
    transport = cluster.consumer.transport
    cluster.start()
    cluster.compute(range(8))
    cluster.network.deliver()  # the read is posted, and waits for its first poll
    cluster.preempt_unheard()
    cluster.consumer.turn()
    assert cluster.holds_stale_bytes()
    cluster.compute(range(4, 8), blocks=ELSEWHERE[:2])
    transport.holds_reads = True
    cluster.network.deliver()
    for _ in range(3):
        cluster.clock.advance(VOUCH_S)
        cluster.settle()
    transport.fail_reads()
    cluster.settle()
    result = cluster.consumer.result("c")
    assert result.reason is Reason.READ_FAILED
    assert result.valid_tokens == 0
