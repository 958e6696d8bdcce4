"""Per request: the reads of one fetch, from block to block or in packed pieces.

A packed piece takes the way ask, wait for the producer to write it down, read, take into the
cache; its place in the incoming staging memory is taken before it is asked for, and given back when
nothing is written there any more.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import numpy as np

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.memory.layout import Stretch
from vllm_pd_plugin.net.transport import ReadPlan, ReadState, Transport
from vllm_pd_plugin.packing.incoming import Incoming, Packing
from vllm_pd_plugin.packing.packer import Coding
from vllm_pd_plugin.packing.pieces import Piece
from vllm_pd_plugin.packing.staging import max_piece_bytes
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.peers import Peer
from vllm_pd_plugin.transfer.plan import Digest
from vllm_pd_plugin.transfer.rank import Connections, LocalRank
from vllm_pd_plugin.transfer.rates import PeerRates
from vllm_pd_plugin.transfer.reads import Read, ToPack, ToPlan, ToRead
from vllm_pd_plugin.transfer.specs import FetchCounts, FetchSpec
from vllm_pd_plugin.transfer.stretches import Stretches

MAX_READS = 2
"""Reads of one fetch that are under way together: the next is there when one ends, and what is
announced meanwhile gathers into one."""

_MIN_POLL_S, _MAX_POLL_S, _POLL_SHARE = 0.0001, 0.002, 0.05
_MAX_BLOCKS, _MAX_DESCRIPTORS = 2048, 256
"""Of one plan, and of one read: more would hold up everything else on the thread. NIXL and UCX take
two microseconds or more to start what one descriptor says."""
_ASK_AGAIN_S = 2.0
_MEASURABLE_BYTES = 512 * 2**10
"""What is smaller tells more of the delay than of the link."""


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
        self._reads: deque[Read] = deque()
        """In the order in which they were begun, which is that in which they are waited for."""
        self._pending: deque[ToPack | ToPlan | ToRead] = deque()
        """What is final, in the order in which it is read."""
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
        if not self._reads:  # what waits for room is told when there is some
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
        self._forget_pending()
        self._forget_asked()
        for read in self._reads:
            read.is_void = True

    def disconnected(self) -> None:
        """The connection is closed: nothing is written any more."""
        self._lost = [read.number for read in self._reads if read.piece is not None]
        for read in self._reads:
            if read.coding is not None:  # that is not a matter of the connection
                read.coding.wait()
            elif read.handle is not None:
                self._transport.release_read(read.handle)
            self._give_back(read)
        self._reads.clear()
        self._forget_pending()

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
            if not self._pending:
                stretch = self.stretches.take()
                if stretch is None:
                    return
                self._begin(stretch)
            match self._pending[0]:
                case ToPack() as piece:
                    if not self._ask(piece):
                        return
                    self._pending.popleft()
                case ToPlan(part, prefix):
                    plan = self.stretches.plan(part)
                    self._pending.popleft()
                    self._pending.extendleft(reversed(self._in_reads(plan, prefix)))
                case ToRead(plan, prefix):
                    self._pending.popleft()
                    self._read(plan, prefix)

    def poll(self) -> bool:
        """Take the reads that have ended, and ask again for what does not come; False when a read
        has failed."""
        self._ask_again()
        while self._reads and (handle := self._reads[0].handle) is not None:
            read = self._reads[0]
            if read.coding is None:
                state = self._transport.poll_read(handle)
                if state is ReadState.PENDING:
                    return True
                if state is ReadState.FAILED:
                    return False
                self._transport.release_read(handle)
                self._arrived(read)
            if read.coding is not None and not read.coding.is_done():
                return True
            self._taken_in(self._reads.popleft())
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
        """Take up a stretch, to be read as it lies or packed."""
        prefix = self.stretches.taken_tokens
        first, *others = self.stretches.cut(stretch, _MAX_BLOCKS)
        plan = self.stretches.plan(first)  # the others lie about as scattered
        descriptor_bytes = plan.total_bytes / plan.num_descriptors
        # Only with the last of them has a longer prefix arrived.
        if pieces := self._cut(stretch, descriptor_bytes):
            last = len(pieces) - 1
            self._pending += (
                ToPack(piece, prefix if number == last else 0, descriptor_bytes)
                for number, piece in enumerate(pieces)
            )
        else:
            self._pending += self._in_reads(plan, 0 if others else prefix)
            self._pending += (ToPlan(part, 0) for part in others[:-1])
            self._pending += (ToPlan(part, prefix) for part in others[-1:])

    def _in_reads(self, plan: ReadPlan, prefix_tokens: int) -> list[ToRead]:
        *others, last = plan.split(_MAX_DESCRIPTORS, self._transport.max_read_bytes)
        return [*(ToRead(other, 0) for other in others), ToRead(last, prefix_tokens)]

    def _read(self, plan: ReadPlan, prefix_tokens: int) -> None:
        num_bytes = plan.total_bytes
        descriptor_bytes = num_bytes / plan.num_descriptors
        read = Read(prefix_tokens, descriptor_bytes, self._clock(), num_bytes, num_bytes)
        self._reads.append(read)
        self._post(read, plan)

    def _cut(self, stretch: Stretch, descriptor_bytes: float) -> list[Stretch]:
        """Return the pieces that a stretch is to be packed in; none if it is read as it lies."""
        incoming = self._incoming
        if incoming is None or not self._packs(incoming, descriptor_bytes):
            return []
        assert self._remote is not None
        theirs = max_piece_bytes(self._remote.num_bytes)
        max_bytes = min(incoming.room.max_piece_bytes, theirs)
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

    def _ask(self, pending: ToPack) -> bool:
        """Ask for a piece, if there is room for it here; else wait for some."""
        incoming = self._incoming
        assert incoming is not None
        piece = incoming.pieces.piece(pending.stretch, self.spec.num_tokens, self.codec)
        offset = incoming.room.take(self.spec.request_id, piece.num_bytes)
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
        read = Read(
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

    def _send_pack(self, read: Read, pack: wire.Pack) -> None:
        read.asked_at = self._clock()
        # The answer comes when there is room for the piece; heartbeats tell that the peer lives.
        self._connections.send(self._peer, pack, expects_answer=False)

    def _post(self, read: Read, plan: ReadPlan) -> None:
        read.posted_at = self._clock()
        read.handle = self._transport.post_read(self._connections.name(self._peer), plan)
        self.counts.posted(plan, read.kv_bytes, read.piece is not None)

    def _arrived(self, read: Read) -> None:
        now = self._clock()
        if read.num_bytes >= _MEASURABLE_BYTES:
            self.rates.link.add(read.num_bytes, now - max(read.posted_at, self._last_end))
        if read.piece is not None and not read.is_void:
            try:
                read.coding = self._take_in(read, read.piece)
            except BaseException:
                self._reads.remove(read)
                self._release(read)
                raise

    def _taken_in(self, read: Read) -> None:
        """What was read is where it belongs."""
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

    def _take_in(self, read: Read, piece: Piece) -> Coding:
        """Begin to take a piece from the staging memory into the cache. Raises HandoffError."""
        assert self._incoming is not None
        coder = self._incoming.coder
        if self._digest and coder.digest_incoming(read.offset, read.num_bytes) != read.digest:
            raise HandoffError(Reason.DIGEST_MISMATCH, "a packed piece is not what was written")
        try:
            return coder.decode(piece, self.codec, self.spec.blocks, read.offset)
        except RuntimeError as error:  # PyTorch's, where arguments do not fit
            raise HandoffError(Reason.INTERNAL, f"a piece cannot be unpacked: {error}") from error

    def _forget_pending(self) -> None:
        self._pending.clear()
        if self._incoming is not None:
            self._incoming.room.leave(self.spec.request_id)

    def _forget_asked(self) -> None:
        for read in [read for read in self._reads if read.handle is None]:
            self._reads.remove(read)
            self._release(read)

    def _release(self, read: Read) -> None:
        if read.piece is not None:
            self._give_back(read)
            self._tell_unpacked(read.number)

    def _give_back(self, read: Read) -> None:
        if read.piece is not None:
            assert self._incoming is not None
            self._incoming.room.give_back(read.offset)

    def _tell_unpacked(self, number: int) -> None:
        message = wire.Unpacked(self.spec.source.handoff_id, self._local.rank, number)
        self._connections.send(self._peer, message, expects_answer=False)
