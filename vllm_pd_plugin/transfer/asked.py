"""Pieces of KV that a producer is asked to write down, to be read as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.ids import HandoffId
from vllm_pd_plugin.mapping.match import Share, Slab
from vllm_pd_plugin.memory.layout import BlockTables, RankLayout
from vllm_pd_plugin.packing.heads import HeadsPiece
from vllm_pd_plugin.packing.packer import Coder, Coding
from vllm_pd_plugin.packing.pieces import Piece
from vllm_pd_plugin.protocol import wire


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """What is the same for every piece of a handoff's epoch: who asks, and whether for a digest."""

    handoff_id: HandoffId
    epoch: int
    rank: int
    digest: bool


class Asked(Protocol):
    """One piece.

    source_rank: who is asked.
    """

    @property
    def source_rank(self) -> int: ...

    @property
    def piece(self) -> Piece | HeadsPiece: ...

    def message(self, question: Question, number: int) -> wire.Pack | wire.Gather: ...

    def take_in(self, coder: Coder, tables: BlockTables, offset: int) -> Coding:
        """Begin to take it from the staging memory into the cache."""


@dataclasses.dataclass(frozen=True, slots=True)
class AskedBlocks:
    """Blocks of a counterpart, whose pages are like ours, written down by a codec."""

    source_rank: int
    codec: Codec
    num_tokens: int
    runs: tuple[wire.LayerRun, ...]
    piece: Piece

    def message(self, question: Question, number: int) -> wire.Pack:
        return wire.Pack(
            question.handoff_id,
            question.epoch,
            question.rank,
            self.source_rank,
            number,
            self.codec,
            self.num_tokens,
            self.runs,
            question.digest,
        )

    def take_in(self, coder: Coder, tables: BlockTables, offset: int) -> Coding:
        return coder.decode(self.piece, self.codec, tables, offset)


@dataclasses.dataclass(frozen=True, slots=True)
class AskedHeads:
    """Some heads of a rank whose pages are not like ours.

    source_regions: of the piece's layers, there.
    """

    share: Share
    source_regions: tuple[int, ...]
    piece: HeadsPiece

    @property
    def source_rank(self) -> int:
        return self.share.source_rank

    def message(self, question: Question, number: int) -> wire.Gather:
        return wire.Gather(
            question.handoff_id,
            question.epoch,
            question.rank,
            self.source_rank,
            number,
            self.share.source_group,
            self.source_regions,
            self.share.source_head,
            len(self.share.heads),
            self.piece.tokens.start,
            self.piece.tokens.stop,
            self.piece.dtype,
            question.digest,
        )

    def take_in(self, coder: Coder, tables: BlockTables, offset: int) -> Coding:
        return coder.scatter(self.piece, tables, offset)


def heads_asked(
    layout: RankLayout, share: Share, slab: Slab, tokens: list[range], max_bytes: int
) -> Iterator[AskedHeads]:
    """Yield the pieces, of at most ``max_bytes``, in which a share is asked for.

    layout: ours. tokens: for each of the share's layers.

    Raises:
        HandoffError: not even one token of one layer is that small.
    """
    most_tokens = max_bytes // slab.token_bytes
    if not most_tokens:
        raise HandoffError(
            Reason.INTERNAL,
            f"a token of one layer does not fit into a piece of {max_bytes} bytes; "
            "raise staging_bytes",
        )
    together: dict[range, list[int]] = {}
    for number, wanted in enumerate(tokens):
        if wanted:
            together.setdefault(wanted, []).append(number)
    heads = range(share.head, share.head + len(share.heads))
    for wanted, numbers in together.items():
        for start in range(wanted.start, wanted.stop, most_tokens):
            part = range(start, min(start + most_tokens, wanted.stop))
            most_layers = most_tokens // len(part)
            for first in range(0, len(numbers), most_layers):
                chosen = numbers[first : first + most_layers]
                regions = tuple(share.regions[number] for number in chosen)
                piece = HeadsPiece.of(layout, share.group, regions, heads, part, slab.dtype)
                yield AskedHeads(
                    share, tuple(share.source_regions[number] for number in chosen), piece
                )
