"""The consumer's data plane on one worker rank: fetch what the scheduler has allocated.

A ``TransferPlane`` is owned by the rank's transfer thread. It knows nothing of vLLM; the worker
hands it ``FetchSpec``s and collects one ``FetchResult`` for each, whatever happens.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

from vllm_pd_plugin import wire
from vllm_pd_plugin.errors import HandoffError, PeerError, Reason
from vllm_pd_plugin.fetches import FetchResult, FetchSpec, FetchState
from vllm_pd_plugin.ids import Address, HandoffId, RequestId
from vllm_pd_plugin.layout import EngineLayout, Region
from vllm_pd_plugin.peers import MakePeers, Peer
from vllm_pd_plugin.stretches import Stretches
from vllm_pd_plugin.transport import PeerName, ReadHandle, ReadState, Transport

logger = logging.getLogger(__name__)

SERVE_INTERVAL_S = 0.002
"""How often a side that is being read drives its transport."""

_MIN_POLL_S, _MAX_POLL_S, _POLL_SHARE = 0.0001, 0.002, 0.05
_REMEMBERED_SUCCESSES = 4096
_MAX_READS = 2
"""Reads of one fetch that are under way together: the next is there when one ends, and what is
announced meanwhile gathers into one."""

_ASK_AGAIN_S = 2.0
"""How long a fetch that reads nothing waits for news before it asks: they may have been lost with
a connection, which ZeroMQ renews by itself."""

_VOUCH_INTERVAL_S = 0.1
"""How often a fetch asks whether what has arrived is valid, so that a later failure keeps it."""


@dataclasses.dataclass(frozen=True, slots=True)
class LocalRank:
    """Which tensor parallel rank this is, and its memory."""

    rank: int
    layout: EngineLayout
    regions: Sequence[Region]


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


@dataclasses.dataclass(frozen=True, slots=True)
class _Read:
    handle: ReadHandle
    epoch: int
    posted_at: float
    prefix_tokens: int
    """``Stretches.taken_tokens`` when it was posted."""


@dataclasses.dataclass(slots=True, eq=False)
class _Fetch:
    spec: FetchSpec
    started_at: float
    deadline: float
    state: FetchState = FetchState.CONNECTING
    peer: Peer | None = None
    stretches: Stretches | None = None
    reads: list[_Read] = dataclasses.field(default_factory=list)
    """In the order in which they were posted, which is that in which they are waited for."""
    arrived_tokens: int = 0
    vouched_tokens: int = 0
    asked_tokens: int = 0
    next_vouch_at: float = 0.0
    ask_again_at: float = math.inf
    reason: Reason | None = None
    successor: FetchSpec | None = None
    """What takes its place when it has ended."""
    num_bytes: int = 0
    num_descriptors: int = 0
    num_stretches: int = 0

    @property
    def wants_vouch(self) -> bool:
        """Whether something has arrived that was not asked for, and no answer is due."""
        is_answered = self.asked_tokens == self.vouched_tokens
        return is_answered and self.arrived_tokens > self.asked_tokens


class TransferPlane:
    """All fetches of one rank.

    on_result: called once for every spec that was handed in.
    """

    def __init__(
        self,
        local: LocalRank,
        transport: Transport,
        make_peers: MakePeers,
        on_result: Callable[[FetchResult], None],
        clock: Callable[[], float],
        timeouts: Timeouts,
    ) -> None:
        self._local = local
        self._transport = transport
        self._peers = make_peers(self)
        self._on_result = on_result
        self._clock = clock
        self._timeouts = timeouts
        self._fetches: dict[RequestId, _Fetch] = {}
        self._succeeded: OrderedDict[RequestId, None] = OrderedDict()
        self._names: dict[Address, tuple[Peer, PeerName]] = {}
        self._serving = False

    @property
    def control_bytes(self) -> int:
        """Of all messages to and from producers."""
        return self._peers.num_bytes

    @property
    def dropped_messages(self) -> int:
        return self._peers.dropped_messages

    def fetch(self, spec: FetchSpec) -> None:
        """Start a fetch; one that is under way for the same request, from elsewhere, ends first."""
        if spec.request_id in self._succeeded:
            return
        if before := self._fetches.get(spec.request_id):
            before.successor = spec
            self._fail(before, Reason.CANCELLED)
            return
        now = self._clock()
        fetch = _Fetch(
            spec, now, now + self._timeouts.read_s, next_vouch_at=now + _VOUCH_INTERVAL_S
        )
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

    def refuse(self, request_id: RequestId) -> None:
        """Report a request as failed, once nothing writes to its blocks any more; unless its fetch
        has succeeded, as that has been reported."""
        if request_id in self._succeeded:
            return
        fetch = self._fetches.get(request_id)
        if fetch is None:
            self._on_result(FetchResult(request_id, Reason.INTERNAL, 0, 0, 0, 0.0, 0))
            return
        fetch.successor = None
        fetch.spec = dataclasses.replace(fetch.spec, is_last=True)
        self._fail(fetch, Reason.INTERNAL)

    def set_serving(self, serving: bool) -> None:
        """Say whether peers may be reading from this rank."""
        self._serving = serving

    def turn(self) -> float | None:
        """Drive everything; return for how many seconds nothing needs to be done."""
        if self._serving:
            self._transport.progress()
        waits = [SERVE_INTERVAL_S] if self._serving else []
        for fetch in list(self._fetches.values()):
            if fetch.state is not FetchState.ENDED:  # losing a peer ends others too
                self._drive(fetch)
        if (peers_at := self._peers.tick()) is not None:
            waits.append(peers_at - self._clock())
        now = self._clock()
        for fetch in self._fetches.values():
            waits.append(fetch.deadline - now)
            if fetch.state is FetchState.FETCHING and fetch.wants_vouch:
                waits.append(fetch.next_vouch_at - now)
            if fetch.state is FetchState.FETCHING and not fetch.reads:
                waits.append(fetch.ask_again_at - now)
            if fetch.reads:
                elapsed = now - fetch.reads[0].posted_at
                waits.append(min(max(_POLL_SHARE * elapsed, _MIN_POLL_S), _MAX_POLL_S))
        return max(0.0, min(waits)) if waits else None

    def close(self) -> None:
        """Fail what is open and disconnect."""
        for address in list(self._names):
            self._peers.drop(address, PeerError(Reason.CANCELLED, "this engine is shutting down"))
        for fetch in list(self._fetches.values()):
            self._finish(fetch, Reason.CANCELLED)
        self._serving = False
        self._peers.close()
        self._transport.close()

    # --- what peers say ----------------------------------------------------------------------

    def peer_ready(self, address: Address, peer: Peer) -> None:
        for fetch in self._at(address):
            if fetch.state is not FetchState.CONNECTING:
                continue
            if fetch.spec.source.incarnation == peer.incarnation:
                self._subscribe(fetch, peer)
            else:
                self._fail(fetch, Reason.PEER_RESTARTED)

    def peer_lost(self, address: Address, error: PeerError) -> None:
        fetches = self._at(address)
        known = self._names.pop(address, None)
        if known is not None:
            self._transport.remove_peer(known[1])
        for fetch in fetches:
            for read in fetch.reads:
                self._transport.release_read(read.handle)
            fetch.reads.clear()
        for fetch in fetches:
            if error.reason is Reason.PEER_RESTARTED and fetch.state is FetchState.CONNECTING:
                self._peers.get(address)  # it waits for the new incarnation
            else:
                self._finish(fetch, fetch.reason or error.reason)

    def peer_replied(self, peer: Peer, message: wire.Message) -> None:
        if not isinstance(message, wire.Progress | wire.Seal | wire.Committed | wire.Refuse):
            return
        fetch = self._find(peer, message.handoff_id)
        if fetch is None or fetch.state is FetchState.DRAINING:
            return
        if isinstance(message, wire.Refuse):
            self._fail(fetch, message.reason)
        elif isinstance(message, wire.Committed):
            self._committed(fetch, message)
        else:
            self._learn(fetch, peer, message)

    # --- one fetch ---------------------------------------------------------------------------

    def _subscribe(self, fetch: _Fetch, peer: Peer) -> None:
        spec = fetch.spec
        fetch.peer, fetch.state = peer, FetchState.FETCHING
        fetch.deadline = fetch.started_at + self._timeouts.queue_s
        fetch.stretches = Stretches(
            self._local.layout,
            (spec.blocks, self._local.regions),
            peer.welcome.ranks[self._local.rank].regions,
            spec.first_token,
            spec.num_tokens,
        )
        self._send_subscribe(fetch, peer)

    def _send_subscribe(self, fetch: _Fetch, peer: Peer) -> None:
        handoff_id = fetch.spec.source.handoff_id
        fetch.ask_again_at = self._clock() + _ASK_AGAIN_S
        self._peers.send(peer, wire.Subscribe(handoff_id, self._local.rank))

    def _learn(self, fetch: _Fetch, peer: Peer, message: wire.Progress | wire.Seal) -> None:
        assert fetch.stretches is not None
        epoch = fetch.stretches.epoch
        fetch.ask_again_at = self._clock() + _ASK_AGAIN_S
        try:
            is_complete = fetch.stretches.learn(message)
        except HandoffError as error:
            self._fail(fetch, error.reason, error)
            return
        if fetch.stretches.epoch != epoch:  # what was read, and asked, is void
            fetch.state = FetchState.FETCHING
            fetch.arrived_tokens = fetch.vouched_tokens = fetch.asked_tokens = 0
        if not is_complete:
            self._send_subscribe(fetch, peer)
        self._read(fetch)

    def _read(self, fetch: _Fetch) -> None:
        """Post a read of what is final and not asked for; when nothing is left, commit."""
        if fetch.state is not FetchState.FETCHING:
            return
        stretches, peer = fetch.stretches, fetch.peer
        assert stretches is not None
        assert peer is not None
        # A read of an earlier epoch may still write to the same blocks.
        stale = any(read.epoch != stretches.epoch for read in fetch.reads)
        try:
            while not stale and len(fetch.reads) < _MAX_READS and (plan := stretches.take()):
                prefix = stretches.taken_tokens
                handle = self._transport.post_read(self._name(peer), plan)
                fetch.reads.append(_Read(handle, stretches.epoch, self._clock(), prefix))
                fetch.num_bytes += plan.total_bytes
                fetch.num_descriptors += plan.num_descriptors
                fetch.num_stretches += 1
        except HandoffError as error:
            self._fail(fetch, error.reason, error)
            return
        if not fetch.reads and stretches.is_exhausted:
            fetch.state = FetchState.COMMITTING
            self._send_commit(fetch, is_last=True)
        self._set_deadline(fetch)

    def _set_deadline(self, fetch: _Fetch) -> None:
        if fetch.reads:
            fetch.deadline = fetch.reads[0].posted_at + self._timeouts.read_s
        elif fetch.state is FetchState.COMMITTING:
            fetch.deadline = self._clock() + self._timeouts.read_s
        else:
            fetch.deadline = fetch.started_at + self._timeouts.queue_s

    def _send_commit(self, fetch: _Fetch, is_last: bool) -> None:
        assert fetch.stretches is not None
        assert fetch.peer is not None
        commit = wire.Commit(
            fetch.spec.source.handoff_id,
            fetch.stretches.epoch,
            self._local.rank,
            is_last,
        )
        self._peers.send(fetch.peer, commit)

    def _committed(self, fetch: _Fetch, message: wire.Committed) -> None:
        if fetch.stretches is None or message.epoch != fetch.stretches.epoch:
            return
        if not message.is_last:
            fetch.vouched_tokens = fetch.asked_tokens
        elif fetch.state is FetchState.COMMITTING:
            self._finish(fetch, None)

    def _vouch(self, fetch: _Fetch) -> None:
        """Ask, now and then, whether what has arrived is valid."""
        now = self._clock()
        if fetch.wants_vouch and now >= fetch.next_vouch_at:
            fetch.asked_tokens = fetch.arrived_tokens
            fetch.next_vouch_at = now + _VOUCH_INTERVAL_S
            self._send_commit(fetch, is_last=False)

    def _drive(self, fetch: _Fetch) -> None:
        while fetch.reads:
            read = fetch.reads[0]
            state = self._transport.poll_read(read.handle)
            if state is ReadState.PENDING:
                break
            if state is ReadState.FAILED:
                # The rest of it may still write: only closing the connection ends that.
                error = PeerError(Reason.READ_FAILED, "a read from the peer failed")
                self._peers.drop(fetch.spec.source.address, error)
                return
            self._transport.release_read(read.handle)
            fetch.reads.pop(0)
            if fetch.stretches is not None and read.epoch == fetch.stretches.epoch:
                fetch.arrived_tokens = read.prefix_tokens
        if fetch.state is FetchState.DRAINING and not fetch.reads:
            self._finish(fetch, fetch.reason)
            return
        if fetch.state is FetchState.FETCHING:
            self._read(fetch)
        if fetch.state is FetchState.FETCHING:
            self._vouch(fetch)
            if not fetch.reads and self._clock() >= fetch.ask_again_at:
                assert fetch.peer is not None
                self._send_subscribe(fetch, fetch.peer)
        if fetch.state is not FetchState.ENDED and self._clock() >= fetch.deadline:
            self._overdue(fetch)

    def _overdue(self, fetch: _Fetch) -> None:
        if fetch.state is FetchState.DRAINING:
            # The reads do not end by themselves; closing the connection ends them.
            error = PeerError(Reason.READ_FAILED, "a cancelled read did not end in time")
            self._peers.drop(fetch.spec.source.address, error)
        else:
            self._fail(fetch, Reason.FETCH_TIMEOUT)

    def _fail(self, fetch: _Fetch, reason: Reason, error: HandoffError | None = None) -> None:
        if error is not None:
            spec = fetch.spec
            logger.warning("handoff %s of %s: %s", spec.source.handoff_id, spec.request_id, error)
        if fetch.state is FetchState.DRAINING:
            return
        if not fetch.reads:
            self._finish(fetch, reason)
            return
        fetch.state, fetch.reason = FetchState.DRAINING, reason
        fetch.deadline = self._clock() + self._timeouts.drain_s

    def _finish(self, fetch: _Fetch, reason: Reason | None) -> None:
        fetch.state = FetchState.ENDED
        del self._fetches[fetch.spec.request_id]
        if fetch.successor is not None:
            self.fetch(fetch.successor)
            return
        if reason is None and not fetch.spec.is_last:  # others may be told to try elsewhere
            self._succeeded[fetch.spec.request_id] = None
            while len(self._succeeded) > _REMEMBERED_SUCCESSES:
                self._succeeded.popitem(last=False)
        self._on_result(
            FetchResult(
                fetch.spec.request_id,
                reason,
                fetch.num_bytes,
                fetch.num_descriptors,
                fetch.num_stretches,
                self._clock() - fetch.started_at,
                fetch.spec.num_tokens if reason is None else fetch.vouched_tokens,
                fetch.spec.attempt,
                fetch.spec.is_last,
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
