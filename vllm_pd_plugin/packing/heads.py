"""Pieces of some heads' KV, which lie in the way of neither engine: what is in them. Pure.

``mapping.match.Slab`` has how they are written down.
"""

from __future__ import annotations

import dataclasses

from vllm_pd_plugin.codecs.codec import FLOATS
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.mapping.kv_cache import FP8, ITEM_BYTES
from vllm_pd_plugin.memory.layout import BlockTables, Group, RankLayout
from vllm_pd_plugin.packing.pieces import Pieces, blocks_at
from vllm_pd_plugin.protocol.wire import Gather


@dataclasses.dataclass(frozen=True, slots=True)
class HeadsPiece:
    """Some tokens of some heads, in some layers of one KV cache group of a rank.

    regions: indices of the layers. heads: as they are numbered in a page.
    num_bytes: of the piece, whose elements are of ``dtype``. kv_bytes: what it takes in the cache.
    """

    group: int
    regions: tuple[int, ...]
    heads: range
    tokens: range
    dtype: str
    num_bytes: int
    kv_bytes: int

    @classmethod
    def of(
        cls,
        layout: RankLayout,
        group: int,
        regions: tuple[int, ...],
        heads: range,
        tokens: range,
        dtype: str,
    ) -> HeadsPiece:
        width = sum(part.width for part in layout.groups[group].parts)
        elements = len(regions) * len(tokens) * len(heads) * width
        kept = ITEM_BYTES[layout.groups[group].dtype]
        return cls(
            group, regions, heads, tokens, dtype, elements * ITEM_BYTES[dtype], elements * kept
        )


def checked_heads(pieces: Pieces, gather: Gather, tables: BlockTables) -> HeadsPiece:
    """Return the piece that a peer asks for, if it is one of what these block tables hold.

    Raises:
        HandoffError: it is not.
    """
    layout, regions = pieces.layout, pieces.regions
    tokens = range(gather.start, gather.stop)
    heads = range(gather.first_head, gather.first_head + gather.num_heads)
    if gather.group >= len(layout.groups) or not (tokens and heads and gather.regions):
        raise HandoffError(Reason.MISSING_BLOCKS, "a piece of nothing is wanted")
    group = layout.groups[gather.group]
    first = sum(len(other.layers) for other in layout.groups[: gather.group])
    of_group = range(first, first + len(group.layers))
    if len(set(gather.regions)) != len(gather.regions) or len(gather.regions) > len(of_group):
        raise HandoffError(Reason.MISSING_BLOCKS, "a layer is wanted twice")
    if heads.stop > group.heads or any(region not in of_group for region in gather.regions):
        raise HandoffError(
            Reason.MISSING_BLOCKS,
            f"heads {heads.start} to {heads.stop - 1} of layers {list(gather.regions)} are wanted; "
            f"there are {group.heads}, of layers {of_group.start} to {of_group.stop - 1}",
        )
    if gather.dtype not in _dtypes(group):
        raise HandoffError(
            Reason.INTERNAL, f"this KV cache of {group.dtype} cannot be written as {gather.dtype}"
        )
    blocks = blocks_at(tables[gather.group], positions_of(group, tokens))
    if max(blocks) >= min(regions[region].num_blocks for region in gather.regions):
        raise HandoffError(Reason.MISSING_BLOCKS, "a block lies outside its region")
    return HeadsPiece.of(layout, gather.group, gather.regions, heads, tokens, gather.dtype)


def positions_of(group: Group, tokens: range) -> range:
    """Return where in the block table the blocks of some tokens are."""
    return range(tokens.start // group.block_tokens, -(-tokens.stop // group.block_tokens))


def _dtypes(group: Group) -> tuple[str, ...]:
    """Return what elements of a KV cache can become."""
    if not group.parts or group.dtype not in ITEM_BYTES:
        return ()
    if group.dtype == FP8:
        return (FP8,)
    return (*FLOATS, FP8) if group.dtype == "bfloat16" else tuple(FLOATS)
