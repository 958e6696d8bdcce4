"""Per attempt: packed pieces that are asked of a peer, and taken into the cache.

A piece takes the way ask, wait for the producer to write it down, read, take into the cache; its
place in the incoming staging memory is taken before it is asked for, and given back when nothing is
written there any more.
"""

from __future__ import annotations

import numpy as np

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.mapping.match import Share
from vllm_pd_plugin.memory.layout import Span, Stretch
from vllm_pd_plugin.net.transport import ReadPlan
from vllm_pd_plugin.packing.incoming import Incoming, Packing, Taker
from vllm_pd_plugin.packing.packer import Coding
from vllm_pd_plugin.packing.staging import max_piece_bytes
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.transfer.asked import Asked, AskedBlocks, Question, heads_asked
from vllm_pd_plugin.transfer.rank import Rank
from vllm_pd_plugin.transfer.rates import Prospect, choose_codec
from vllm_pd_plugin.transfer.reads import Read, ToPack
from vllm_pd_plugin.transfer.remote import ASK_AGAIN_S, RemoteHandoff
from vllm_pd_plugin.transfer.specs import FetchSpec, Segment
from vllm_pd_plugin.transfer.stretches import Stretches

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
        self._shares = remote.route.shares
        self._counterpart = remote.route.counterpart
        self._incoming = rank.local.incoming
        self._last_number = 0
        self._lost: list[tuple[int, int]] = []
        """Rank of the producer, and number."""

    def follow(self, before: PeerPieces) -> None:
        """Take the place of those of a connection that was closed. The producer may keep them,
        under numbers that are not used again."""
        self.codec, self._last_number = before.codec, before._last_number
        for source_rank, number in before._lost:
            self._remote.unpacked(source_rank, number)

    def choose_codec(self, wanted: Stretch, is_sealed: bool) -> None:
        """Settle how KV is asked for, now that it is known what there is to read: between engines
        that are not alike always bit for bit, or converted."""
        choice, incoming = self._spec.codec, self._incoming
        if self._counterpart is None or incoming is None or not self._staging(self._counterpart):
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

    def cut(
        self, stretches: Stretches, stretch: Stretch, descriptor_bytes: float
    ) -> tuple[list[Asked], tuple[Share, ...]]:
        """Return the pieces that a stretch is to be packed in, and which shares are not in them:
        those are read as they lie.

        descriptor_bytes: how long the runs of bytes are on average, of what can be.
        """
        incoming = self._incoming
        if incoming is None:
            return [], self._shares
        packs = self._packs(incoming.packing, descriptor_bytes)
        if self._counterpart is not None:
            asked = self._blocks(incoming, stretch, self._counterpart) if packs else []
            return asked, () if asked else self._shares
        asked, rest = [], []
        for share in self._shares:
            most = self._max_bytes(incoming, share.source_rank)
            # Only a piece can be compared with what the producer has.
            must = share.direct is None or self._rank.digest is not None
            slab = share.slab
            if slab is not None and (must or (packs and slab.token_bytes <= most)):
                tokens = stretches.tokens_of(stretch, share)
                asked += heads_asked(self._rank.local.layout, share, slab, tokens, most)
            else:
                rest.append(share)
        return asked, tuple(rest)

    def _blocks(self, incoming: Incoming, stretch: Stretch, counterpart: int) -> list[Asked]:
        if self._staging(counterpart) is None:
            return []
        pieces, most = incoming.pieces, self._max_bytes(incoming, counterpart)
        try:
            parts = pieces.split(stretch, self._num_tokens, self.codec, most)
        except HandoffError:
            if self.codec is not Codec.RAW:
                raise
            return []  # not even a block fits into the staging memory
        return [
            AskedBlocks(
                counterpart,
                self.codec,
                self._num_tokens,
                pieces.layer_runs(part),
                pieces.piece(part, self._num_tokens, self.codec),
            )
            for part in parts
        ]

    def _staging(self, source_rank: int) -> Span | None:
        return self._remote.memory(source_rank).staging

    def _max_bytes(self, incoming: Incoming, source_rank: int) -> int:
        """Return how large a piece of a rank there may be: nothing where that packs nothing."""
        staging = self._staging(source_rank)
        if staging is None:
            return 0
        return min(incoming.room.max_piece_bytes, max_piece_bytes(staging.num_bytes))

    def _packs(self, packing: Packing, descriptor_bytes: float) -> bool:
        if self.codec is not Codec.RAW or packing is Packing.ALWAYS:
            return True
        if packing is Packing.NEVER:
            return False
        return self._remote.rates.prefers_packing(descriptor_bytes)

    def begin(self, pending: ToPack, epoch: int) -> Read | None:
        """Return a piece that is to be asked for, see ``send``; None where there is no room for it
        here: then it waits for some."""
        incoming, asked = self._incoming, pending.asked
        assert incoming is not None
        offset = incoming.room.take(self._taker, asked.piece.num_bytes)
        if offset is None:
            return None
        self._last_number += 1
        has_digest = self._rank.digest is not None
        question = Question(self._remote.handoff_id, epoch, self._remote.rank, has_digest)
        return Read(
            asked.source_rank,
            pending.prefix_tokens,
            pending.descriptor_bytes,
            self._rank.clock(),
            asked.piece.num_bytes,
            asked.piece.kv_bytes,
            asked=asked,
            message=asked.message(question, self._last_number),
            number=self._last_number,
            offset=offset,
        )

    def send(self, read: Read) -> None:
        """Ask for a piece."""
        assert read.message is not None
        read.asked_at = self._rank.clock()
        self._remote.pack(read.message)

    def ask_again(self, read: Read) -> None:
        """Ask once more for what does not come."""
        overdue = self._rank.clock() >= read.asked_at + ASK_AGAIN_S
        if read.handle is None and overdue:
            self.send(read)

    def plan(self, read: Read, packed: wire.Packed) -> ReadPlan:
        """Plan to read a piece that the producer has written down. Raises HandoffError."""
        assert self._incoming is not None
        staging = self._staging(read.source_rank)
        assert staging is not None
        end = packed.offset + packed.num_bytes
        if packed.num_bytes != read.num_bytes or end > staging.num_bytes:
            raise HandoffError(
                Reason.MISSING_BLOCKS,
                f"a packed piece has {packed.num_bytes} bytes, expected are {read.num_bytes}",
            )
        read.digest = packed.digest
        local = self._incoming.span.address + read.offset
        remote = staging.address + packed.offset
        columns = (np.array([n], np.uint64) for n in (local, remote, read.num_bytes))
        return ReadPlan(*columns)

    def take_in(self, read: Read, asked: Asked) -> Coding:
        """Begin to take a piece from the staging memory into the cache. Raises HandoffError."""
        assert self._incoming is not None
        coder, has_digest = self._incoming.coder, self._rank.digest is not None
        if has_digest and coder.digest_incoming(read.offset, read.num_bytes) != read.digest:
            raise HandoffError(Reason.DIGEST_MISMATCH, "a packed piece is not what was written")
        try:
            return asked.take_in(coder, self._spec.blocks, read.offset)
        except RuntimeError as error:  # PyTorch's, where arguments do not fit
            raise HandoffError(Reason.INTERNAL, f"a piece cannot be unpacked: {error}") from error

    def release(self, read: Read) -> None:
        """A read has ended, or its piece is not wanted any more."""
        if read.asked is not None:
            self._give_back(read)
            self._remote.unpacked(read.source_rank, read.number)

    def refuse(self, packed: wire.Packed) -> None:
        """A piece has come that nobody waits for."""
        for source_rank in self._remote.route.source_ranks:  # who has it, it does not say
            self._remote.unpacked(source_rank, packed.number)

    def lose(self, read: Read) -> None:
        """The connection is closed: the producer can be told only on the next one."""
        if read.asked is not None:
            self._lost.append((read.source_rank, read.number))
            self._give_back(read)

    def leave_queue(self) -> None:
        """No piece waits for room any more."""
        if self._incoming is not None:
            self._incoming.room.leave(self._taker)

    def _give_back(self, read: Read) -> None:
        assert self._incoming is not None
        self._incoming.room.give_back(read.offset)
