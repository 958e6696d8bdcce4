"""Per peer: who answers at an address, and whether its KV fits ours.

A ``PeerTable`` is owned by one thread. It introduces this engine to each address that it is
asked for, keeps the answer, and starts afresh when another incarnation answers there.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Protocol

from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.ids import Address, EngineId, Incarnation
from vllm_pd_plugin.memory.layout import EngineLayout, check_compatible
from vllm_pd_plugin.protocol import wire

logger = logging.getLogger(__name__)


class Channel(Protocol):
    """What a peer needs of ``net.channel.Dealer``."""

    def send(self, frames: list[bytes]) -> None: ...

    def close(self) -> None: ...


MakePeers = Callable[["PeerListener"], "PeerTable"]

Connect = Callable[[Address, Callable[[list[bytes]], None]], Channel]
"""Opens a link to an address; the second argument receives every message from it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """What this engine tells its peers of itself."""

    engine_id: EngineId
    incarnation: Incarnation


@dataclasses.dataclass(slots=True, eq=False)
class Peer:
    """A live peer of known incarnation, whose layout fits ours."""

    address: Address
    incarnation: Incarnation
    welcome: wire.Welcome


@dataclasses.dataclass(slots=True, eq=False)
class _Connection:
    channel: Channel
    peer: Peer | None = None
    deadline: float | None = None
    """When the answer that is awaited is given up; None while none is."""


class PeerListener(Protocol):
    """Who is told what becomes of the peers of a table."""

    def peer_ready(self, address: Address, peer: Peer) -> None:
        """The peer has introduced itself, or has been replaced."""

    def peer_lost(self, address: Address, error: PeerError) -> None:
        """It did not answer in time, does not fit, or was replaced; everything that depended on
        it is void. The connection is closed."""

    def peer_replied(self, peer: Peer, message: wire.Message) -> None:
        """Any other answer of a known incarnation has come."""


class PeerTable:
    """Connections by address."""

    def __init__(
        self,
        identity: Identity,
        layout: EngineLayout,
        timeout_s: float,
        connect: Connect,
        clock: Callable[[], float],
        listener: PeerListener,
    ) -> None:
        self._identity = identity
        self._layout = layout
        self._timeout_s = timeout_s
        self._connect = connect
        self._clock = clock
        self._listener = listener
        self._connections: dict[Address, _Connection] = {}
        self.dropped_messages = 0
        self.num_bytes = 0
        """Of all messages sent and received."""

    def get(self, address: Address) -> Peer | None:
        """Return the peer if it is ready; else make sure that an introduction is under way."""
        connection = self._connections.get(address)
        if connection is None:
            channel = self._connect(address, lambda frames: self._receive(address, frames))
            connection = self._connections[address] = _Connection(channel)
            self._introduce(connection)
        return connection.peer

    def refresh(self, address: Address) -> None:
        """Ask again who is there; ``peer_ready`` follows, after ``peer_lost`` for another."""
        self._introduce(self._connections[address])

    def send(self, peer: Peer, message: wire.Request, expects_answer: bool = True) -> None:
        """Send to a peer; if it expects an answer, silence beyond the timeout loses the peer."""
        connection = self._connections.get(peer.address)
        if connection is None or connection.peer is not peer:
            return
        if expects_answer:
            self._expect(connection)
        self._send(connection, message, peer.incarnation)

    def tick(self) -> float | None:
        """Give up on silent peers; return when to call again (absolute), or None."""
        now = self._clock()
        for address, connection in list(self._connections.items()):
            if connection.deadline is not None and now >= connection.deadline:
                self._lose(
                    address,
                    PeerError(
                        Reason.PEER_UNREACHABLE,
                        f"no answer from {_spell(address)} within {self._timeout_s:g} s",
                    ),
                )
        deadlines = (c.deadline for c in self._connections.values())
        return min((d for d in deadlines if d is not None), default=None)

    def drop(self, address: Address, error: PeerError) -> None:
        """Close the connection to a peer that turned out to be unusable."""
        if address in self._connections:
            self._lose(address, error)

    def close(self) -> None:
        for connection in self._connections.values():
            connection.channel.close()
        self._connections.clear()

    def _introduce(self, connection: _Connection) -> None:
        self._expect(connection)
        self._send(connection, wire.Hello(self._identity.engine_id), Incarnation(""))

    def _send(self, connection: _Connection, message: wire.Request, target: Incarnation) -> None:
        frames = wire.encode(message, self._identity.incarnation, target)
        self.num_bytes += sum(map(len, frames))
        connection.channel.send(frames)

    def _expect(self, connection: _Connection) -> None:
        if connection.deadline is None:
            connection.deadline = self._clock() + self._timeout_s

    def _lose(self, address: Address, error: PeerError) -> None:
        self._connections.pop(address).channel.close()
        logger.warning("peer %s lost: %s", _spell(address), error)
        self._listener.peer_lost(address, error)

    def _receive(self, address: Address, frames: list[bytes]) -> None:
        connection = self._connections.get(address)
        if connection is None:
            return
        self.num_bytes += sum(map(len, frames))
        try:
            header, message = wire.decode(frames)
        except wire.VersionError as error:
            self._lose(address, PeerError(Reason.PEER_INCOMPATIBLE, str(error)))
            return
        except wire.WireError as error:
            self.dropped_messages += 1
            logger.warning("dropped a message from %s: %s", _spell(address), error)
            return
        if header.target != self._identity.incarnation:
            self.dropped_messages += 1
            return
        connection.deadline = None
        peer = connection.peer
        if isinstance(message, wire.Welcome):
            self._introduced(address, connection, header, message)
        elif peer is None:
            self.dropped_messages += 1
        elif header.sender != peer.incarnation:
            self._lose(address, _restarted(address))
        else:
            self._listener.peer_replied(peer, message)

    def _introduced(
        self, address: Address, connection: _Connection, header: wire.Header, welcome: wire.Welcome
    ) -> None:
        try:
            check_compatible(self._layout, welcome.layout)
            _check_complete(welcome)
        except PeerError as error:
            self._lose(address, error)
            return
        known = connection.peer
        if known is None or known.incarnation != header.sender:
            connection.peer = Peer(address, header.sender, welcome)
            if known is not None:
                self._listener.peer_lost(address, _restarted(address))
        assert connection.peer is not None
        self._listener.peer_ready(address, connection.peer)


def _check_complete(welcome: wire.Welcome) -> None:
    layers = sum(len(group.layers) for group in welcome.layout.groups)
    if len(welcome.ranks) != welcome.layout.tensor_parallel_size or any(
        len(rank.regions) != layers for rank in welcome.ranks
    ):
        raise PeerError(Reason.PEER_INCOMPATIBLE, "the peer describes its memory inconsistently")


def _restarted(address: Address) -> PeerError:
    return PeerError(Reason.PEER_RESTARTED, f"{_spell(address)} was restarted")


def _spell(address: Address) -> str:
    return f"{address[0]}:{address[1]}"
