"""Connections that nobody needs, and addresses that there is no connecting to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes.cluster import FakeCluster
from tests.fakes.network import FakeNetwork
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.ids import Address, Source, new_handoff_id
from vllm_pd_plugin.protocol.events import Lost
from vllm_pd_plugin.protocol.peers import IDLE_S, MAX_CONNECTIONS

LEASE_S = 8.0


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(lease_s=LEASE_S)


def links(cluster: FakeCluster) -> int:
    return cluster.network.open_links(cluster.producer_address)


def fetched(cluster: FakeCluster, request_id: str = "c") -> None:
    """A handoff that went well, with connections of the scheduler's and the worker's."""
    source = cluster.offer(request_id)
    cluster.consumer.fetch(request_id, source, [5, 6], 8)
    cluster.settle()
    assert cluster.consumer.outcome(request_id) is None
    cluster.consumer.control.close(request_id, cancel=False)


def test_a_peer_that_nobody_needs_is_let_go_of(cluster: FakeCluster) -> None:
    fetched(cluster)
    assert links(cluster) == 2
    cluster.pass_time(IDLE_S + 1, step_s=10.0)
    assert links(cluster) == 0
    assert not cluster.consumer.plane._peers._names
    assert not cluster.consumer.plane._peers._rates
    fetched(cluster, "again")


def test_a_peer_with_something_under_way_is_kept_however_long_it_takes(
    cluster: FakeCluster,
) -> None:
    source = cluster.producer.begin("p", 8)
    cluster.want("c", source)
    cluster.consumer.control.allocated("c")
    cluster.pass_time(2 * IDLE_S, step_s=1.0)
    assert links(cluster) == 1
    assert cluster.consumer.lost() == {}


class Refusing:
    """Connects to no address but one."""

    def __init__(self, network: FakeNetwork, allowed: Address) -> None:
        self._network, self._allowed = network, allowed

    def __call__(self, address: Address, on_message: Callable[[list[bytes]], None]) -> Any:
        if address != self._allowed:
            raise PeerError(Reason.PEER_UNREACHABLE, "no such host")
        return self._network.connect(address, on_message)


def at(host: str) -> Source:
    return Source(new_handoff_id(), (host, 5000), None)


def test_an_address_that_there_is_no_connecting_to_fails_its_request_only(
    cluster: FakeCluster,
) -> None:
    peers = cluster.consumer.control._wanting._peers
    peers._connect = Refusing(cluster.network, cluster.producer_address)
    source = cluster.producer.begin("p", 8)
    cluster.want("good", source)
    cluster.want("bad", at("nowhere"))
    assert cluster.consumer.lost() == {"bad": Reason.PEER_UNREACHABLE}
    cluster.pass_time(3 * LEASE_S)  # its heartbeats and deadlines go on
    assert cluster.producer.abandoned() == []
    assert set(cluster.consumer.lost()) == {"bad"}
    assert cluster.consumer.control.faults == 0


def test_a_defect_in_connecting_fails_its_request_only(cluster: FakeCluster) -> None:
    class Broken(Refusing):
        def __call__(self, address: Address, on_message: Callable[[list[bytes]], None]) -> Any:
            if address != self._allowed:
                raise RuntimeError("a defect")
            return super().__call__(address, on_message)

    peers = cluster.consumer.control._wanting._peers
    peers._connect = Broken(cluster.network, cluster.producer_address)
    source = cluster.producer.begin("p", 8)
    cluster.want("good", source)
    cluster.want("bad", at("nowhere"))
    cluster.pass_time(3 * LEASE_S)
    assert cluster.producer.abandoned() == []
    assert cluster.consumer.lost() == {"bad": Reason.PEER_UNREACHABLE}
    assert cluster.consumer.control.faults == 1


def test_ten_thousand_peers_over_a_life_exhaust_nothing(cluster: FakeCluster) -> None:
    control, network = cluster.consumer.control, cluster.network
    for number in range(10_000):
        control.want(f"r{number}", at(f"host-{number}"))
        control.close(f"r{number}", cancel=number % 2 == 0)
        network.in_flight.clear()  # nobody answers
        if number % 100 == 0:
            cluster.clock.advance(1.0)
            control.turn()
    cluster.clock.advance(IDLE_S)
    control.turn()
    control.turn()
    wanting = control._wanting
    assert len(wanting._peers) == len(wanting) == len(wanting._cancels) == 0
    assert len(wanting._heartbeats) == 0
    assert sum(not link.is_closed for link in network.links.values()) == 0
    assert control.faults == 0


def test_where_there_is_no_room_the_one_that_was_used_the_longest_ago_makes_it(
    cluster: FakeCluster,
) -> None:
    control, network = cluster.consumer.control, cluster.network
    for number in range(MAX_CONNECTIONS + 1):
        control.want(f"r{number}", at(f"host-{number}"))
        if number != 1:  # which is needed
            control.close(f"r{number}", cancel=False)
        cluster.clock.advance(0.001)
    assert len(control._wanting._peers) == MAX_CONNECTIONS
    closed = [link.address[0] for link in network.links.values() if link.is_closed]
    assert closed == ["host-0"]
    control.want("another", at("another"))
    closed = [link.address[0] for link in network.links.values() if link.is_closed]
    assert closed == ["host-0", "host-2"]
    assert cluster.consumer.lost() == {}


def test_a_connection_that_cannot_be_closed_is_forgotten_all_the_same(cluster: FakeCluster) -> None:
    def fail() -> None:
        raise OSError("not now")

    fetched(cluster)
    links = list(cluster.network.links.values())
    for link in links:
        link.close = fail  # type: ignore[method-assign]
    cluster.pass_time(IDLE_S + 1, step_s=10.0)
    assert len(cluster.consumer.control._wanting._peers) == 0
    assert cluster.consumer.control.faults == 1
    fetched(cluster, "again")


def test_where_too_many_peers_are_in_use_another_is_refused(cluster: FakeCluster) -> None:
    control = cluster.consumer.control
    for number in range(MAX_CONNECTIONS):
        control.want(f"r{number}", at(f"host-{number}"))
    control.want("one too many", at("another"))
    assert cluster.consumer.lost() == {"one too many": Reason.PEER_UNREACHABLE}
    (lost,) = (event for event in cluster.consumer.events if isinstance(event, Lost))
    assert str(MAX_CONNECTIONS) in lost.message


def test_what_cannot_be_sent_is_a_message_lost(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", 8)
    cluster.want("c", source)
    (link,) = cluster.network.links.values()

    def fail(frames: list[bytes]) -> None:
        raise OSError("no buffers")

    link.send = fail  # type: ignore[method-assign]
    cluster.pass_time(LEASE_S + 6)
    assert cluster.consumer.lost() == {"c": Reason.PEER_UNREACHABLE}
    assert cluster.consumer.control.faults > 0
    assert "heartbeat" not in cluster.network.delivered
