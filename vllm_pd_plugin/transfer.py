"""The consumer's data plane on one worker rank: fetch what the scheduler has allocated.

A ``TransferPlane`` is owned by the rank's transfer thread. It knows nothing of vLLM; the worker
hands it ``FetchSpec``s and collects one ``FetchResult`` for each, whatever happens.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

from vllm_pd_plugin import wire
from vllm_pd_plugin.errors import HandoffError, PeerError, Reason
from vllm_pd_plugin.handoffs import FetchResult, FetchSpec, FetchState
from vllm_pd_plugin.ids import Address, HandoffId, RequestId
from vllm_pd_plugin.layout import EngineLayout, Region
from vllm_pd_plugin.peers import Peer, PeerTable
from vllm_pd_plugin.plan import ReadPlan, plan_reads
from vllm_pd_plugin.transport import PeerName, ReadHandle, ReadState, Transport

logger = logging.getLogger(__name__)

SERVE_INTERVAL_S = 0.002
"""How often a side that is being read drives its transport."""

_MIN_POLL_S, _MAX_POLL_S, _POLL_SHARE = 0.0001, 0.002, 0.05


@dataclasses.dataclass(frozen=True, slots=True)
class LocalRank:
    """This rank's own place: which of how many, and its memory."""

    rank: int
    num_ranks: int
    layout: EngineLayout
    regions: Sequence[Region]


@dataclasses.dataclass(slots=True, eq=False)
class _Fetch:
    spec: FetchSpec
    started_at: float
    deadline: float
    state: FetchState = FetchState.CONNECTING
    peer: Peer | None = None
    plan: ReadPlan | None = None
    handle: ReadHandle | None = None
    posted_at: float = 0.0
    reason: Reason | None = None


class TransferPlane:
    """All fetches of one rank.

    make_peers(on_ready, on_lost, on_reply): builds the peer table of this thread.
    on_result: called once for every spec that was handed in.
    drain_s: how long a failed fetch waits for its read before the connection is closed.
    """

    def __init__(
        self,
        local: LocalRank,
        transport: Transport,
        make_peers: Callable[..., PeerTable],
        on_result: Callable[[FetchResult], None],
        clock: Callable[[], float],
        fetch_timeout_s: float,
        drain_s: float,
    ) -> None:
        self._local = local
        self._transport = transport
        self._peers = make_peers(self._on_ready, self._on_lost, self._on_reply)
        self._on_result = on_result
        self._clock = clock
        self._fetch_timeout_s = fetch_timeout_s
        self._drain_s = drain_s
        self._fetches: dict[RequestId, _Fetch] = {}
        self._names: dict[Address, tuple[Peer, PeerName]] = {}
        self._serving = False

    @property
    def dropped_messages(self) -> int:
        return self._peers.dropped_messages

    def fetch(self, spec: FetchSpec) -> None:
        """Start a fetch."""
        now = self._clock()
        fetch = _Fetch(spec, now, now + self._fetch_timeout_s)
        self._fetches[spec.request_id] = fetch
        peer = self._peers.get(spec.source.address)
        if peer is None:
            return
        if peer.incarnation == spec.source.incarnation:
            self._subscribe(fetch, peer)
        else:
            self._peers.refresh(spec.source.address)

    def cancel(self, request_id: RequestId, reason: Reason) -> None:
        """End a fetch early; its result follows once nothing writes to its blocks any more."""
        if fetch := self._fetches.get(request_id):
            self._fail(fetch, reason)

    def set_serving(self, serving: bool) -> None:
        """Say whether peers may be reading from this rank."""
        self._serving = serving

    def turn(self) -> float | None:
        """Drive everything; return for how many seconds nothing needs to be done."""
        if self._serving:
            self._transport.progress()
        waits = [SERVE_INTERVAL_S] if self._serving else []
        for request_id, fetch in list(self._fetches.items()):
            if self._fetches.get(request_id) is fetch:  # losing a peer ends others too
                self._drive(fetch)
        if (peers_at := self._peers.tick()) is not None:
            waits.append(peers_at - self._clock())
        now = self._clock()
        for fetch in self._fetches.values():
            waits.append(fetch.deadline - now)
            if fetch.handle is not None:
                elapsed = now - fetch.posted_at
                waits.append(min(max(_POLL_SHARE * elapsed, _MIN_POLL_S), _MAX_POLL_S))
        return max(0.0, min(waits)) if waits else None

    def close(self) -> None:
        """Fail what is open and disconnect."""
        for address in list(self._names):
            self._peers.drop(address, PeerError(Reason.CANCELLED, "this engine is shutting down"))
        for fetch in list(self._fetches.values()):
            self._finish(fetch, Reason.CANCELLED)
        self._peers.close()
        self._transport.close()

    def _on_ready(self, address: Address, peer: Peer) -> None:
        for fetch in self._at(address):
            if fetch.state is not FetchState.CONNECTING:
                continue
            if fetch.spec.source.incarnation == peer.incarnation:
                self._subscribe(fetch, peer)
            else:
                self._fail(fetch, Reason.PEER_RESTARTED)

    def _on_lost(self, address: Address, error: PeerError) -> None:
        fetches = self._at(address)
        known = self._names.pop(address, None)
        if known is not None:
            self._transport.remove_peer(known[1])
        for fetch in fetches:
            if fetch.handle is not None:
                self._transport.release_read(fetch.handle)
                fetch.handle = None
        for fetch in fetches:
            if error.reason is Reason.PEER_RESTARTED and fetch.state is FetchState.CONNECTING:
                self._peers.get(address)  # it waits for the new incarnation
            else:
                self._finish(fetch, fetch.reason or error.reason)

    def _on_reply(self, peer: Peer, message: wire.Message) -> None:
        if not isinstance(message, wire.Seal | wire.Committed | wire.Refuse):
            return
        fetch = self._find(peer, message.handoff_id)
        if fetch is None:
            return
        if isinstance(message, wire.Refuse):
            self._fail(fetch, message.reason)
        elif isinstance(message, wire.Seal) and fetch.state is FetchState.SUBSCRIBED:
            self._read(fetch, peer, message)
        elif isinstance(message, wire.Committed) and fetch.state is FetchState.COMMITTING:
            self._finish(fetch, None)

    def _subscribe(self, fetch: _Fetch, peer: Peer) -> None:
        fetch.peer, fetch.state = peer, FetchState.SUBSCRIBED
        handoff_id = fetch.spec.source.handoff_id
        subscribe = wire.Subscribe(handoff_id, self._local.rank, self._local.num_ranks)
        self._peers.send(peer, subscribe, expects_answer=False)

    def _read(self, fetch: _Fetch, peer: Peer, seal: wire.Seal) -> None:
        spec = fetch.spec
        try:
            if seal.num_tokens < spec.num_tokens:
                raise HandoffError(
                    Reason.MISSING_BLOCKS,
                    f"sealed with {seal.num_tokens} tokens, offered {spec.num_tokens}",
                )
            fetch.plan = plan_reads(
                self._local.layout.groups,
                (spec.blocks, self._local.regions),
                (seal.blocks, peer.welcome.ranks[self._local.rank].regions),
                spec.first_token,
                spec.num_tokens,
            )
            if fetch.plan.num_descriptors == 0:
                self._commit(fetch, peer)
                return
            fetch.posted_at = self._clock()
            fetch.handle = self._transport.post_read(self._name(peer), fetch.plan)
        except HandoffError as error:
            logger.warning("handoff %s of %s: %s", spec.source.handoff_id, spec.request_id, error)
            self._fail(fetch, error.reason)
            return
        fetch.state = FetchState.READING

    def _commit(self, fetch: _Fetch, peer: Peer) -> None:
        fetch.state = FetchState.COMMITTING
        handoff_id = fetch.spec.source.handoff_id
        self._peers.send(peer, wire.Commit(handoff_id, self._local.rank, self._local.num_ranks))

    def _drive(self, fetch: _Fetch) -> None:
        if fetch.handle is not None:
            state = self._transport.poll_read(fetch.handle)
            if state is ReadState.FAILED:
                # The rest of it may still write: only closing the connection ends that.
                error = PeerError(Reason.READ_FAILED, "a read from the peer failed")
                self._peers.drop(fetch.spec.source.address, error)
                return
            if state is ReadState.DONE:
                self._transport.release_read(fetch.handle)
                fetch.handle = None
                if fetch.state is FetchState.DRAINING:
                    self._finish(fetch, fetch.reason)
                    return
                assert fetch.peer is not None
                self._commit(fetch, fetch.peer)
        if self._clock() < fetch.deadline:
            return
        if fetch.state is FetchState.DRAINING:
            # The read does not end by itself; closing the connection ends it.
            error = PeerError(Reason.READ_FAILED, "a cancelled read did not end in time")
            self._peers.drop(fetch.spec.source.address, error)
        else:
            self._fail(fetch, Reason.FETCH_TIMEOUT)

    def _fail(self, fetch: _Fetch, reason: Reason) -> None:
        if fetch.state is FetchState.DRAINING:
            return
        if fetch.handle is None:
            self._finish(fetch, reason)
            return
        fetch.state, fetch.reason = FetchState.DRAINING, reason
        fetch.deadline = self._clock() + self._drain_s

    def _finish(self, fetch: _Fetch, reason: Reason | None) -> None:
        del self._fetches[fetch.spec.request_id]
        plan = fetch.plan
        self._on_result(
            FetchResult(
                fetch.spec.request_id,
                reason,
                plan.total_bytes if plan else 0,
                plan.num_descriptors if plan else 0,
                self._clock() - fetch.started_at,
            )
        )

    def _name(self, peer: Peer) -> PeerName:
        """Connect the transport to a peer, once for each incarnation."""
        known = self._names.get(peer.address)
        if known is None:
            metadata = peer.welcome.ranks[self._local.rank].transport_metadata
            known = self._names[peer.address] = (peer, self._transport.add_peer(metadata))
        assert known[0] is peer
        return known[1]

    def _at(self, address: Address) -> list[_Fetch]:
        return [f for f in self._fetches.values() if f.spec.source.address == address]

    def _find(self, peer: Peer, handoff_id: HandoffId) -> _Fetch | None:
        for fetch in self._fetches.values():
            if fetch.peer is peer and fetch.spec.source.handoff_id == handoff_id:
                return fetch
        return None
