"""Hundreds of peers over real sockets: each connection that nobody needs is given back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from tests.fakes.clock import FakeClock
from tests.fakes.cluster import FakeCluster
from vllm_pd_plugin.errors import PeerError
from vllm_pd_plugin.ids import Address, EngineId, new_incarnation
from vllm_pd_plugin.net.channel import Dealer, Listener, Loop
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.peers import IDLE_S, Identity, Peer, PeerTable

NUM_PEERS = 300
DEADLINE_S = 30.0


class Anyone:
    """Takes every peer; needs those in ``needed``."""

    def __init__(self) -> None:
        self.ready: set[Address] = set()
        self.needed: set[Address] = set()
        self.let_go: set[Address] = set()

    def check_fit(self, welcome: wire.Welcome) -> None:
        """Any fits."""

    def peer_ready(self, address: Address, peer: Peer) -> None:
        self.ready.add(address)

    def peer_lost(self, address: Address, error: PeerError) -> None:
        raise AssertionError(f"{address}: {error}")

    def peer_replied(self, peer: Peer, message: wire.Message) -> None:
        """Not asked."""

    def needs_peer(self, address: Address) -> bool:
        return address in self.needed

    def peer_let_go(self, address: Address) -> None:
        self.let_go.add(address)


@pytest.fixture
def port() -> Iterator[int]:
    """Where a producer listens, at all addresses of the loopback: each is a peer to others."""
    cluster = FakeCluster()
    loop = Loop("server", lambda: None)
    control = cluster.producer.control
    listener = Listener(loop, ("0.0.0.0", 0), None, control.receive)
    control._outbox._send = listener.send
    loop.start()
    yield listener.port
    loop.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_three_hundred_peers_over_real_sockets_exhaust_nothing(port: int) -> None:
    clock, anyone = FakeClock(), Anyone()
    loop = Loop("client", lambda: None)
    table = PeerTable(
        Identity(EngineId("client"), new_incarnation()),
        DEADLINE_S,
        lambda address, on_message: Dealer(loop, address, None, on_message),
        clock,
        anyone,
    )
    peers = [(f"127.0.{n // 250}.{n % 250 + 1}", port) for n in range(NUM_PEERS)]
    kept = set(peers[:3])
    before = descriptors()
    loop.start()
    try:
        loop.call(lambda: [table.get(address) for address in peers] and None)
        wait_until(lambda: len(anyone.ready) == NUM_PEERS)
        assert descriptors() - before >= NUM_PEERS
        anyone.needed = kept
        clock.advance(IDLE_S + 1)
        loop.call(lambda: table.tick() and None)
        wait_until(lambda: anyone.let_go == set(peers) - kept)
        wait_until(lambda: descriptors() - before < 10 * len(kept) + 10)
        anyone.ready.clear()
        loop.call(lambda: [table.get(address) for address in peers] and None)
        wait_until(lambda: len(anyone.ready) >= NUM_PEERS - len(kept))
    finally:
        loop.call(table.close)
        loop.close()
    assert table.faults == 0
