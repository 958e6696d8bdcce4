"""A peer table with its listener, and a producer that it gets to know."""

from __future__ import annotations

from tests.fakes.clock import FakeClock
from tests.fakes.engines import make_kv, make_kv_cache, make_layout
from tests.fakes.network import FakeNetwork
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.ids import Address, Incarnation, new_incarnation
from vllm_pd_plugin.mapping.kv_cache import EngineKvCache
from vllm_pd_plugin.mapping.match import match
from vllm_pd_plugin.memory.layout import RankMemory, Region
from vllm_pd_plugin.protocol import framing, wire
from vllm_pd_plugin.protocol.peers import IDLE_S, Identity, Peer, PeerTable

ADDRESS: Address = ("127.0.0.1", 7000)
TIMEOUT_S = 5.0
REGION = Region(0, 10, 32, 32)
KV_CACHE = make_kv_cache(make_layout(), RankMemory((REGION, REGION), b""))


class Remote:
    """A producer that answers Hello, and other messages as a test says."""

    def __init__(self, network: FakeNetwork, kv_cache: EngineKvCache = KV_CACHE) -> None:
        self.incarnation = new_incarnation()
        self.kv_cache = kv_cache
        self.kv = make_kv()
        self.revision = 0
        self.ranks: tuple[RankMemory, ...] = (RankMemory((REGION, REGION), b"meta"),)
        self.got: list[wire.Message] = []
        self.targets: list[Incarnation] = []
        self._network = network
        self._who: tuple[bytes, Incarnation] | None = None
        network.listeners[ADDRESS] = self._receive

    def say(self, message: wire.Message, target: Incarnation | None = None) -> None:
        """Send to whoever spoke last."""
        assert self._who is not None
        identity, consumer = self._who
        frames = framing.encode(message, self.incarnation, consumer if target is None else target)
        self._network.answer(identity, frames)

    def welcome(self) -> wire.Welcome:
        return wire.Welcome("remote", self.kv_cache, self.kv, self.revision, self.ranks, 30.0)

    def _receive(self, identity: bytes, frames: list[bytes]) -> None:
        header, message = framing.decode(frames)
        self._who = (identity, header.sender)
        self.got.append(message)
        self.targets.append(header.target)
        if isinstance(message, wire.Hello):
            self.say(self.welcome())


class Local:
    """A peer table, and what it has told its listener."""

    def __init__(self, network: FakeNetwork, clock: FakeClock) -> None:
        self.identity = Identity("local", new_incarnation())
        self.ready: list[Peer] = []
        self.lost: list[PeerError] = []
        self.replies: list[wire.Message] = []
        self.order: list[str] = []
        self.needed: set[Address] = set()
        self.let_go: list[Address] = []
        self.clock = clock
        self.table = PeerTable(
            self.identity,
            TIMEOUT_S,
            network.connect,
            clock,
            self,
        )

    def check_fit(self, welcome: wire.Welcome) -> None:
        match(welcome.kv_cache, KV_CACHE)

    def needs_peer(self, address: Address) -> bool:
        return address in self.needed

    def peer_let_go(self, address: Address) -> None:
        self.let_go.append(address)

    @property
    def idle_at(self) -> float:
        """When a peer that is used now is let go of."""
        return self.clock() + IDLE_S

    def reasons(self) -> list[Reason]:
        return [error.reason for error in self.lost]

    def peer(self) -> Peer:
        peer = self.table.get(ADDRESS)
        assert peer is not None
        return peer

    def peer_ready(self, address: Address, peer: Peer) -> None:
        assert address == peer.address == ADDRESS
        self.ready.append(peer)
        self.order.append("ready")

    def peer_lost(self, address: Address, error: PeerError) -> None:
        assert address == ADDRESS
        self.lost.append(error)
        self.order.append("lost")

    def peer_replied(self, peer: Peer, message: wire.Message) -> None:
        assert peer is self.ready[-1]
        self.replies.append(message)
