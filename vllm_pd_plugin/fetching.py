"""Per request: one fetch on one rank of the consumer.

A ``Fetch`` subscribes to its handoff, reads what is final there, and commits. It is driven by the
``TransferPlane`` that owns it, and belongs to the same thread.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from vllm_pd_plugin import wire
from vllm_pd_plugin.errors import HandoffError, PeerError, Reason
from vllm_pd_plugin.fetches import FetchResult, FetchSpec, FetchState
from vllm_pd_plugin.layout import EngineLayout, Region
from vllm_pd_plugin.peers import Peer
from vllm_pd_plugin.plan import Digest
from vllm_pd_plugin.stretches import Stretches
from vllm_pd_plugin.transport import PeerName, ReadHandle, ReadState, Transport

logger = logging.getLogger(__name__)

_MIN_POLL_S, _MAX_POLL_S, _POLL_SHARE = 0.0001, 0.002, 0.05
_MAX_READS = 2
"""Reads of one fetch that are under way together: the next is there when one ends, and what is
announced meanwhile gathers into one."""

_ASK_AGAIN_S = 2.0
"""How long a fetch that reads nothing waits for news before it asks: they may have been lost with
a connection, which ZeroMQ renews by itself."""

_VOUCH_INTERVAL_S = 0.5
"""How often a fetch asks whether what has arrived is valid, so that a later failure keeps it."""

AboutFetch = wire.Progress | wire.Seal | wire.Checked | wire.Committed | wire.Refuse
"""What a producer says to a rank that fetches."""


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


class Connections(Protocol):
    """What a fetch needs of the peers that its plane knows."""

    def send(self, peer: Peer, message: wire.Request) -> None: ...

    def name(self, peer: Peer) -> PeerName:
        """Connect the transport to a peer, once for each incarnation."""

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


class Fetch:
    """One fetch: what it has read, and what it waits for.

    on_end: called once, when nothing writes to its blocks any more.
    """

    def __init__(
        self,
        spec: FetchSpec,
        rank: Rank,
        connections: Connections,
        on_end: Callable[[Fetch, FetchResult], None],
    ) -> None:
        self.spec = spec
        self.state = FetchState.CONNECTING
        self.peer: Peer | None = None
        self._rank = rank
        self._clock = rank.clock
        self._timeouts = rank.timeouts
        self._connections = connections
        self._on_end = on_end
        self._started_at = self._clock()
        self._deadline = self._started_at + rank.timeouts.read_s
        self._stretches: Stretches
        self._reads: list[_Read] = []
        """In the order in which they were posted, which is that in which they are waited for."""
        self._arrived_tokens = self._vouched_tokens = self._asked_tokens = 0
        self._next_vouch_at = self._started_at + _VOUCH_INTERVAL_S
        self._ask_again_at = math.inf
        self._reason: Reason | None = None
        self._num_bytes = self._num_descriptors = self._num_stretches = 0

    # --- what its plane asks of it -----------------------------------------------------------

    def subscribe(self, peer: Peer) -> None:
        """The producer is there: from now on it says what is final."""
        spec, local = self.spec, self._rank.local
        self.peer, self.state = peer, FetchState.FETCHING
        self._deadline = self._started_at + self._timeouts.queue_s
        self._stretches = Stretches(
            local.layout,
            (spec.blocks, local.regions),
            peer.welcome.ranks[local.rank].regions,
            spec.first_token,
            spec.num_tokens,
        )
        self._send_subscribe(peer)

    def take(self, peer: Peer, message: AboutFetch) -> None:
        """Take in what the producer says."""
        if self.state is FetchState.DRAINING:
            return
        match message:
            case wire.Refuse(_, reason):
                self.fail(reason)
            case wire.Committed():
                self._committed(message)
            case wire.Checked():
                self._checked(peer, message)
            case _:
                self._learn(peer, message)

    def drive(self) -> None:
        """Go on with what has ended, and with what is due."""
        self._poll()
        if self.state is FetchState.DRAINING and not self._reads:
            self._end(self._reason)
            return
        if self.state is FetchState.FETCHING and self.peer is not None:
            self._read(self.peer)
        if self.state is FetchState.FETCHING and self.peer is not None:
            self._vouch(self.peer)
            if not self._reads and self._clock() >= self._ask_again_at:
                self._send_subscribe(self.peer)
        if self.state is not FetchState.ENDED and self._clock() >= self._deadline:
            self._overdue()

    def wait_s(self) -> float:
        """Return for how many seconds ``drive`` has nothing to do."""
        now = self._clock()
        waits = [self._deadline - now]
        if self.state is FetchState.FETCHING and self._wants_vouch():
            waits.append(self._next_vouch_at - now)
        if self.state is FetchState.FETCHING and not self._reads:
            waits.append(self._ask_again_at - now)
        if self._reads:
            elapsed = now - self._reads[0].posted_at
            waits.append(min(max(_POLL_SHARE * elapsed, _MIN_POLL_S), _MAX_POLL_S))
        return min(waits)

    def fail(self, reason: Reason, error: HandoffError | None = None) -> None:
        """End, once nothing writes to its blocks any more."""
        if error is not None:
            spec = self.spec
            logger.warning("handoff %s of %s: %s", spec.source.handoff_id, spec.request_id, error)
        if self.state is FetchState.DRAINING:
            return
        if not self._reads:
            self._end(reason)
            return
        self.state, self._reason = FetchState.DRAINING, reason
        self._deadline = self._clock() + self._timeouts.drain_s

    def forget_reads(self) -> None:
        """The connection is closed: nothing is written any more."""
        for read in self._reads:
            self._rank.transport.release_read(read.handle)
        self._reads.clear()

    def disconnected(self, reason: Reason) -> None:
        """End without the peer, for the reason for which it was about to end anyway, if any."""
        self._end(self._reason or reason)

    # --- reading -----------------------------------------------------------------------------

    def _send_subscribe(self, peer: Peer) -> None:
        self._ask_again_at = self._clock() + _ASK_AGAIN_S
        handoff_id = self.spec.source.handoff_id
        self._connections.send(peer, wire.Subscribe(handoff_id, self._rank.local.rank))

    def _learn(self, peer: Peer, message: wire.Progress | wire.Seal) -> None:
        epoch = self._stretches.epoch
        self._ask_again_at = self._clock() + _ASK_AGAIN_S
        try:
            is_complete = self._stretches.learn(message)
        except HandoffError as error:
            self.fail(error.reason, error)
            return
        if self._stretches.epoch != epoch:  # what was read, and asked, is void
            self.state = FetchState.FETCHING
            self._arrived_tokens = self._vouched_tokens = self._asked_tokens = 0
        if not is_complete:
            self._send_subscribe(peer)
        self._read(peer)

    def _read(self, peer: Peer) -> None:
        """Post a read of what is final and not asked for; when nothing is left, commit."""
        if self.state is not FetchState.FETCHING:
            return
        stretches = self._stretches
        # A read of an earlier epoch may still write to the same blocks.
        stale = any(read.epoch != stretches.epoch for read in self._reads)
        try:
            while not stale and len(self._reads) < _MAX_READS and (plan := stretches.take()):
                prefix = stretches.taken_tokens
                handle = self._rank.transport.post_read(self._connections.name(peer), plan)
                self._reads.append(_Read(handle, stretches.epoch, self._clock(), prefix))
                self._num_bytes += plan.total_bytes
                self._num_descriptors += plan.num_descriptors
                self._num_stretches += 1
        except HandoffError as error:
            self.fail(error.reason, error)
            return
        if not self._reads and stretches.is_exhausted:
            if self._rank.digest is None:
                self._commit(peer)
            else:
                self._check(peer)
        self._set_deadline()

    def _poll(self) -> None:
        """Take the reads that have ended."""
        while self._reads:
            read = self._reads[0]
            state = self._rank.transport.poll_read(read.handle)
            if state is ReadState.PENDING:
                return
            if state is ReadState.FAILED:
                # The rest of it may still write: only closing the connection ends that.
                self._disconnect("a read from the peer failed")
                return
            self._rank.transport.release_read(read.handle)
            self._reads.pop(0)
            if read.epoch == self._stretches.epoch:
                self._arrived_tokens = read.prefix_tokens

    # --- checking and committing -------------------------------------------------------------

    def _check(self, peer: Peer) -> None:
        """Ask which bytes should have been read."""
        self.state = FetchState.CHECKING
        spec = self.spec
        check = wire.Check(
            spec.source.handoff_id,
            self._stretches.epoch,
            self._rank.local.rank,
            spec.first_token,
            spec.num_tokens,
        )
        self._connections.send(peer, check)

    def _checked(self, peer: Peer, message: wire.Checked) -> None:
        is_awaited = self.state is FetchState.CHECKING and message.epoch == self._stretches.epoch
        if self._rank.digest is None or not is_awaited:
            return
        spec = self.spec
        if self._rank.digest(spec.blocks, spec.first_token, spec.num_tokens) == message.digest:
            self._commit(peer)
            self._set_deadline()
        else:
            self.fail(Reason.DIGEST_MISMATCH)

    def _commit(self, peer: Peer) -> None:
        self.state = FetchState.COMMITTING
        self._send_commit(peer, is_last=True)

    def _send_commit(self, peer: Peer, is_last: bool) -> None:
        handoff_id, epoch = self.spec.source.handoff_id, self._stretches.epoch
        commit = wire.Commit(handoff_id, epoch, self._rank.local.rank, is_last)
        self._connections.send(peer, commit)

    def _committed(self, message: wire.Committed) -> None:
        if message.epoch != self._stretches.epoch:
            return
        if not message.is_last:
            self._vouched_tokens = self._asked_tokens
        elif self.state is FetchState.COMMITTING:
            self._end(None)

    def _wants_vouch(self) -> bool:
        """Whether something has arrived that was not asked for, and no answer is due. Where bytes
        are to be compared, they are only when all of them are there."""
        if self._rank.digest is not None or self._asked_tokens != self._vouched_tokens:
            return False
        return self._arrived_tokens > self._asked_tokens

    def _vouch(self, peer: Peer) -> None:
        """Ask, now and then, whether what has arrived is valid."""
        now = self._clock()
        if self._wants_vouch() and now >= self._next_vouch_at:
            self._asked_tokens = self._arrived_tokens
            self._next_vouch_at = now + _VOUCH_INTERVAL_S
            self._send_commit(peer, is_last=False)

    # --- ending ------------------------------------------------------------------------------

    def _set_deadline(self) -> None:
        if self._reads:
            self._deadline = self._reads[0].posted_at + self._timeouts.read_s
        elif self.state in (FetchState.CHECKING, FetchState.COMMITTING):
            self._deadline = self._clock() + self._timeouts.read_s
        else:
            self._deadline = self._started_at + self._timeouts.queue_s

    def _overdue(self) -> None:
        if self.state is FetchState.DRAINING:
            # The reads do not end by themselves; closing the connection ends them.
            self._disconnect("a cancelled read did not end in time")
        else:
            self.fail(Reason.FETCH_TIMEOUT)

    def _disconnect(self, why: str) -> None:
        assert self.peer is not None
        self._connections.drop(self.peer, PeerError(Reason.READ_FAILED, why))

    def _end(self, reason: Reason | None) -> None:
        self.state = FetchState.ENDED
        spec = self.spec
        result = FetchResult(
            spec.request_id,
            reason,
            self._num_bytes,
            self._num_descriptors,
            self._num_stretches,
            self._clock() - self._started_at,
            spec.num_tokens if reason is None else self._vouched_tokens,
            spec.attempt,
            spec.is_last,
        )
        self._on_end(self, result)
