"""Per request: the reads of one fetch, from block to block or in packed pieces.

A packed piece takes the way ask, wait for the producer to write it down, read, take into the
cache; its place in the incoming staging memory is taken before it is asked for, and given back when
nothing is written there any more.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable

import numpy as np

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.memory.layout import Stretch
from vllm_pd_plugin.net.transport import ReadHandle, ReadPlan, ReadState, Transport
from vllm_pd_plugin.packing.incoming import Incoming, Packing
from vllm_pd_plugin.packing.pieces import Piece
from vllm_pd_plugin.packing.staging import max_piece_bytes
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.peers import Peer
from vllm_pd_plugin.transfer.plan import Digest
from vllm_pd_plugin.transfer.rank import Connections, LocalRank
from vllm_pd_plugin.transfer.rates import PeerRates
from vllm_pd_plugin.transfer.specs import FetchCounts, FetchSpec
from vllm_pd_plugin.transfer.stretches import Stretches

MAX_READS = 2
"""Reads of one fetch that are under way together: the next is there when one ends, and what is
announced meanwhile gathers into one."""

_MIN_POLL_S, _MAX_POLL_S, _POLL_SHARE = 0.0001, 0.002, 0.05
_FOR_ROOM_S = 0.002
_ASK_AGAIN_S = 2.0
_MEASURABLE_BYTES = 512 * 2**10
"""What is smaller tells more of the delay than of the link."""


@dataclasses.dataclass(slots=True, eq=False)
class _Read:
    """One read, posted or still to be.

    is_void: nobody wants it any more.
    handle: None while the producer packs it.
    prefix_tokens: ``Stretches.taken_tokens`` once it has arrived.
    descriptor_bytes: how long the runs of blocks are on average.
    """

    prefix_tokens: int
    descriptor_bytes: float
    began_at: float
    num_bytes: int
    kv_bytes: int
    is_void: bool = False
    handle: ReadHandle | None = None
    pack: wire.Pack | None = None
    asked_at: float = 0.0
    posted_at: float = 0.0
    piece: Piece | None = None
    number: int = 0
    offset: int = 0
    digest: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True)
class _Pending:
    """A piece that is to be asked for, as soon as there is room."""

    stretch: Stretch
    prefix_tokens: int
    descriptor_bytes: float


class Reading:
    """All reads of one fetch; the methods raise HandoffError when it cannot go on.

    codec: how KV is asked for; set before the first read.
    """

    def __init__(
        self,
        spec: FetchSpec,
        peer: Peer,
        local: LocalRank,
        transport: Transport,
        connections: Connections,
        clock: Callable[[], float],
        digest: Digest | None,
    ) -> None:
        self.spec = spec
        self.codec = Codec.RAW
        self.arrived_tokens = 0
        self.counts = FetchCounts()
        memory = peer.welcome.ranks[local.rank]
        self.stretches = Stretches(
            local.layout,
            (spec.blocks, local.regions),
            memory.regions,
            spec.first_token,
            spec.num_tokens,
        )
        self._peer = peer
        self._local = local
        self._transport = transport
        self._connections = connections
        self._clock = clock
        self._digest = digest
        self._incoming = local.incoming if memory.staging else None
        self._remote = memory.staging
        self._reads: deque[_Read] = deque()
        """In the order in which they were begun, which is that in which they are waited for."""
        self._pending: deque[_Pending] = deque()
        self._next_number = 0
        self._lost: list[int] = []
        self._last_end = 0.0

    @property
    def rates(self) -> PeerRates:
        return self._connections.rates(self._peer)

    @property
    def can_pack(self) -> bool:
        return self._incoming is not None

    @property
    def writes(self) -> bool:
        """Whether something may still be written to local memory."""
        return any(read.handle is not None for read in self._reads)

    @property
    def is_done(self) -> bool:
        """Whether all that was wanted has arrived."""
        return not self._reads and not self._pending and self.stretches.is_exhausted

    @property
    def is_idle(self) -> bool:
        """Whether it waits for nothing but the producer's word that more is final."""
        return not self._reads and not self._pending

    @property
    def oldest(self) -> float | None:
        """When the read that is waited for began."""
        return self._reads[0].began_at if self._reads else None

    def wait_s(self) -> float:
        """Return for how many seconds there is nothing to do."""
        if self._pending and len(self._reads) < MAX_READS:
            return _FOR_ROOM_S
        if not self._reads:
            return math.inf
        if self._reads[0].handle is None:
            return self._reads[0].asked_at + _ASK_AGAIN_S - self._clock()
        elapsed = self._clock() - self._reads[0].posted_at
        return min(max(_POLL_SHARE * elapsed, _MIN_POLL_S), _MAX_POLL_S)

    def begin_epoch(self) -> None:
        """All that was read, or asked for, is void."""
        self.arrived_tokens = 0
        self.give_up()

    def give_up(self) -> None:
        """Nothing of this fetch is wanted any more; reads that are under way still have to end."""
        self._pending.clear()
        self._forget_asked()
        for read in self._reads:
            read.is_void = True

    def disconnected(self) -> None:
        """The connection is closed: nothing is written any more."""
        self._lost = [read.number for read in self._reads if read.piece is not None]
        for read in self._reads:
            if read.handle is not None:
                self._transport.release_read(read.handle)
            self._give_back(read)
        self._reads.clear()
        self._pending.clear()

    def follow(self, before: Reading) -> None:
        """Take the place of the reads of a connection that was closed: all is read anew. The
        producer may keep pieces for them, under numbers that are not used again."""
        self.codec, self.counts, self._next_number = (
            before.codec,
            before.counts,
            before._next_number,
        )
        for number in before._lost:
            self._tell_unpacked(number)

    def go_on(self) -> None:
        """Begin reads of what is final and was not asked for."""
        # A read of an earlier epoch may still write to the same blocks.
        if any(read.is_void for read in self._reads):
            return
        while len(self._reads) < MAX_READS:
            if self._pending:
                if not self._ask(self._pending[0]):
                    return
                self._pending.popleft()
            elif stretch := self.stretches.take():
                self._begin(stretch)
            else:
                return

    def poll(self) -> bool:
        """Take the reads that have ended, and ask again for what does not come; False when a read
        has failed."""
        self._ask_again()
        while self._reads and (handle := self._reads[0].handle) is not None:
            state = self._transport.poll_read(handle)
            if state is ReadState.PENDING:
                return True
            if state is ReadState.FAILED:
                return False
            self._transport.release_read(handle)
            self._arrived(self._reads.popleft())
        return True

    def packed(self, message: wire.Packed) -> None:
        """A piece that was asked for can be read."""
        pieces = (read for read in self._reads if read.piece is not None)
        read = next((read for read in pieces if read.number == message.number), None)
        if read is None:
            self._tell_unpacked(message.number)
            return
        if read.handle is not None:  # a message that came twice: the piece is still needed
            return
        assert self._incoming is not None
        assert self._remote is not None
        end = message.offset + message.num_bytes
        if message.num_bytes != read.num_bytes or end > self._remote.num_bytes:
            raise HandoffError(
                Reason.MISSING_BLOCKS,
                f"a packed piece has {message.num_bytes} bytes, expected are {read.num_bytes}",
            )
        read.digest = message.digest
        local = self._incoming.span.address + read.offset
        remote = self._remote.address + message.offset
        columns = (np.array([n], np.uint64) for n in (local, remote, read.num_bytes))
        self._post(read, ReadPlan(*columns))

    # --- inside ------------------------------------------------------------------------------

    def _begin(self, stretch: Stretch) -> None:
        """Read a stretch as it lies, or have it packed."""
        prefix = self.stretches.taken_tokens
        plan = self.stretches.plan(stretch)
        descriptor_bytes = plan.total_bytes / plan.num_descriptors
        cut = self._cut(stretch, descriptor_bytes)
        if not cut:
            num_bytes = plan.total_bytes
            read = _Read(prefix, descriptor_bytes, self._clock(), num_bytes, num_bytes)
            self._reads.append(read)
            self._post(read, plan)
            return
        for part in cut[:-1]:  # only with the last of them has a longer prefix arrived
            self._pending.append(_Pending(part, 0, descriptor_bytes))
        self._pending.append(_Pending(cut[-1], prefix, descriptor_bytes))

    def _cut(self, stretch: Stretch, descriptor_bytes: float) -> list[Stretch]:
        """Return the pieces that a stretch is to be packed in; none if it is read as it lies."""
        incoming = self._incoming
        if incoming is None or not self._packs(incoming, descriptor_bytes):
            return []
        assert self._remote is not None
        theirs = max_piece_bytes(self._remote.num_bytes)
        max_bytes = min(incoming.staging.max_piece_bytes, theirs)
        try:
            return incoming.pieces.split(stretch, self.spec.num_tokens, self.codec, max_bytes)
        except HandoffError:
            if self.codec is not Codec.RAW:
                raise
            return []  # not even a block fits into the staging memory

    def _packs(self, incoming: Incoming, descriptor_bytes: float) -> bool:
        if self.codec is not Codec.RAW or incoming.packing is Packing.ALWAYS:
            return True
        if incoming.packing is Packing.NEVER:
            return False
        return self.rates.prefers_packing(descriptor_bytes)

    def _ask(self, pending: _Pending) -> bool:
        """Ask for a piece, if there is room for it here."""
        incoming = self._incoming
        assert incoming is not None
        piece = incoming.pieces.piece(pending.stretch, self.spec.num_tokens, self.codec)
        offset = incoming.staging.take(piece.num_bytes)
        if offset is None:
            return False
        self._next_number += 1
        pack = wire.Pack(
            self.spec.source.handoff_id,
            self.stretches.epoch,
            self._local.rank,
            self._next_number,
            self.codec,
            self.spec.num_tokens,
            incoming.pieces.layer_runs(pending.stretch),
            self._digest is not None,
        )
        read = _Read(
            pending.prefix_tokens,
            pending.descriptor_bytes,
            self._clock(),
            piece.num_bytes,
            piece.kv_bytes,
            pack=pack,
            piece=piece,
            number=self._next_number,
            offset=offset,
        )
        self._reads.append(read)
        self._send_pack(read, pack)
        return True

    def _ask_again(self) -> None:
        """Either message may have been lost with a connection, which ZeroMQ renews by itself."""
        for read in self._reads:
            overdue = self._clock() >= read.asked_at + _ASK_AGAIN_S
            if read.handle is None and read.pack is not None and overdue:
                self._send_pack(read, read.pack)

    def _send_pack(self, read: _Read, pack: wire.Pack) -> None:
        read.asked_at = self._clock()
        # The answer comes when there is room for the piece; heartbeats tell that the peer lives.
        self._connections.send(self._peer, pack, expects_answer=False)

    def _post(self, read: _Read, plan: ReadPlan) -> None:
        read.posted_at = self._clock()
        read.handle = self._transport.post_read(self._connections.name(self._peer), plan)
        self.counts.posted(plan, read.kv_bytes, read.piece is not None)

    def _arrived(self, read: _Read) -> None:
        now = self._clock()
        if read.num_bytes >= _MEASURABLE_BYTES:
            self.rates.link.add(read.num_bytes, now - max(read.posted_at, self._last_end))
        try:
            if read.piece is not None and not read.is_void:
                self._take_in(read, read.piece)
        finally:
            self._release(read)
        now = self._clock()
        self.rates.moved(
            read.piece is not None,
            read.descriptor_bytes,
            read.kv_bytes,
            now - max(read.began_at, self._last_end),
        )
        self._last_end = now
        if not read.is_void:
            self.arrived_tokens = max(self.arrived_tokens, read.prefix_tokens)

    def _take_in(self, read: _Read, piece: Piece) -> None:
        """Take a piece from the staging memory into the cache. Raises HandoffError."""
        assert self._incoming is not None
        coder = self._incoming.coder
        if self._digest and coder.digest_incoming(read.offset, read.num_bytes) != read.digest:
            raise HandoffError(Reason.DIGEST_MISMATCH, "a packed piece is not what was written")
        try:
            coder.decode(piece, self.codec, self.spec.blocks, read.offset)
        except RuntimeError as error:  # PyTorch's, where arguments do not fit
            raise HandoffError(Reason.INTERNAL, f"a piece cannot be unpacked: {error}") from error

    def _forget_asked(self) -> None:
        for read in [read for read in self._reads if read.handle is None]:
            self._reads.remove(read)
            self._release(read)

    def _release(self, read: _Read) -> None:
        if read.piece is not None:
            self._give_back(read)
            self._tell_unpacked(read.number)

    def _give_back(self, read: _Read) -> None:
        if read.piece is not None:
            assert self._incoming is not None
            self._incoming.staging.give_back(read.offset)

    def _tell_unpacked(self, number: int) -> None:
        message = wire.Unpacked(self.spec.source.handoff_id, self._local.rank, number)
        self._connections.send(self._peer, message, expects_answer=False)
