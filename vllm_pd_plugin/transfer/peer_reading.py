"""Per attempt: a segment is read from a peer, over one connection to it.

It subscribes to the handoff, reads what is final there, and commits: what has been read is used
only when that was granted. ``states`` has the order of things.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Protocol

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import HandoffError, PeerError, Reason
from vllm_pd_plugin.packing.incoming import Taker
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.peers import Peer
from vllm_pd_plugin.transfer import states
from vllm_pd_plugin.transfer.peer_reads import PeerReads
from vllm_pd_plugin.transfer.rank import Rank
from vllm_pd_plugin.transfer.reading import Arrived, ReadingOwner
from vllm_pd_plugin.transfer.remote import ASK_AGAIN_S, Connections, RemoteHandoff
from vllm_pd_plugin.transfer.specs import FetchCounts, FetchSpec, Segment
from vllm_pd_plugin.transfer.states import ENDS, FetchEvent, FetchState
from vllm_pd_plugin.transfer.vouches import Vouches

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3
"""Of one fetch at one segment, where other fetches' reads have failed on its connections."""

AboutHandoff = wire.Progress | wire.Seal | wire.Packed | wire.Checked | wire.Committed | wire.Refuse
"""What a producer says to a rank that reads."""


class Meetings(Connections, Protocol):
    """What a reading needs of the peers that its source knows."""

    def meet(self, reading: PeerReading) -> None:
        """Let a reading be told of its peer, from now on."""

    def leave(self, reading: PeerReading) -> None:
        """It has ended."""


@dataclasses.dataclass(frozen=True, slots=True)
class Earlier:
    """What the attempts before have left.

    number: how many there were. began_at: when the first did. heard_at: of the last news.
    vouches: what is valid stays so until it is written anew.
    """

    number: int
    began_at: float
    heard_at: float | None
    vouches: Vouches
    reads: PeerReads | None


class PeerReading:
    """One attempt; a ``Reading``."""

    def __init__(
        self,
        spec: FetchSpec,
        segment: Segment,
        owner: ReadingOwner,
        rank: Rank,
        meetings: Meetings,
        earlier: Earlier | None = None,
    ) -> None:
        now = rank.clock()
        self.segment = segment
        self.owner = owner
        self.taker: Taker = spec.request_id, segment.tokens.start
        self.state = FetchState.CONNECTING
        self.reason: Reason | None = None
        self._spec = spec
        self._rank = rank
        self._clock = rank.clock
        self._timeouts = rank.timeouts
        self._meetings = meetings
        self._earlier = earlier or Earlier(0, now, None, Vouches(now), None)
        self._vouches = self._earlier.vouches
        self._heard_at = self._earlier.heard_at
        self._reads: PeerReads | None = None
        self._deadline = now + self._timeouts.read_s
        self._ask_again_at = math.inf
        self._sampled: int | None = None

    # --- what its fetch asks of it -----------------------------------------------------------

    def begin(self) -> None:
        self._meetings.meet(self)

    def poll(self) -> None:
        if self._reads is not None and not self.has_ended:
            self._drive(self._reads)
        if not self.has_ended and self._clock() >= self._deadline:
            self._overdue()

    def wait_s(self) -> float:
        now = self._clock()
        waits = [self._deadline - now]
        if self._reads is not None:
            waits.append(self._reads.wait_s())
            if self.state is FetchState.FETCHING and self._wants_vouch(self._reads):
                waits.append(self._vouches.next_at - now)
            if self.state is FetchState.FETCHING and self._reads.is_idle:
                waits.append(self._ask_again_at - now)
        return min(waits)

    def give_up(self, reason: Reason) -> None:
        if self.has_ended or self.state is FetchState.DRAINING:
            return
        if self._reads is not None:
            self._reads.give_up()
        if self._reads is not None and self._reads.writes:
            self._drain(reason)
        else:
            self._end(FetchEvent.FAILED, reason)

    def cut_off(self) -> None:
        if self._reads is None:
            self.give_up(Reason.INTERNAL)
        else:
            error = PeerError(Reason.INTERNAL, "a fetch could not be driven")
            self._reads.remote.disconnect(error)

    def again(self) -> PeerReading | None:
        number = self._earlier.number + 1
        if self.state is not FetchState.INTERRUPTED or number == _MAX_ATTEMPTS:
            return None
        began_at = self._earlier.began_at
        earlier = Earlier(number, began_at, self._heard_at, self._vouches, self._reads)
        return PeerReading(
            self._spec, self.segment, self.owner, self._rank, self._meetings, earlier
        )

    @property
    def has_ended(self) -> bool:
        return self.state in ENDS

    @property
    def arrived(self) -> Arrived:
        reads = self._reads or self._earlier.reads
        if reads is None:
            return Arrived(FetchCounts(), Codec.RAW, None)
        lacks = reads.stretches.lacks_tokens
        return Arrived(reads.counts, reads.pieces.codec, self._sampled, lacks)

    @property
    def valid_tokens(self) -> int:
        is_done = self.state is FetchState.DONE
        return self.segment.tokens.stop if is_done else self._vouches.valid_tokens

    # --- what becomes of the peer ------------------------------------------------------------

    @property
    def peer(self) -> Peer | None:
        """Whom it has subscribed to."""
        return self._reads.remote.peer if self._reads is not None else None

    def subscribe(self, peer: Peer) -> None:
        """The producer is there: from now on it says what is final."""
        self._follow(FetchEvent.SUBSCRIBED)
        self._vouches.begin()
        self._deadline = self._earlier.began_at + self._timeouts.queue_s
        handoff_id, rank = self.segment.source.handoff_id, self._rank
        remote = RemoteHandoff(handoff_id, peer, rank.local, self._meetings)
        reads = self._reads = PeerReads(self._spec, self.segment, rank, remote)
        if self._earlier.reads is not None:
            reads.follow(self._earlier.reads)
        self._ask_for_news(reads)

    def forget_reads(self) -> None:
        """The connection is closed: nothing is written any more."""
        if self._reads is not None:
            self._reads.disconnected()

    def lost(self, error: PeerError) -> None:
        """The peer is lost, for this reading's own sake or not."""
        if self.has_ended:  # another one's end has led to it
            return
        is_well = self.state not in (FetchState.CONNECTING, FetchState.DRAINING)
        if error.reason is Reason.READ_FAILED and is_well:
            # Another fetch's read has failed, and only closing the connection ends that.
            self._end(FetchEvent.INTERRUPTED, error.reason)
        else:
            self._end(FetchEvent.PEER_LOST, self.reason or error.reason)

    def take(self, message: AboutHandoff) -> None:
        """Take in what the producer says."""
        assert self._reads is not None
        match message:
            case wire.Packed():
                self._packed(self._reads, message)
            case _ if self.state is FetchState.DRAINING:
                return
            case wire.Refuse(_, reason):
                self.give_up(reason)
            case wire.Committed():
                self._committed(self._reads, message)
            case wire.Checked():
                self._checked(self._reads, message)
            case _:
                self._learn(self._reads, message)

    # --- reading -----------------------------------------------------------------------------

    def _ask_for_news(self, reads: PeerReads) -> None:
        self._ask_again_at = self._clock() + ASK_AGAIN_S
        reads.remote.subscribe()

    def _drive(self, reads: PeerReads) -> None:
        try:
            if not reads.poll():
                # The rest of it may still write: only closing the connection ends that.
                if self.state is not FetchState.DRAINING:
                    self._drain(Reason.READ_FAILED)
                self._disconnect(reads, "a read from the peer failed")
                return
        except HandoffError as error:
            self._fail(error)
            return
        if self.state is FetchState.DRAINING:
            if not reads.writes:
                self._end(FetchEvent.READS_ENDED, self.reason)
            return
        self._read(reads)
        if self.state is FetchState.FETCHING:
            self._vouch(reads)
            if reads.is_idle and self._clock() >= self._ask_again_at:
                self._ask_for_news(reads)

    def _learn(self, reads: PeerReads, message: wire.Progress | wire.Seal) -> None:
        stretches = reads.stretches
        epoch, before = stretches.epoch, stretches.final_bytes
        is_sealed = isinstance(message, wire.Seal)
        if isinstance(message, wire.Seal):
            self._sampled = message.sampled
            if self._sampled is None and self._needs_token:
                self.give_up(Reason.PRODUCER_ENDED)
                return
        self._ask_again_at = self._clock() + ASK_AGAIN_S
        try:
            is_complete = stretches.learn(message)
        except HandoffError as error:
            self._fail(error)
            return
        if stretches.epoch != epoch:  # what was read, and asked, is void
            self._follow(FetchEvent.NEW_EPOCH)
            reads.begin_epoch()
            self._vouches.begin()
        if self._heard_at is None:
            reads.pieces.choose_codec(stretches.wanted, is_sealed)
        elif stretches.epoch == epoch and stretches.final_bytes > before:
            seconds = self._clock() - self._heard_at
            reads.remote.rates.prefill.add(stretches.final_bytes - before, seconds)
        self._heard_at = self._clock()
        if not is_complete:
            self._ask_for_news(reads)
        self._read(reads)

    def _packed(self, reads: PeerReads, message: wire.Packed) -> None:
        try:
            reads.packed(message)
        except HandoffError as error:
            self._fail(error)
            return
        self._set_deadline(reads)

    def _read(self, reads: PeerReads) -> None:
        """Read what is final and was not asked for; when nothing is left, commit."""
        if self.state is not FetchState.FETCHING:
            return
        try:
            reads.go_on()
        except HandoffError as error:
            self._fail(error)
            return
        if reads.is_done and (self._sampled is not None or not self._needs_token):
            counterpart = reads.remote.route.counterpart
            # What a lossy codec brought is not what the producer has, nor is what lies in another
            # way; there each piece was compared.
            is_raw = reads.pieces.codec is Codec.RAW
            if self._rank.digest is None or counterpart is None or not is_raw:
                self._commit(reads, FetchEvent.ALL_READ)
            else:
                self._check(reads, counterpart)
        self._set_deadline(reads)

    # --- checking and committing -------------------------------------------------------------

    @property
    def _needs_token(self) -> bool:
        """Whether it is of use only with the token that follows."""
        return self._spec.seeds and self.segment is self._spec.segments[-1]

    def _check(self, reads: PeerReads, counterpart: int) -> None:
        self._follow(FetchEvent.ALL_READ_UNCHECKED)
        reads.remote.check(counterpart, reads.stretches.epoch, self.segment.tokens)

    def _checked(self, reads: PeerReads, message: wire.Checked) -> None:
        digest, tokens = self._rank.digest, self.segment.tokens
        is_awaited = self.state is FetchState.CHECKING and message.epoch == reads.stretches.epoch
        if digest is None or not is_awaited:
            return
        if digest(self._spec.blocks, tokens.start, tokens.stop) == message.digest:
            self._commit(reads, FetchEvent.BYTES_EQUAL)
            self._set_deadline(reads)
        else:
            self.give_up(Reason.DIGEST_MISMATCH)

    def _commit(self, reads: PeerReads, event: FetchEvent) -> None:
        self._follow(event)
        reads.remote.commit(reads.stretches.epoch, is_last=True)

    def _committed(self, reads: PeerReads, message: wire.Committed) -> None:
        if message.epoch != reads.stretches.epoch:
            return
        if not message.is_last:
            self._vouches.granted()
        elif self.state is FetchState.COMMITTING:
            self._end(FetchEvent.COMMITTED, None)

    def _wants_vouch(self, reads: PeerReads) -> bool:
        # Where bytes are to be compared, they are only when all of them are there.
        return self._rank.digest is None and self._vouches.wants(reads.arrived_tokens)

    def _vouch(self, reads: PeerReads) -> None:
        """Ask, now and then, whether what has arrived is valid."""
        arrived = reads.arrived_tokens
        if self._wants_vouch(reads) and self._vouches.ask(arrived, self._clock()):
            reads.remote.commit(reads.stretches.epoch, is_last=False)

    # --- ending ------------------------------------------------------------------------------

    def _follow(self, event: FetchEvent) -> None:
        self.state = states.follow(self.state, event)

    def _set_deadline(self, reads: PeerReads) -> None:
        if self.has_ended or self.state is FetchState.DRAINING:
            return
        if reads.oldest is not None:
            self._deadline = reads.oldest + self._timeouts.read_s
        elif self.state in (FetchState.CHECKING, FetchState.COMMITTING):
            self._deadline = self._clock() + self._timeouts.read_s
        else:
            self._deadline = self._earlier.began_at + self._timeouts.queue_s

    def _overdue(self) -> None:
        if self.state is FetchState.DRAINING and self._reads is not None:
            # The reads do not end by themselves; closing the connection ends them.
            self._disconnect(self._reads, "a cancelled read did not end in time")
        else:
            self.give_up(Reason.FETCH_TIMEOUT)

    def _disconnect(self, reads: PeerReads, why: str) -> None:
        reads.remote.disconnect(PeerError(Reason.READ_FAILED, why))

    def _fail(self, error: HandoffError) -> None:
        handoff_id, request_id = self.segment.source.handoff_id, self._spec.request_id
        logger.warning("handoff %s of %s: %s", handoff_id, request_id, error)
        self.give_up(error.reason)

    def _drain(self, reason: Reason) -> None:
        """Wait for the reads that may still write."""
        self._follow(FetchEvent.FAILED_WRITING)
        self.reason = reason
        self._deadline = self._clock() + self._timeouts.drain_s

    def _end(self, event: FetchEvent, reason: Reason | None) -> None:
        self._follow(event)
        self.reason = reason
        self._meetings.leave(self)
        self.owner.reading_ended(self, reason)
