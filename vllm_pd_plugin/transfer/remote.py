"""Per attempt: a handoff at its producer, as one rank of the consumer asks about it."""

from __future__ import annotations

from typing import Protocol

from vllm_pd_plugin.errors import PeerError
from vllm_pd_plugin.ids import HandoffId
from vllm_pd_plugin.mapping.route import Route
from vllm_pd_plugin.memory.layout import RankMemory
from vllm_pd_plugin.net.transport import PeerName
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.peers import Peer
from vllm_pd_plugin.transfer.rank import LocalRank
from vllm_pd_plugin.transfer.rates import PeerRates

ASK_AGAIN_S = 2.0
"""How long an answer, or news, is waited for before it is asked for again: it may have been lost
with a connection, which ZeroMQ renews by itself."""


class Connections(Protocol):
    """Peers that are there."""

    def send(self, peer: Peer, message: wire.Request, expects_answer: bool = True) -> None: ...

    def name(self, peer: Peer, source_rank: int) -> PeerName:
        """Connect the transport to one rank of a peer, once for each incarnation."""

    def route(self, peer: Peer) -> Route:
        """Return how this rank reads from it. Raises PeerError."""

    def rates(self, peer: Peer) -> PeerRates: ...

    def drop(self, peer: Peer, error: PeerError) -> None:
        """Close the connection: nothing is written by reads from that peer afterwards."""


class RemoteHandoff:
    """What can be asked of a producer. What is lost on the way is asked again by the caller."""

    def __init__(
        self, handoff_id: HandoffId, peer: Peer, local: LocalRank, connections: Connections
    ) -> None:
        self.handoff_id = handoff_id
        self.peer = peer
        self.rank = local.rank
        self.route = connections.route(peer)
        self._num_ranks = local.kv_cache.num_ranks
        self._connections = connections

    def memory(self, source_rank: int) -> RankMemory:
        return self.peer.welcome.ranks[source_rank]

    def name(self, source_rank: int) -> PeerName:
        """What the transport calls a rank of the peer. Raises PeerError where it cannot be
        connected."""
        return self._connections.name(self.peer, source_rank)

    @property
    def rates(self) -> PeerRates:
        return self._connections.rates(self.peer)

    def subscribe(self) -> None:
        """Ask to be told what is final."""
        message = wire.Subscribe(
            self.handoff_id, self.rank, self._num_ranks, self.route.source_ranks
        )
        self._connections.send(self.peer, message)

    def pack(self, pack: wire.Pack | wire.Gather) -> None:
        """Ask for a piece."""
        # The answer comes when there is room for the piece; heartbeats tell that the peer lives.
        self._connections.send(self.peer, pack, expects_answer=False)

    def unpacked(self, source_rank: int, number: int) -> None:
        """Say that a piece is not needed any more."""
        message = wire.Unpacked(self.handoff_id, self.rank, source_rank, number)
        self._connections.send(self.peer, message, expects_answer=False)

    def check(self, counterpart: int, epoch: int, tokens: range) -> None:
        """Ask which bytes should have been read."""
        check = wire.Check(
            self.handoff_id, epoch, self.rank, counterpart, tokens.start, tokens.stop
        )
        self._connections.send(self.peer, check)

    def commit(self, epoch: int, is_last: bool) -> None:
        """Ask whether what has been read is valid."""
        self._connections.send(self.peer, wire.Commit(self.handoff_id, epoch, self.rank, is_last))

    def disconnect(self, error: PeerError) -> None:
        self._connections.drop(self.peer, error)
