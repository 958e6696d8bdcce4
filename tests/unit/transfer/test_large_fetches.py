"""Stretches of more blocks than are planned, or read, at once."""

from __future__ import annotations

import pytest

from tests.fakes.streaming import TOKENS, StreamingCluster
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.transfer import peer_reads


@pytest.fixture(params=[(3, 2, 2**20), (100, 1, 2**20), (100, 100, 20), (1, 1, 1)], ids=str)
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StreamingCluster:
    """Blocks of one plan, descriptors and bytes of one read: less than there are."""
    blocks, descriptors, num_bytes = request.param
    monkeypatch.setattr(peer_reads, "_MAX_BLOCKS", blocks)
    monkeypatch.setattr(peer_reads, "_MAX_DESCRIPTORS", descriptors)
    cluster = StreamingCluster()
    cluster.consumer.transport.max_read_bytes = num_bytes
    return cluster


def test_all_of_it_arrives_and_is_counted(cluster: StreamingCluster) -> None:
    cluster.start()
    cluster.compute(range(TOKENS))
    cluster.settle()
    cluster.producer.seal("p", [3, 4, 5, 6])
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()
    counts = cluster.consumer.result("c").counts
    assert counts.stretches > 1
    assert counts.wire_bytes == counts.kv_bytes == 2 * 4 * 32


def test_two_reads_are_under_way_at_the_most(cluster: StreamingCluster) -> None:
    cluster.start_reading()
    assert len(cluster.consumer.transport.unfinished) == peer_reads.MAX_READS


def test_nothing_is_vouched_for_before_the_last_part_has_arrived(
    cluster: StreamingCluster,
) -> None:
    cluster.start_reading()
    for _ in range(2):
        cluster.consumer.transport.finish_one(0)
        cluster.consumer.look_at_reads()
    cluster.pass_time(1)
    assert "commit" not in cluster.network.delivered
    cluster.consumer.plane.cancel("c", Reason.ABORTED)
    cluster.consumer.transport.finish_reads()
    cluster.pass_time(1)
    result = cluster.consumer.result("c")
    assert (result.reason, result.valid_tokens) == (Reason.ABORTED, 0)


def test_a_preemption_in_the_middle_voids_the_parts_that_are_still_to_come(
    cluster: StreamingCluster,
) -> None:
    cluster.start_reading()
    cluster.producer.preempt("p")
    cluster.overwrite()
    cluster.settle()
    cluster.finish_reads_too_late()
    cluster.settle()
    for end in (8, TOKENS):
        cluster.compute(range(end - 8, end), blocks=[13, 14, 15, 16][: end // 4])
        cluster.settle()
    cluster.producer.seal("p", [13, 14, 15, 16])
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()


def test_a_defect_while_a_message_is_taken_in_ends_the_fetch(
    cluster: StreamingCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was taken up and not read would be missing, and be committed all the same."""
    cluster.start()
    reads = cluster.consumer.attempt("c")._reads
    assert reads is not None
    stretches = reads.stretches
    plan = stretches.plan

    def broken(stretch: object) -> None:
        monkeypatch.setattr(stretches, "plan", plan, raising=True)
        raise RuntimeError("a defect")

    monkeypatch.setattr(stretches, "plan", broken)
    cluster.compute(range(8))
    cluster.settle()
    cluster.compute(range(8, TOKENS))
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.INTERNAL
    assert cluster.consumer.plane.faults == 1
