"""What all fetches of one tensor parallel rank share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from vllm_pd_plugin.errors import PeerError
from vllm_pd_plugin.memory.layout import EngineLayout, Region
from vllm_pd_plugin.net.transport import PeerName, Transport
from vllm_pd_plugin.packing.incoming import Incoming
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.peers import Peer
from vllm_pd_plugin.transfer.plan import Digest
from vllm_pd_plugin.transfer.rates import PeerRates


@dataclasses.dataclass(frozen=True, slots=True)
class LocalRank:
    """Which tensor parallel rank this is, and its memory.

    incoming: None where nothing can be packed.
    """

    rank: int
    layout: EngineLayout
    regions: tuple[Region, ...]
    incoming: Incoming | None


class Connections(Protocol):
    """What a fetch's reads need of the peers that its plane knows."""

    def send(self, peer: Peer, message: wire.Request, expects_answer: bool = True) -> None: ...

    def name(self, peer: Peer) -> PeerName:
        """Connect the transport to a peer, once for each incarnation."""

    def rates(self, peer: Peer) -> PeerRates: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a fetch may take.

    queue_s: until the producer has computed everything.
    read_s: for one read, and from the last read to the commit.
    drain_s: how long a failed fetch waits for its reads before the connection is closed.
    """

    queue_s: float
    read_s: float
    drain_s: float


class FetchConnections(Connections, Protocol):
    """What a fetch needs of the peers that its plane knows."""

    def drop(self, peer: Peer, error: PeerError) -> None:
        """Close the connection: nothing is written by reads from that peer afterwards."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rank:
    """What all fetches of one rank share.

    digest: compares what was read with what the producer holds; None relies on the commit alone.
    """

    local: LocalRank
    transport: Transport
    timeouts: Timeouts
    clock: Callable[[], float]
    digest: Digest | None
