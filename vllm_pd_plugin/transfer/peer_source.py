"""Peers as a source of KV: connections to producers, and what is read from each.

A ``PeerSource`` is owned by the rank's transfer thread.
"""

from __future__ import annotations

from functools import partial

from vllm_pd_plugin.containment import Containment
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.ids import Address, HandoffId
from vllm_pd_plugin.mapping.route import Route, find_route
from vllm_pd_plugin.net.transport import PeerName
from vllm_pd_plugin.packing.incoming import Taker
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.peers import MakePeers, Peer
from vllm_pd_plugin.transfer.peer_reading import AboutHandoff, PeerReading
from vllm_pd_plugin.transfer.rank import Rank
from vllm_pd_plugin.transfer.rates import PeerRates
from vllm_pd_plugin.transfer.reading import ReadingOwner
from vllm_pd_plugin.transfer.specs import FetchSpec, Segment
from vllm_pd_plugin.transfer.states import FetchState


class PeerSource:
    """All readings from peers on one rank."""

    def __init__(self, rank: Rank, make_peers: MakePeers) -> None:
        self._contain = Containment("peers")
        self._rank = rank
        self._peers = make_peers(self)
        self._by_address: dict[Address, dict[Taker, PeerReading]] = {}
        self._by_handoff: dict[tuple[Address, HandoffId], PeerReading] = {}
        self._by_taker: dict[Taker, PeerReading] = {}
        self._routes: dict[Address, tuple[Peer, Route]] = {}
        self._names: dict[Address, dict[int, PeerName]] = {}
        """For each of its ranks that is read from."""
        self._rates: dict[Address, PeerRates] = {}

    @property
    def num_bytes(self) -> int:
        """Of all messages to and from producers."""
        return self._peers.num_bytes

    @property
    def dropped_messages(self) -> int:
        return self._peers.dropped_messages

    @property
    def faults(self) -> int:
        """How many were caught; see ``Containment``."""
        return self._contain.faults + self._peers.faults

    def open(self, spec: FetchSpec, segment: Segment, owner: ReadingOwner) -> PeerReading:
        """Return the first attempt at a segment, which has not begun."""
        return PeerReading(spec, segment, owner, self._rank, self)

    def tick(self) -> float | None:
        """Do what is due about peers; return when to call again (absolute), or None."""
        return self._peers.tick()

    def use_room(self) -> None:
        """Let those go on that wait for staging memory, in their order."""
        incoming = self._rank.local.incoming
        while incoming is not None and (taker := incoming.room.next_up()) is not None:
            reading = self._by_taker[taker]
            reading.owner.attend(reading.poll)

    def close_connections(self, error: PeerError) -> None:
        """End what is read."""
        for address in list(self._routes):
            self._peers.drop(address, error)

    def close(self) -> None:
        self._peers.close()

    # --- what peers say ----------------------------------------------------------------------

    def check_fit(self, welcome: wire.Welcome) -> None:
        """What its KV is, the control plane has compared before anything is fetched."""
        route = self._find_route(welcome)
        for share in route.shares:
            compares = self._rank.digest is not None and route.counterpart is None
            if share.direct is not None and not compares:
                continue
            if share.slab is None:
                text = f"integrity=digest cannot compare pages of {share.layers[0]}: what is in "
                text += "them is not known, and they are divided among ranks in another way there"
                raise PeerError(Reason.PEER_INCOMPATIBLE, text)
            has_staging = welcome.ranks[share.source_rank].staging is not None
            if self._rank.local.incoming is None or not has_staging:
                text = f"{share.layers[0]} lies in another way there, so it has to be packed: "
                text += "staging_bytes=0 leaves no room for that; set it on both engines"
                raise PeerError(Reason.PEER_INCOMPATIBLE, text)

    def _find_route(self, welcome: wire.Welcome) -> Route:
        local = self._rank.local
        return find_route(welcome.kv_cache, local.kv_cache, local.rank, local.allow_fp8)

    def needs_peer(self, address: Address) -> bool:
        return address in self._by_address

    def peer_let_go(self, address: Address) -> None:
        self._forget(address)

    def peer_ready(self, address: Address, peer: Peer) -> None:
        for reading in self._at(address):
            if reading.state is not FetchState.CONNECTING:
                continue
            if reading.segment.source.incarnation == peer.incarnation:
                reading.owner.attend(partial(reading.subscribe, peer))
            else:
                reading.owner.attend(partial(reading.give_up, Reason.PEER_RESTARTED))

    def peer_lost(self, address: Address, error: PeerError) -> None:
        readings = self._at(address)
        self._forget(address)
        self._contain.each("readings", readings, PeerReading.forget_reads)
        for reading in readings:
            reading.owner.attend(partial(self._without_peer, reading, error))

    def _at(self, address: Address) -> list[PeerReading]:
        return list(self._by_address.get(address, {}).values())

    def _without_peer(self, reading: PeerReading, error: PeerError) -> None:
        waits = reading.state is FetchState.CONNECTING
        if error.reason is Reason.PEER_RESTARTED and waits:  # for the new incarnation
            self._peers.get(reading.segment.source.address)
        else:
            reading.lost(error)

    def _forget(self, address: Address) -> None:
        """The connection is closed: what belongs to it goes, too."""
        self._rates.pop(address, None)
        self._routes.pop(address, None)
        for name in self._names.pop(address, {}).values():
            self._rank.transport.remove_peer(name)

    def peer_replied(self, peer: Peer, message: wire.Message) -> None:
        if not isinstance(message, AboutHandoff):
            return
        reading = self._by_handoff.get((peer.address, message.handoff_id))
        if reading is not None and reading.peer is peer:
            reading.owner.attend(partial(reading.take, message))

    # --- what readings need ------------------------------------------------------------------

    def meet(self, reading: PeerReading) -> None:
        source = reading.segment.source
        self._by_taker[reading.taker] = reading
        self._by_address.setdefault(source.address, {})[reading.taker] = reading
        self._by_handoff[source.address, source.handoff_id] = reading
        peer = self._peers.get(source.address)
        if peer is None:
            return
        if peer.incarnation == source.incarnation:
            reading.subscribe(peer)
        else:
            self._peers.refresh(source.address)

    def leave(self, reading: PeerReading) -> None:
        source = reading.segment.source
        if self._by_taker.pop(reading.taker, None) is None:
            return  # it was given up before it began
        if (incoming := self._rank.local.incoming) is not None:
            incoming.room.leave(reading.taker)
        there = self._by_address[source.address]
        del there[reading.taker]
        if not there:
            del self._by_address[source.address]
        key = source.address, source.handoff_id
        if self._by_handoff.get(key) is reading:
            del self._by_handoff[key]

    def send(self, peer: Peer, message: wire.Request, expects_answer: bool = True) -> None:
        self._peers.send(peer, message, expects_answer)

    def rates(self, peer: Peer) -> PeerRates:
        """Return what was observed at an address, whoever runs there."""
        if peer.address not in self._rates:
            self._rates[peer.address] = PeerRates(self._rank.clock)
        return self._rates[peer.address]

    def route(self, peer: Peer) -> Route:
        known = self._routes.get(peer.address)
        if known is None:
            known = self._routes[peer.address] = (peer, self._find_route(peer.welcome))
        assert known[0] is peer
        return known[1]

    def name(self, peer: Peer, source_rank: int) -> PeerName:
        names = self._names.setdefault(peer.address, {})
        if source_rank not in names:
            metadata = peer.welcome.ranks[source_rank].transport_metadata
            beside = next(iter(names.values()), None)
            names[source_rank] = self._rank.transport.add_peer(metadata, beside)
        return names[source_rank]

    def drop(self, peer: Peer, error: PeerError) -> None:
        """Close the connection to a peer; all that is read from it ends."""
        self._peers.drop(peer.address, error)
