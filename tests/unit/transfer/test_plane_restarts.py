"""The transfer plane: producers that restart, fall silent or never finish."""

from __future__ import annotations

import pytest

from tests.fakes.engines import PEER_TIMEOUT_S
from tests.fakes.fetching import EMPTY, HERE, QUEUE_S, THERE, TOKENS, FetchingCluster
from vllm_pd_plugin.errors import Reason


@pytest.fixture
def cluster() -> FetchingCluster:
    return FetchingCluster()


def test_a_restarted_producer_refuses_the_old_commit_and_serves_the_next_request(
    cluster: FetchingCluster,
) -> None:
    cluster.start_committing("old")
    old = cluster.restart_producer()
    cluster.settle()
    assert cluster.consumer.outcome("old") is Reason.PEER_RESTARTED
    cluster.consumer.transport.holds_reads = False
    cluster.producer.fill(THERE, 0x22)
    cluster.start("new")
    cluster.settle()
    assert cluster.consumer.outcome("new") is None
    assert cluster.consumer.holds(HERE, 0x22)
    assert cluster.consumer.transport.removed == [old.transport.name]
    assert cluster.consumer.transport.connected == {cluster.producer.transport.name}


def test_a_new_request_finds_the_restarted_producer_while_an_old_read_hangs(
    cluster: FetchingCluster,
) -> None:
    cluster.start_reading("old")
    old = cluster.restart_producer()
    cluster.producer.fill(THERE, 0x22)
    cluster.start("new", blocks=[11, 12])
    cluster.settle()
    assert cluster.consumer.outcome("old") is Reason.PEER_RESTARTED
    assert cluster.consumer.transport.removed == [old.transport.name]
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("new") is None
    assert cluster.consumer.holds([11, 12], 0x22)
    assert cluster.consumer.holds(HERE, EMPTY)


def test_a_handoff_of_the_incarnation_before_fails(cluster: FetchingCluster) -> None:
    stale = cluster.sealed()
    cluster.start("first")
    cluster.settle()
    cluster.restart_producer()
    cluster.start("stale", stale)
    cluster.settle()
    assert cluster.consumer.outcome("stale") is Reason.PEER_RESTARTED


def test_a_wrong_incarnation_does_not_disturb_another_fetch_from_the_same_address(
    cluster: FetchingCluster,
) -> None:
    cluster.start_reading("honest")
    cluster.start("forged", cluster.invented(), blocks=[11, 12])
    cluster.settle()
    assert cluster.consumer.outcome("forged") is Reason.PEER_RESTARTED
    assert cluster.consumer.transport.removed == []
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("honest") is None


def test_a_wrong_incarnation_at_an_address_not_yet_known_fails_alone(
    cluster: FetchingCluster,
) -> None:
    cluster.start("forged", cluster.invented(), blocks=[11, 12])
    cluster.start("honest")
    cluster.settle()
    assert cluster.consumer.outcome("forged") is Reason.PEER_RESTARTED
    assert cluster.consumer.outcome("honest") is None


def test_a_silent_peer_is_unreachable_after_the_timeout(cluster: FetchingCluster) -> None:
    source = cluster.sealed()
    cluster.producer.kill()
    cluster.start(source=source)
    cluster.settle()
    assert cluster.consumer.plane.turn() == pytest.approx(PEER_TIMEOUT_S)
    cluster.clock.advance(PEER_TIMEOUT_S - 0.001)
    cluster.settle()
    assert cluster.consumer.results == []
    cluster.clock.advance(0.001)
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.PEER_UNREACHABLE
    assert cluster.consumer_is_idle()


def test_a_commit_that_is_never_answered_makes_the_peer_unreachable(
    cluster: FetchingCluster,
) -> None:
    cluster.start_committing()
    cluster.network.silence(cluster.producer_address)
    cluster.settle()
    cluster.clock.advance(PEER_TIMEOUT_S)
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.PEER_UNREACHABLE


def test_a_seal_that_never_comes_ends_at_the_fetch_s_own_deadline(cluster: FetchingCluster) -> None:
    cluster.start(source=cluster.producer.begin("p", TOKENS))
    cluster.pass_time(QUEUE_S - 1)
    assert cluster.consumer.results == []
    cluster.pass_time(1)
    assert cluster.consumer.outcome("c") is Reason.FETCH_TIMEOUT


def test_a_peer_that_comes_back_is_introduced_afresh(cluster: FetchingCluster) -> None:
    source = cluster.sealed()
    cluster.network.silence(cluster.producer_address)
    cluster.start("early", source)
    cluster.settle()
    cluster.clock.advance(PEER_TIMEOUT_S)
    cluster.settle()
    cluster.network.listen(cluster.producer_address, cluster.producer.control.receive)
    cluster.start("late", source)
    cluster.settle()
    assert cluster.consumer.outcome("early") is Reason.PEER_UNREACHABLE
    assert cluster.consumer.outcome("late") is None


def test_a_prompt_that_is_never_computed_to_its_end_ends_with_the_queue_timeout(
    cluster: FetchingCluster,
) -> None:
    cluster.start(source=cluster.producer.begin("p", TOKENS))
    cluster.producer.compute("p", TOKENS // 2, THERE[:1])
    cluster.pass_time(QUEUE_S - 1)
    assert cluster.consumer.transport.num_posted == 1
    assert cluster.consumer.results == []
    cluster.pass_time(1)
    assert cluster.consumer.outcome("c") is Reason.FETCH_TIMEOUT
