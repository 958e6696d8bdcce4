"""The consumer's data plane on one worker rank: fetch what the scheduler has allocated.

A ``TransferPlane`` is owned by the rank's transfer thread. It knows nothing of vLLM; the worker
hands it ``FetchSpec``s and collects one ``FetchResult`` for each, whatever happens.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.containment import LOOK_AGAIN_S, Containment
from vllm_pd_plugin.deadlines import Deadlines
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.ids import Address, HandoffId, RequestId
from vllm_pd_plugin.memory.layout import check_compatible
from vllm_pd_plugin.net.transport import PeerName
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.peers import MakePeers, Peer
from vllm_pd_plugin.transfer.fetch import AboutFetch, Fetch
from vllm_pd_plugin.transfer.rank import Rank
from vllm_pd_plugin.transfer.rates import PeerRates
from vllm_pd_plugin.transfer.specs import FetchCounts, FetchResult, FetchSpec, FetchState

LENDING_INTERVAL_S = 0.002
"""How often a side that is being read drives its transport."""

_REMEMBERED_SUCCESSES = 4096


class TransferPlane:
    """All fetches of one rank.

    on_result: called for every spec that was handed in, once for each attempt.
    """

    def __init__(
        self, rank: Rank, make_peers: MakePeers, on_result: Callable[[FetchResult], None]
    ) -> None:
        self._contain = Containment("transfer")
        self._rank = rank
        self._transport = rank.transport
        self._peers = make_peers(self)
        self._on_result = on_result
        self._fetches: dict[RequestId, Fetch] = {}
        self._by_address: dict[Address, dict[RequestId, Fetch]] = {}
        self._by_handoff: dict[tuple[Address, HandoffId], Fetch] = {}
        self._alarms = Deadlines[RequestId]()
        """When a fetch has something to do that nobody tells it of."""
        self._successors: dict[RequestId, FetchSpec] = {}
        """What takes the place of a fetch when it has ended."""
        self._succeeded: OrderedDict[RequestId, None] = OrderedDict()
        self._names: dict[Address, tuple[Peer, PeerName]] = {}
        self._rates: dict[Address, PeerRates] = {}
        self._lending = False

    @property
    def control_bytes(self) -> int:
        """Of all messages to and from producers."""
        return self._peers.num_bytes

    @property
    def dropped_messages(self) -> int:
        return self._peers.dropped_messages

    @property
    def faults(self) -> int:
        """How many were caught; see ``Containment``."""
        return self._contain.faults + self._peers.faults

    def fetch(self, spec: FetchSpec) -> None:
        """Start a fetch; one that is under way for the same request, from elsewhere, ends first."""
        self._contain.each(
            "fetches", [spec], self._start, lambda spec: self.refuse(spec.request_id)
        )

    def _start(self, spec: FetchSpec) -> None:
        if spec.request_id in self._succeeded:
            return
        if before := self._fetches.get(spec.request_id):
            self._successors[spec.request_id] = spec
            self._act(before, lambda: before.fail(Reason.CANCELLED))
            return
        fetch = self._add(Fetch(spec, self._rank, self, self._ended))
        peer = self._peers.get(spec.source.address)
        if peer is None:
            return
        if peer.incarnation == spec.source.incarnation:
            self._act(fetch, lambda: fetch.subscribe(peer))
        else:
            self._peers.refresh(spec.source.address)

    def cancel(self, request_id: RequestId, reason: Reason) -> None:
        """End a fetch early; its result follows once nothing writes to its blocks any more."""
        if fetch := self._fetches.get(request_id):
            self._act(fetch, lambda: fetch.fail(reason))

    def refuse(self, request_id: RequestId) -> None:
        """Report a request as failed, once nothing writes to its blocks any more; unless its fetch
        has succeeded, as that has been reported."""
        if request_id in self._succeeded:
            return
        fetch = self._fetches.get(request_id)
        if fetch is None:
            self._on_result(_never_begun(request_id))
            return
        self._successors.pop(request_id, None)
        fetch.spec = dataclasses.replace(fetch.spec, is_last=True)
        self._act(fetch, lambda: fetch.fail(Reason.INTERNAL))

    def set_lending(self, lending: bool) -> None:
        """Say whether peers may be reading from this rank."""
        self._lending = lending

    def turn(self) -> float | None:
        """Drive what has something to do; return for how many seconds nothing needs to be done."""
        clock = self._rank.clock
        run, again = self._contain.run, clock() + LOOK_AGAIN_S
        if self._lending:
            run("progress", self._transport.progress, None)
        due = [self._fetches[request_id] for request_id in self._alarms.take(clock())]
        for fetch in due:
            self._drive(fetch)
        peers_due_at = run("peers", self._peers.tick, again)
        run("making room", self._use_room, None)  # one that is lost gives some back
        due_at = [peers_due_at, self._alarms.next()]
        waits = [at - clock() for at in due_at if at is not None]
        if self._lending:
            waits.append(LENDING_INTERVAL_S)
        return max(0.0, min(waits)) if waits else None

    def _drive(self, fetch: Fetch) -> None:
        if fetch.state is not FetchState.ENDED:  # losing a peer ends others too
            self._act(fetch, fetch.drive)

    def _use_room(self) -> None:
        """Let those go on that wait for staging memory, in their order."""
        incoming = self._rank.local.incoming
        while incoming is not None and (request_id := incoming.room.next_up()) is not None:
            self._drive(self._fetches[request_id])

    def _act(self, fetch: Fetch, act: Callable[[], None]) -> None:
        """Let something happen to a fetch, which may wait for another thing then. A fault ends it:
        it may have taken for done what was not."""
        self._contain.each("fetches", [fetch], lambda _: act(), self._give_up)
        self._set_alarm(fetch)

    def _set_alarm(self, fetch: Fetch) -> None:
        request_id = fetch.spec.request_id
        if self._fetches.get(request_id) is fetch:
            wait_s = self._contain.run("fetches", fetch.wait_s, LOOK_AGAIN_S)
            self._alarms.set(request_id, self._rank.clock() + wait_s)

    def _give_up(self, fetch: Fetch) -> None:
        """End a fetch that cannot be driven; where it cannot even be told so, close the connection
        that its reads are on: then nothing is written any more."""
        if fetch.state is FetchState.ENDED:
            return
        if fetch.is_given_up and fetch.peer is not None:
            self.drop(fetch.peer, PeerError(Reason.INTERNAL, "a fetch could not be driven"))
        else:
            fetch.is_given_up = True
            fetch.fail(Reason.INTERNAL)

    def close(self) -> None:
        """Fail what is open and disconnect."""
        self._successors.clear()
        for address in list(self._names):
            self._peers.drop(address, PeerError(Reason.CANCELLED, "this engine is shutting down"))
        for fetch in list(self._fetches.values()):
            fetch.disconnected(Reason.CANCELLED)
        self._lending = False
        self._peers.close()
        self._transport.close()

    # --- what peers say ----------------------------------------------------------------------

    def check_fit(self, welcome: wire.Welcome) -> None:
        """What its KV is, the control plane has compared before anything is fetched."""
        check_compatible(self._rank.local.layout, welcome.layout)

    def needs_peer(self, address: Address) -> bool:
        return address in self._by_address

    def peer_let_go(self, address: Address) -> None:
        self._forget(address)

    def peer_ready(self, address: Address, peer: Peer) -> None:
        for fetch in self._at(address):
            if fetch.state is not FetchState.CONNECTING:
                continue
            if fetch.spec.source.incarnation == peer.incarnation:
                self._act(fetch, partial(fetch.subscribe, peer))
            else:
                self._act(fetch, partial(fetch.fail, Reason.PEER_RESTARTED))

    def peer_lost(self, address: Address, error: PeerError) -> None:
        fetches = self._at(address)
        self._forget(address)
        self._contain.each("fetches", fetches, Fetch.forget_reads)
        for fetch in fetches:
            self._act(fetch, partial(self._without_peer, fetch, error))

    def _without_peer(self, fetch: Fetch, error: PeerError) -> None:
        waits = fetch.state is FetchState.CONNECTING
        if error.reason is Reason.PEER_RESTARTED and waits:  # for the new incarnation
            self._peers.get(fetch.spec.source.address)
        elif error.reason is Reason.READ_FAILED and fetch.connects_again():
            # Another fetch's read has failed, and only closing the connection ends that.
            self._peers.get(fetch.spec.source.address)
        else:
            fetch.disconnected(error.reason)

    def _forget(self, address: Address) -> None:
        """The connection is closed: what belongs to it goes, too."""
        self._rates.pop(address, None)
        if known := self._names.pop(address, None):
            self._transport.remove_peer(known[1])

    def peer_replied(self, peer: Peer, message: wire.Message) -> None:
        if isinstance(message, AboutFetch) and (fetch := self._find(peer, message.handoff_id)):
            self._act(fetch, lambda: fetch.take(peer, message))

    # --- what fetches need -------------------------------------------------------------------

    def send(self, peer: Peer, message: wire.Request, expects_answer: bool = True) -> None:
        self._peers.send(peer, message, expects_answer)

    def rates(self, peer: Peer) -> PeerRates:
        """Return what was observed at an address, whoever runs there."""
        if peer.address not in self._rates:
            self._rates[peer.address] = PeerRates(self._rank.clock)
        return self._rates[peer.address]

    def name(self, peer: Peer) -> PeerName:
        """Connect the transport to a peer, once for each incarnation."""
        known = self._names.get(peer.address)
        if known is None:
            metadata = peer.welcome.ranks[self._rank.local.rank].transport_metadata
            known = self._names[peer.address] = (peer, self._transport.add_peer(metadata))
        assert known[0] is peer
        return known[1]

    def drop(self, peer: Peer, error: PeerError) -> None:
        """Close the connection to a peer; all fetches from it end."""
        self._peers.drop(peer.address, error)

    def _ended(self, fetch: Fetch, result: FetchResult) -> None:
        request_id = fetch.spec.request_id
        self._remove(fetch)
        if successor := self._successors.pop(request_id, None):
            self.fetch(successor)
            return
        if result.reason is None and not result.is_last:  # others may be told to try elsewhere
            self._succeeded[request_id] = None
            while len(self._succeeded) > _REMEMBERED_SUCCESSES:
                self._succeeded.popitem(last=False)
        self._on_result(result)

    def _at(self, address: Address) -> list[Fetch]:
        return list(self._by_address.get(address, {}).values())

    def _find(self, peer: Peer, handoff_id: HandoffId) -> Fetch | None:
        fetch = self._by_handoff.get((peer.address, handoff_id))
        return fetch if fetch is not None and fetch.peer is peer else None

    def _add(self, fetch: Fetch) -> Fetch:
        spec = fetch.spec
        self._fetches[spec.request_id] = fetch
        self._by_address.setdefault(spec.source.address, {})[spec.request_id] = fetch
        self._by_handoff[spec.source.address, spec.source.handoff_id] = fetch
        self._set_alarm(fetch)
        return fetch

    def _remove(self, fetch: Fetch) -> None:
        spec = fetch.spec
        del self._fetches[spec.request_id]
        self._alarms.remove(spec.request_id)
        if (incoming := self._rank.local.incoming) is not None:
            incoming.room.leave(spec.request_id)
        there = self._by_address[spec.source.address]
        del there[spec.request_id]
        if not there:
            del self._by_address[spec.source.address]
        key = spec.source.address, spec.source.handoff_id
        if self._by_handoff.get(key) is fetch:
            del self._by_handoff[key]


def _never_begun(request_id: RequestId) -> FetchResult:
    return FetchResult(request_id, Reason.INTERNAL, FetchCounts(), Codec.RAW, 0.0, 0)
