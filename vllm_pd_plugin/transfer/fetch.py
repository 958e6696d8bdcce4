"""Per request: one fetch on one rank of the consumer.

A ``Fetch`` subscribes to its handoff, reads what is final there, and commits. It is driven by the
``TransferPlane`` that owns it, and belongs to the same thread.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import OTHER_KV, HandoffError, PeerError, Reason
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.peers import Peer
from vllm_pd_plugin.transfer.rank import FetchConnections, Rank
from vllm_pd_plugin.transfer.rates import Prospect, choose_codec
from vllm_pd_plugin.transfer.reading import Reading
from vllm_pd_plugin.transfer.specs import FetchCounts, FetchResult, FetchSpec, FetchState

logger = logging.getLogger(__name__)

_ASK_AGAIN_S = 2.0
"""How long a fetch that reads nothing waits for news before it asks: they may have been lost with
a connection, which ZeroMQ renews by itself."""

_VOUCH_INTERVAL_S = 0.5
"""How often a fetch asks whether what has arrived is valid, so that a later failure keeps it."""

_MAX_CONNECTS = 3
"""How often a fetch may connect, where another fetch's read has failed on its connection."""

_TYPICAL_STRETCH_BYTES = 2 * 2**20

AboutFetch = wire.Progress | wire.Seal | wire.Packed | wire.Checked | wire.Committed | wire.Refuse
"""What a producer says to a rank that fetches."""


class Fetch:
    """One fetch: what it has read, and what it waits for.

    on_end: called once, when nothing writes to its blocks any more.
    """

    def __init__(
        self,
        spec: FetchSpec,
        rank: Rank,
        connections: FetchConnections,
        on_end: Callable[[Fetch, FetchResult], None],
    ) -> None:
        self.spec = spec
        self.state = FetchState.CONNECTING
        self.peer: Peer | None = None
        self.is_given_up = False
        self._connects = 0
        self._rank = rank
        self._clock = rank.clock
        self._timeouts = rank.timeouts
        self._connections = connections
        self._on_end = on_end
        self._started_at = self._clock()
        self._deadline = self._started_at + rank.timeouts.read_s
        self._reading: Reading | None = None
        self._before: Reading | None = None
        """Its reads of a connection that was closed."""
        self._vouched_tokens = self._asked_tokens = 0
        self._next_vouch_at = self._started_at + _VOUCH_INTERVAL_S
        self._ask_again_at = math.inf
        self._heard_at: float | None = None
        self._sampled: int | None = None
        self._reason: Reason | None = None

    # --- what its plane asks of it -----------------------------------------------------------

    def subscribe(self, peer: Peer) -> None:
        """The producer is there: from now on it says what is final."""
        rank = self._rank
        self.peer, self.state = peer, FetchState.FETCHING
        self._connects += 1
        self._vouched_tokens = self._asked_tokens = 0  # what is there is written anew
        self._deadline = self._started_at + self._timeouts.queue_s
        self._reading = Reading(
            self.spec,
            peer,
            rank.local,
            rank.transport,
            self._connections,
            self._clock,
            rank.digest,
        )
        if self._before is not None:
            self._reading.follow(self._before)
            self._before = None
        self._send_subscribe(peer)

    def take(self, peer: Peer, message: AboutFetch) -> None:
        """Take in what the producer says."""
        assert self._reading is not None
        match message:
            case wire.Packed():
                self._packed(self._reading, message)
            case _ if self.state is FetchState.DRAINING:
                return
            case wire.Refuse(_, reason):
                self.fail(reason)
            case wire.Committed():
                self._committed(message)
            case wire.Checked():
                self._checked(peer, message)
            case _:
                self._learn(peer, self._reading, message)

    def drive(self) -> None:
        """Go on with what has ended, and with what is due."""
        if self._reading is not None and self.peer is not None:
            self._drive_reads(self.peer, self._reading)
        if self.state is not FetchState.ENDED and self._clock() >= self._deadline:
            self._overdue()

    def wait_s(self) -> float:
        """Return for how many seconds ``drive`` has nothing to do."""
        now = self._clock()
        waits = [self._deadline - now]
        if self._reading is not None:
            waits.append(self._reading.wait_s())
            if self.state is FetchState.FETCHING and self._wants_vouch(self._reading):
                waits.append(self._next_vouch_at - now)
            if self.state is FetchState.FETCHING and self._reading.is_idle:
                waits.append(self._ask_again_at - now)
        return min(waits)

    def fail(self, reason: Reason, error: HandoffError | None = None) -> None:
        """End, once nothing writes to its blocks any more."""
        if error is not None:
            spec = self.spec
            logger.warning("handoff %s of %s: %s", spec.source.handoff_id, spec.request_id, error)
        if self.state is FetchState.DRAINING:
            return
        if self._reading is not None:
            self._reading.give_up()
        if self._reading is None or not self._reading.writes:
            self._end(reason)
            return
        self.state, self._reason = FetchState.DRAINING, reason
        self._deadline = self._clock() + self._timeouts.drain_s

    def forget_reads(self) -> None:
        """The connection is closed: nothing is written any more."""
        if self._reading is not None:
            self._reading.disconnected()

    def connects_again(self) -> bool:
        """The connection was closed for another fetch's sake: begin anew, if this one may."""
        is_well = self.state in (FetchState.FETCHING, FetchState.CHECKING, FetchState.COMMITTING)
        if not is_well or self._connects >= _MAX_CONNECTS:
            return False
        self._before, self._reading = self._reading, None
        self.state, self.peer = FetchState.CONNECTING, None
        self._deadline = self._clock() + self._timeouts.read_s
        return True

    def disconnected(self, reason: Reason) -> None:
        """End without the peer, for the reason for which it was about to end anyway, if any."""
        self._end(self._reason or reason)

    # --- reading -----------------------------------------------------------------------------

    def _send_subscribe(self, peer: Peer) -> None:
        self._ask_again_at = self._clock() + _ASK_AGAIN_S
        handoff_id = self.spec.source.handoff_id
        self._connections.send(peer, wire.Subscribe(handoff_id, self._rank.local.rank))

    def _drive_reads(self, peer: Peer, reading: Reading) -> None:
        try:
            if not reading.poll():
                # The rest of it may still write: only closing the connection ends that.
                self.state, self._reason = FetchState.DRAINING, self._reason or Reason.READ_FAILED
                self._disconnect("a read from the peer failed")
                return
        except HandoffError as error:
            self.fail(error.reason, error)
            return
        if self.state is FetchState.DRAINING and not reading.writes:
            self._end(self._reason)
            return
        if self.state is FetchState.FETCHING:
            self._read(peer, reading)
        if self.state is FetchState.FETCHING:
            self._vouch(peer, reading)
            if reading.is_idle and self._clock() >= self._ask_again_at:
                self._send_subscribe(peer)

    def _learn(self, peer: Peer, reading: Reading, message: wire.Progress | wire.Seal) -> None:
        stretches = reading.stretches
        epoch, before = stretches.epoch, stretches.final_bytes
        if isinstance(message, wire.Seal):
            self._sampled = message.sampled
            if self._sampled is None and self.spec.seeds:
                self.fail(Reason.PRODUCER_ENDED)
                return
        self._ask_again_at = self._clock() + _ASK_AGAIN_S
        try:
            is_complete = stretches.learn(message)
        except HandoffError as error:
            self.fail(error.reason, error)
            return
        if stretches.epoch != epoch:  # what was read, and asked, is void
            self.state = FetchState.FETCHING
            reading.begin_epoch()
            self._vouched_tokens = self._asked_tokens = 0
        if self._heard_at is None:
            reading.codec = self._choose_codec(reading, isinstance(message, wire.Seal))
        elif stretches.epoch == epoch and stretches.final_bytes > before:
            seconds = self._clock() - self._heard_at
            reading.rates.prefill.add(stretches.final_bytes - before, seconds)
        self._heard_at = self._clock()
        if not is_complete:
            self._send_subscribe(peer)
        self._read(peer, reading)

    def _choose_codec(self, reading: Reading, is_sealed: bool) -> Codec:
        choice, incoming = self.spec.codec, self._rank.local.incoming
        if incoming is None or not reading.can_pack:
            return Codec.RAW
        if choice.codec is not None:
            return choice.codec
        wanted, tokens = reading.stretches.wanted, self.spec.num_tokens
        sizes = {
            codec: incoming.pieces.piece(wanted, tokens, codec).num_bytes
            for codec in (Codec.RAW, *incoming.coding)
        }
        kv_bytes = sizes[Codec.RAW]
        rates = reading.rates
        prospect = Prospect(
            kv_bytes,
            sizes,
            rates.link.value,
            None if is_sealed else rates.prefill.value,
            incoming.coding,
            max(1, min(kv_bytes // _TYPICAL_STRETCH_BYTES, len(wanted))),
        )
        return choose_codec(prospect, choice.narrowest)

    def _packed(self, reading: Reading, message: wire.Packed) -> None:
        try:
            reading.packed(message)
        except HandoffError as error:
            self.fail(error.reason, error)
            return
        self._set_deadline(reading)

    def _read(self, peer: Peer, reading: Reading) -> None:
        """Read what is final and was not asked for; when nothing is left, commit."""
        if self.state is not FetchState.FETCHING:
            return
        try:
            reading.go_on()
        except HandoffError as error:
            self.fail(error.reason, error)
            return
        if reading.is_done and (self._sampled is not None or not self.spec.seeds):
            # What a lossy codec brought is not what the producer has; each piece was compared.
            if self._rank.digest is None or reading.codec is not Codec.RAW:
                self._commit(peer)
            else:
                self._check(peer, reading)
        self._set_deadline(reading)

    # --- checking and committing -------------------------------------------------------------

    def _check(self, peer: Peer, reading: Reading) -> None:
        """Ask which bytes should have been read."""
        self.state = FetchState.CHECKING
        spec = self.spec
        check = wire.Check(
            spec.source.handoff_id,
            reading.stretches.epoch,
            self._rank.local.rank,
            spec.first_token,
            spec.num_tokens,
        )
        self._connections.send(peer, check)

    def _checked(self, peer: Peer, message: wire.Checked) -> None:
        is_awaited = self.state is FetchState.CHECKING and message.epoch == self._epoch
        if self._rank.digest is None or not is_awaited:
            return
        spec = self.spec
        if self._rank.digest(spec.blocks, spec.first_token, spec.num_tokens) == message.digest:
            self._commit(peer)
            self._deadline = self._clock() + self._timeouts.read_s
        else:
            self.fail(Reason.DIGEST_MISMATCH)

    def _commit(self, peer: Peer) -> None:
        self.state = FetchState.COMMITTING
        self._send_commit(peer, is_last=True)

    def _send_commit(self, peer: Peer, is_last: bool) -> None:
        handoff_id = self.spec.source.handoff_id
        commit = wire.Commit(handoff_id, self._epoch, self._rank.local.rank, is_last)
        self._connections.send(peer, commit)

    def _committed(self, message: wire.Committed) -> None:
        if message.epoch != self._epoch:
            return
        if not message.is_last:
            self._vouched_tokens = self._asked_tokens
        elif self.state is FetchState.COMMITTING:
            self._end(None)

    @property
    def _epoch(self) -> int:
        assert self._reading is not None
        return self._reading.stretches.epoch

    def _wants_vouch(self, reading: Reading) -> bool:
        """Whether something has arrived that was not asked for, and no answer is due. Where bytes
        are to be compared, they are only when all of them are there."""
        if self._rank.digest is not None or self._asked_tokens != self._vouched_tokens:
            return False
        return reading.arrived_tokens > self._asked_tokens

    def _vouch(self, peer: Peer, reading: Reading) -> None:
        """Ask, now and then, whether what has arrived is valid."""
        now = self._clock()
        if self._wants_vouch(reading) and now >= self._next_vouch_at:
            self._asked_tokens = reading.arrived_tokens
            self._next_vouch_at = now + _VOUCH_INTERVAL_S
            self._send_commit(peer, is_last=False)

    # --- ending ------------------------------------------------------------------------------

    def _set_deadline(self, reading: Reading) -> None:
        if self.state is FetchState.ENDED:
            return
        if reading.oldest is not None:
            self._deadline = reading.oldest + self._timeouts.read_s
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
        if self.state is FetchState.ENDED:  # another one's end has led to it
            return
        self.state = FetchState.ENDED
        spec = self.spec
        reading = self._reading or self._before
        kept = 0 if reason in OTHER_KV else self._vouched_tokens
        result = FetchResult(
            spec.request_id,
            reason,
            reading.counts if reading else FetchCounts(),
            reading.codec if reading else Codec.RAW,
            self._clock() - self._started_at,
            spec.num_tokens if reason is None else kept,
            spec.attempt,
            spec.is_last,
            self._sampled,
        )
        self._on_end(self, result)
