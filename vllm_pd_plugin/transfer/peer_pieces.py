"""Per attempt: packed pieces that are asked of a peer, and taken into the cache.

A piece takes the way ask, wait for the producer to write it down, read, take into the cache; its
place in the incoming staging memory is taken before it is asked for, and given back when nothing is
written there any more.
"""

from __future__ import annotations

import numpy as np

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.memory.layout import Stretch
from vllm_pd_plugin.net.transport import ReadPlan
from vllm_pd_plugin.packing.incoming import Packing, Taker
from vllm_pd_plugin.packing.packer import Coding
from vllm_pd_plugin.packing.pieces import Piece
from vllm_pd_plugin.packing.staging import max_piece_bytes
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.transfer.rank import Rank
from vllm_pd_plugin.transfer.rates import Prospect, choose_codec
from vllm_pd_plugin.transfer.reads import Read, ToPack
from vllm_pd_plugin.transfer.remote import ASK_AGAIN_S, RemoteHandoff
from vllm_pd_plugin.transfer.specs import FetchSpec, Segment

_TYPICAL_STRETCH_BYTES = 2 * 2**20


class PeerPieces:
    """All pieces of one attempt.

    codec: how KV is asked for; set before the first read.
    """

    def __init__(
        self, spec: FetchSpec, segment: Segment, rank: Rank, remote: RemoteHandoff
    ) -> None:
        self.codec = Codec.RAW
        self._spec = spec
        self._num_tokens = segment.tokens.stop
        self._taker: Taker = spec.request_id, segment.tokens.start
        self._rank = rank
        self._remote = remote
        self._staging = remote.memory.staging
        self._incoming = rank.local.incoming if self._staging else None
        self._last_number = 0
        self._lost: list[int] = []

    def follow(self, before: PeerPieces) -> None:
        """Take the place of those of a connection that was closed. The producer may keep them,
        under numbers that are not used again."""
        self.codec, self._last_number = before.codec, before._last_number
        for number in before._lost:
            self._remote.unpacked(number)

    def choose_codec(self, wanted: Stretch, is_sealed: bool) -> None:
        """Settle how KV is asked for, now that it is known what there is to read."""
        choice, incoming = self._spec.codec, self._incoming
        if incoming is None:
            return
        if choice.codec is not None:
            self.codec = choice.codec
            return
        sizes = {
            codec: incoming.pieces.piece(wanted, self._num_tokens, codec).num_bytes
            for codec in (Codec.RAW, *incoming.coding)
        }
        kv_bytes = sizes[Codec.RAW]
        rates = self._remote.rates
        prospect = Prospect(
            kv_bytes,
            sizes,
            rates.link.value,
            None if is_sealed else rates.prefill.value,
            incoming.coding,
            max(1, min(kv_bytes // _TYPICAL_STRETCH_BYTES, len(wanted))),
        )
        self.codec = choose_codec(prospect, choice.narrowest)

    def cut(self, stretch: Stretch, descriptor_bytes: float) -> list[Stretch]:
        """Return the pieces that a stretch is to be packed in; none if it is read as it lies.

        descriptor_bytes: how long its runs of blocks are on average.
        """
        incoming = self._incoming
        if incoming is None or not self._packs(incoming.packing, descriptor_bytes):
            return []
        assert self._staging is not None
        theirs = max_piece_bytes(self._staging.num_bytes)
        max_bytes = min(incoming.room.max_piece_bytes, theirs)
        try:
            return incoming.pieces.split(stretch, self._num_tokens, self.codec, max_bytes)
        except HandoffError:
            if self.codec is not Codec.RAW:
                raise
            return []  # not even a block fits into the staging memory

    def _packs(self, packing: Packing, descriptor_bytes: float) -> bool:
        if self.codec is not Codec.RAW or packing is Packing.ALWAYS:
            return True
        if packing is Packing.NEVER:
            return False
        return self._remote.rates.prefers_packing(descriptor_bytes)

    def begin(self, pending: ToPack, epoch: int) -> Read | None:
        """Return a piece that is to be asked for, see ``send``; None where there is no room for it
        here: then it waits for some."""
        incoming = self._incoming
        assert incoming is not None
        piece = incoming.pieces.piece(pending.stretch, self._num_tokens, self.codec)
        offset = incoming.room.take(self._taker, piece.num_bytes)
        if offset is None:
            return None
        self._last_number += 1
        pack = wire.Pack(
            self._remote.handoff_id,
            epoch,
            self._remote.rank,
            self._last_number,
            self.codec,
            self._num_tokens,
            incoming.pieces.layer_runs(pending.stretch),
            self._rank.digest is not None,
        )
        return Read(
            pending.prefix_tokens,
            pending.descriptor_bytes,
            self._rank.clock(),
            piece.num_bytes,
            piece.kv_bytes,
            pack=pack,
            piece=piece,
            number=self._last_number,
            offset=offset,
        )

    def send(self, read: Read) -> None:
        """Ask for a piece."""
        assert read.pack is not None
        read.asked_at = self._rank.clock()
        self._remote.pack(read.pack)

    def ask_again(self, read: Read) -> None:
        """Ask once more for what does not come."""
        overdue = self._rank.clock() >= read.asked_at + ASK_AGAIN_S
        if read.handle is None and overdue:
            self.send(read)

    def plan(self, read: Read, packed: wire.Packed) -> ReadPlan:
        """Plan to read a piece that the producer has written down. Raises HandoffError."""
        assert self._incoming is not None
        assert self._staging is not None
        end = packed.offset + packed.num_bytes
        if packed.num_bytes != read.num_bytes or end > self._staging.num_bytes:
            raise HandoffError(
                Reason.MISSING_BLOCKS,
                f"a packed piece has {packed.num_bytes} bytes, expected are {read.num_bytes}",
            )
        read.digest = packed.digest
        local = self._incoming.span.address + read.offset
        remote = self._staging.address + packed.offset
        columns = (np.array([n], np.uint64) for n in (local, remote, read.num_bytes))
        return ReadPlan(*columns)

    def take_in(self, read: Read, piece: Piece) -> Coding:
        """Begin to take a piece from the staging memory into the cache. Raises HandoffError."""
        assert self._incoming is not None
        coder, has_digest = self._incoming.coder, self._rank.digest is not None
        if has_digest and coder.digest_incoming(read.offset, read.num_bytes) != read.digest:
            raise HandoffError(Reason.DIGEST_MISMATCH, "a packed piece is not what was written")
        try:
            return coder.decode(piece, self.codec, self._spec.blocks, read.offset)
        except RuntimeError as error:  # PyTorch's, where arguments do not fit
            raise HandoffError(Reason.INTERNAL, f"a piece cannot be unpacked: {error}") from error

    def release(self, read: Read) -> None:
        """A read has ended, or its piece is not wanted any more."""
        if read.piece is not None:
            self._give_back(read)
            self._remote.unpacked(read.number)

    def refuse(self, packed: wire.Packed) -> None:
        """A piece has come that nobody waits for."""
        self._remote.unpacked(packed.number)

    def lose(self, read: Read) -> None:
        """The connection is closed: the producer can be told only on the next one."""
        if read.piece is not None:
            self._lost.append(read.number)
            self._give_back(read)

    def leave_queue(self) -> None:
        """No piece waits for room any more."""
        if self._incoming is not None:
            self._incoming.room.leave(self._taker)

    def _give_back(self, read: Read) -> None:
        assert self._incoming is not None
        self._incoming.room.give_back(read.offset)
