"""Per peer: who answers at an address, and whether its KV fits ours.

A ``PeerTable`` is owned by one thread. It introduces this engine to each address that it is
asked for, keeps the answer, and starts afresh when another incarnation answers there. A peer that
nobody needs any more is let go of.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol

from vllm_pd_plugin.containment import LOOK_AGAIN_S, Containment
from vllm_pd_plugin.deadlines import Deadlines
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.ids import Address, EngineId, Incarnation
from vllm_pd_plugin.mapping.checks import check_description, check_memory
from vllm_pd_plugin.protocol import framing, wire

logger = logging.getLogger(__name__)

IDLE_S = 300.0
"""How long a connection that nobody needs is kept: to connect anew costs a registration."""
MAX_CONNECTIONS = 1000
"""Each is a socket, and on a worker's rank a NIXL agent."""


class Channel(Protocol):
    """What a peer needs of ``net.channel.Dealer``."""

    def send(self, frames: list[bytes]) -> None: ...

    def close(self) -> None: ...


MakePeers = Callable[["PeerListener"], "PeerTable"]

Connect = Callable[[Address, Callable[[list[bytes]], None]], Channel]
"""Opens a channel to an address; the second argument receives every message from it. Raises
PeerError."""


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """What this engine tells its peers of itself."""

    engine_id: EngineId
    incarnation: Incarnation


@dataclasses.dataclass(slots=True, eq=False)
class Peer:
    """A live peer of known incarnation, whose KV fits ours.

    welcome: what it has said last of itself. version: of the protocol that both speak.
    """

    address: Address
    incarnation: Incarnation
    welcome: wire.Welcome
    version: int


@dataclasses.dataclass(slots=True, eq=False)
class _Connection:
    """used_at: when somebody last asked for the peer."""

    address: Address
    channel: Channel
    used_at: float
    peer: Peer | None = None
    version: int = framing.OLDEST_VERSION
    """Of the protocol, in which it is spoken to until it has introduced itself."""


class PeerListener(Protocol):
    """Who is told what becomes of the peers of a table."""

    def check_fit(self, welcome: wire.Welcome) -> None:
        """Raise PeerError where what a peer says of itself does not fit this engine."""

    def peer_ready(self, address: Address, peer: Peer) -> None:
        """The peer has introduced itself, or has been replaced."""

    def peer_lost(self, address: Address, error: PeerError) -> None:
        """It did not answer in time, does not fit, or was replaced; everything that depended on
        it is void. The connection is closed."""

    def peer_replied(self, peer: Peer, message: wire.Message) -> None:
        """Any other answer of a known incarnation has come."""

    def needs_peer(self, address: Address) -> bool:
        """Say whether anything is under way with who is there."""

    def peer_let_go(self, address: Address) -> None:
        """Nobody needed it for long; the connection is closed."""


class PeerTable:
    """Connections by address."""

    def __init__(
        self,
        identity: Identity,
        timeout_s: float,
        connect: Connect,
        clock: Callable[[], float],
        listener: PeerListener,
    ) -> None:
        self._identity = identity
        self._contain = Containment("peers")
        self._timeout_s = timeout_s
        self._connect = connect
        self._clock = clock
        self._listener = listener
        self._connections: dict[Address, _Connection] = {}
        self._awaited: dict[Address, float] = {}
        """When an answer is given up; the first comes first, as all have the same time."""
        self._idle = Deadlines[Address]()
        """When it is asked whether anybody needs a connection."""
        self.dropped_messages = 0
        self.num_bytes = 0
        """Of all messages sent and received."""

    def __len__(self) -> int:
        return len(self._connections)

    @property
    def faults(self) -> int:
        return self._contain.faults

    def get(self, address: Address) -> Peer | None:
        """Return the peer if it is ready; else make sure that an introduction is under way.

        ``peer_lost`` is called, before this returns, when there can be none."""
        connection = self._connections.get(address) or self._open(address)
        if connection is None:
            return None
        connection.used_at = self._clock()
        return connection.peer

    def _open(self, address: Address) -> _Connection | None:
        """Connect to an address and introduce this engine."""
        error = PeerError(Reason.PEER_UNREACHABLE, f"there is no connecting to {_spell(address)}")
        found = self._contain.run("connecting", lambda: self._dial(address), error)
        if isinstance(found, PeerError):
            logger.warning("peer %s: %s", _spell(address), found)
            self._listener.peer_lost(address, found)
            return None
        connection = _Connection(address, found, self._clock())
        self._connections[address] = connection
        self._idle.set(address, connection.used_at + IDLE_S)
        self._introduce(connection)
        return connection

    def _dial(self, address: Address) -> Channel | PeerError:
        if len(self._connections) >= MAX_CONNECTIONS:
            self._make_room()
        if len(self._connections) >= MAX_CONNECTIONS:
            text = f"{MAX_CONNECTIONS} peers are in use already"
            return PeerError(Reason.PEER_UNREACHABLE, text)
        try:
            return self._connect(address, lambda frames: self._receive(address, frames))
        except PeerError as error:
            return error

    def refresh(self, address: Address) -> None:
        """Ask again who is there; ``peer_ready`` follows, after ``peer_lost`` for another."""
        if connection := self._connections.get(address):
            self._introduce(connection)

    def check_all(self) -> None:
        """Look again whether those that are there fit: what this engine is has changed."""
        for address, connection in list(self._connections.items()):
            if connection.peer is not None:
                try:
                    self._listener.check_fit(connection.peer.welcome)
                except PeerError as error:
                    self._lose(address, error)

    def send(self, peer: Peer, message: wire.Request, expects_answer: bool = True) -> None:
        """Send to a peer; if it expects an answer, silence beyond the timeout loses the peer."""
        connection = self._connections.get(peer.address)
        if connection is None or connection.peer is not peer:
            return
        connection.used_at = self._clock()
        if expects_answer:
            self._expect(connection.address)
        self._send(connection, message, peer.incarnation, peer.version)

    def tick(self) -> float | None:
        """Give up on silent peers, and let go of those that nobody needs; return when to call again
        (absolute), or None."""
        now = self._clock()
        overdue = list(itertools.takewhile(lambda item: item[1] <= now, self._awaited.items()))
        self._contain.each("peers", [address for address, _ in overdue], self._give_up)
        self._contain.each("peers", self._idle.take(now), self._look_after)
        due = (next(iter(self._awaited.values()), None), self._idle.next())
        return min((at for at in due if at is not None), default=None)

    def _give_up(self, address: Address) -> None:
        if self._awaited.pop(address, None) is None:  # another's loss has led to its own
            return
        text = f"no answer from {_spell(address)} within {self._timeout_s:g} s"
        self._lose(address, PeerError(Reason.PEER_UNREACHABLE, text))

    def _look_after(self, address: Address) -> None:
        connection, now = self._connections.get(address), self._clock()
        if connection is None:
            return
        self._idle.set(address, now + LOOK_AGAIN_S)  # whatever comes of this
        if now < connection.used_at + IDLE_S:
            self._idle.set(address, connection.used_at + IDLE_S)
        elif address in self._awaited or self._listener.needs_peer(address):
            self._idle.set(address, now + IDLE_S)
        else:
            self._let_go(address)

    def _make_room(self) -> None:
        """Let go of the peer that nobody needs and that was used the longest time ago."""
        by_use = sorted(self._connections, key=lambda a: self._connections[a].used_at)
        for address in by_use:
            if not self._listener.needs_peer(address):
                self._let_go(address)
                return

    def _let_go(self, address: Address) -> None:
        self._close(self._remove(address))
        self._listener.peer_let_go(address)

    def _remove(self, address: Address) -> _Connection:
        self._awaited.pop(address, None)
        self._idle.remove(address)
        return self._connections.pop(address)

    def drop(self, address: Address, error: PeerError) -> None:
        """Close the connection to a peer that turned out to be unusable."""
        if address in self._connections:
            self._lose(address, error)

    def close(self) -> None:
        for address in list(self._connections):
            self._close(self._remove(address))

    def _close(self, connection: _Connection) -> None:
        self._contain.run("closing", connection.channel.close, None)

    def _introduce(self, connection: _Connection) -> None:
        self._expect(connection.address)
        hello = wire.Hello(self._identity.engine_id, framing.PROTOCOL_VERSION)
        self._send(connection, hello, Incarnation(""), connection.version)

    def _send(
        self, connection: _Connection, message: wire.Request, target: Incarnation, version: int
    ) -> None:
        frames = framing.encode(message, self._identity.incarnation, target, version)
        self.num_bytes += len(frames[0]) + len(frames[1])
        # What cannot be sent is a message lost: whoever waits for an answer has a deadline.
        self._contain.run("sending", partial(connection.channel.send, frames), None)

    def _expect(self, address: Address) -> None:
        if address not in self._awaited:
            self._awaited[address] = self._clock() + self._timeout_s

    def _lose(self, address: Address, error: PeerError) -> None:
        self._close(self._remove(address))
        logger.warning("peer %s lost: %s", _spell(address), error)
        self._listener.peer_lost(address, error)

    def _receive(self, address: Address, frames: list[bytes]) -> None:
        connection = self._connections.get(address)
        if connection is None:
            return
        self.num_bytes += sum(map(len, frames))
        try:
            header, message = framing.decode(frames)
        except framing.VersionError as error:
            self._lose(address, PeerError(Reason.PEER_INCOMPATIBLE, str(error)))
            return
        except framing.WireError as error:
            self.dropped_messages += 1
            logger.warning("dropped a message from %s: %s", _spell(address), error)
            return
        if header.target != self._identity.incarnation:
            if (
                not header.target
                and connection.peer is None
                and header.version > connection.version
            ):
                # It does not know the version that it was spoken to in, but one that we know.
                connection.version = header.version
                self._introduce(connection)
                return
            self.dropped_messages += 1
            return
        self._awaited.pop(address, None)
        peer = connection.peer
        if isinstance(message, wire.Welcome):
            self._introduced(address, connection, header, message)
        elif peer is None:
            self.dropped_messages += 1
        elif header.sender != peer.incarnation:
            self._lose(address, _restarted(address))
        elif isinstance(message, wire.Batch):
            self._contain.each(
                "an answer", message.messages, lambda one: self._replied(connection, peer, one)
            )
        else:
            self._listener.peer_replied(peer, message)

    def _replied(self, connection: _Connection, peer: Peer, message: wire.Answer) -> None:
        """One of several answers; those before it may have led to the peer's loss."""
        if self._connections.get(peer.address) is connection and connection.peer is peer:
            self._listener.peer_replied(peer, message)

    def _introduced(
        self,
        address: Address,
        connection: _Connection,
        header: framing.Header,
        welcome: wire.Welcome,
    ) -> None:
        before = connection.peer
        peer = before if before is not None and before.incarnation == header.sender else None
        try:
            _check(welcome, peer.welcome if peer is not None else None)
            self._listener.check_fit(welcome)
        except PeerError as error:
            self._lose(address, error)
            return
        if peer is not None:
            peer.welcome = welcome
        else:
            peer = connection.peer = Peer(address, header.sender, welcome, header.version)
            if before is not None:
                self._listener.peer_lost(address, _restarted(address))
        self._listener.peer_ready(address, peer)


def _check(welcome: wire.Welcome, before: wire.Welcome | None) -> None:
    """Refuse a peer that contradicts itself, or what it said before. Raises PeerError."""
    check_description(welcome.kv_cache, "their")
    check_memory(welcome.kv_cache, welcome.ranks, "their")
    if before and (before.kv_cache, before.ranks) != (welcome.kv_cache, welcome.ranks):
        text = "the peer describes its memory in another way than before"
        raise PeerError(Reason.PEER_INCOMPATIBLE, text)


def _restarted(address: Address) -> PeerError:
    return PeerError(Reason.PEER_RESTARTED, f"{_spell(address)} was restarted")


def _spell(address: Address) -> str:
    return f"{address[0]}:{address[1]}"
