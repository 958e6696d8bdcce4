"""Fetches are looked at when they have something to do, however many wait beside them."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.fakes.fetching import FetchingCluster
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.transfer.fetch import Fetch

MANY = 50


class Looks:
    """Which fetches were driven."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        poll = Fetch.poll

        def count(fetch: Fetch) -> None:
            self.counts[fetch.spec.request_id] += 1
            poll(fetch)

        monkeypatch.setattr(Fetch, "poll", count)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    return Looks(monkeypatch)


@pytest.fixture
def cluster() -> FetchingCluster:
    """Many fetches whose prompts are still to be computed."""
    cluster = FetchingCluster()
    for number in range(MANY):
        source = cluster.producer.begin(f"p{number}", 8)
        cluster.start(f"c{number}", source)
    cluster.settle()
    return cluster


def test_fetches_that_wait_are_not_looked_at(cluster: FetchingCluster, looks: Looks) -> None:
    for _ in range(100):
        cluster.consumer.plane.turn()
    assert not looks.counts


def test_one_that_is_told_something_is_looked_at_alone(
    cluster: FetchingCluster, looks: Looks
) -> None:
    cluster.producer.seal("p7", [3, 4])
    cluster.settle()
    assert cluster.consumer.outcome("c7") is None
    assert set(looks.counts) == {"c7"}


def test_those_that_hear_nothing_ask_again_in_time(cluster: FetchingCluster, looks: Looks) -> None:
    cluster.clock.advance(2.0)
    cluster.consumer.plane.turn()
    assert len(looks.counts) == MANY
    asked = [packet.kind for packet in cluster.network.in_flight].count("subscribe")
    assert asked == MANY
    cluster.settle()
    looks.counts.clear()
    cluster.consumer.plane.turn()
    assert not looks.counts


def test_one_that_has_ended_is_never_looked_at_again(
    cluster: FetchingCluster, looks: Looks
) -> None:
    cluster.consumer.plane.cancel("c3", Reason.ABORTED)
    assert cluster.consumer.outcome("c3") is Reason.ABORTED
    cluster.pass_time(10)
    assert looks.counts["c3"] == 0
    assert looks.counts["c4"] > 0
    assert "c3" not in cluster.consumer.plane._alarms
    plane = cluster.consumer.plane
    assert len(plane._peers._by_handoff) == len(plane._fetches) == MANY - 1


def test_a_plane_without_fetches_keeps_nothing_of_them(cluster: FetchingCluster) -> None:
    plane = cluster.consumer.plane
    for number in range(MANY):
        plane.cancel(f"c{number}", Reason.ABORTED)
    assert not plane._fetches
    assert not plane._peers._by_address
    assert not plane._peers._by_handoff
    assert len(plane._alarms) == 0
