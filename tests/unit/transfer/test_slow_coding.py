"""Pieces that take their time between the staging memory and the cache, as on a GPU."""

from __future__ import annotations

import pytest

from tests.fakes.packing import PackingCluster
from tests.fakes.streaming import TOKENS
from vllm_pd_plugin.errors import PeerError, Reason


@pytest.fixture
def cluster() -> PackingCluster:
    """A prompt that is complete, and a fetch of it whose pieces have been read and are still to be
    taken in."""
    cluster = PackingCluster()
    cluster.start()
    cluster.settle()
    cluster.consumer.coder.holds = True
    cluster.compute(range(TOKENS))
    cluster.settle()
    assert cluster.consumer.coder.under_way
    return cluster


def test_nothing_is_committed_before_it_is_in_the_cache(cluster: PackingCluster) -> None:
    assert "commit" not in cluster.network.delivered
    assert not cluster.consumer.is_reported("c")
    cluster.consumer.coder.holds = False
    cluster.consumer.coder.finish()
    cluster.pass_time(1)
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()
    assert cluster.is_empty()


def test_staging_memory_is_kept_until_it_was_taken_in(cluster: PackingCluster) -> None:
    taken = cluster.consumer.incoming.taken_bytes
    assert taken > 0
    cluster.pass_time(1)
    assert cluster.consumer.incoming.taken_bytes == taken


def test_a_fetch_that_is_cancelled_ends_when_nothing_is_written_any_more(
    cluster: PackingCluster,
) -> None:
    cluster.consumer.plane.cancel("c", Reason.ABORTED)
    cluster.pass_time(1)
    assert not cluster.consumer.is_reported("c")
    cluster.consumer.coder.finish()
    cluster.pass_time(1)
    assert cluster.consumer.outcome("c") is Reason.ABORTED
    cluster.close()
    assert cluster.is_empty()


def test_a_connection_that_is_lost_waits_for_what_is_being_taken_in(
    cluster: PackingCluster,
) -> None:
    plane = cluster.consumer.plane
    peer = cluster.consumer.attempt("c").peer
    assert peer is not None
    plane._peers.drop(peer, PeerError(Reason.PEER_UNREACHABLE, "gone"))
    assert cluster.consumer.is_reported("c")
    assert not cluster.consumer.coder.under_way, "it was reported while something was written"
    assert cluster.consumer.incoming.taken_bytes == 0


def test_a_device_that_fails_ends_the_fetch(
    cluster: PackingCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    (coding,) = cluster.consumer.coder.under_way

    def fail() -> bool:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(coding, "is_done", fail)
    cluster.pass_time(10)
    assert cluster.consumer.outcome("c") is Reason.INTERNAL
    assert cluster.consumer.incoming.taken_bytes == 0
