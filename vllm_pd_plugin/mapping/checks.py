"""A description of a KV cache that cannot be true is refused before anything is derived from it.

Nothing here takes time or memory by what a number says: only by how long the description is.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_pd_plugin.codecs.codec import Part
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.mapping.kv_cache import (
    ITEM_BYTES,
    EngineKvCache,
    KvCacheGroup,
    KvCacheLayout,
    heads_of,
)
from vllm_pd_plugin.memory.layout import RankMemory

_MOST = 2**48
"""Of anything that is counted, or measured in bytes."""
_ADDRESSES = 2**64


def incompatible(text: str) -> PeerError:
    """Return the one error by which the mapping refuses a pair of engines."""
    return PeerError(Reason.PEER_INCOMPATIBLE, text)


def check_description(kv_cache: EngineKvCache, whose: str) -> None:
    """Refuse a description that contradicts itself.

    whose: begins the message: "their" or "our".

    Raises:
        PeerError: names the field and its value.
    """
    if not kv_cache.groups:
        raise incompatible(f"{whose} KV cache has no groups")
    tp, stages = kv_cache.tensor_parallel_size, kv_cache.pipeline_parallel_size
    _check_count(f"{whose} tensor parallel size", tp)
    if not 0 <= kv_cache.data_parallel_rank <= _MOST:
        raise incompatible(f"{whose} data parallel rank is {kv_cache.data_parallel_rank}")
    seen: set[str] = set()
    for index, group in enumerate(kv_cache.groups):
        name = f"{whose} KV cache group {index}"
        if not stages or len(group.layout.layers) != stages:
            raise incompatible(
                f"{name} is divided into {len(group.layout.layers)} pipeline stages, "
                f"{whose} KV cache group 0 into {stages}"
            )
        for layer in (layer for stage in group.layout.layers for layer in stage):
            if layer in seen:
                raise incompatible(f"{name} has layer {layer} a second time")
            seen.add(layer)
        _check_spec(group, name)
        heads = group.spec.num_heads
        if heads % tp and tp % heads:
            raise incompatible(
                f"{name} has {heads} KV heads, which {whose} tensor parallel size {tp} does not "
                "divide"
            )
        _check_layout(group, len(heads_of(heads, tp, 0)), name)
    if not seen:
        raise incompatible(f"{whose} KV cache has no layers")


def check_memory(kv_cache: EngineKvCache, ranks: Sequence[RankMemory], whose: str) -> None:
    """Refuse memory that is not what a checked description says.

    Raises:
        PeerError: names the rank, and both values.
    """
    if len(ranks) != kv_cache.num_ranks:
        raise incompatible(
            f"{whose} memory is that of {len(ranks)} ranks, tensor parallel size "
            f"{kv_cache.tensor_parallel_size} and {kv_cache.pipeline_parallel_size} pipeline "
            f"stages make {kv_cache.num_ranks}"
        )
    pages_of = [
        [group.layout.page_bytes for group in kv_cache.groups for _ in group.layout.layers[stage]]
        for stage in range(kv_cache.pipeline_parallel_size)
    ]
    for rank, memory in enumerate(ranks):
        pages = pages_of[rank // kv_cache.tensor_parallel_size]
        if len(memory.regions) != len(pages):
            raise incompatible(
                f"{whose} rank {rank} has {len(memory.regions)} regions for {len(pages)} layers"
            )
        for region, page_bytes in zip(memory.regions, pages, strict=True):
            if region.block_bytes != page_bytes:
                raise incompatible(
                    f"{whose} rank {rank} has a region with blocks of {region.block_bytes} bytes, "
                    f"pages have {page_bytes}"
                )
            end = region.base + region.num_blocks * region.stride_bytes
            if not (
                region.num_blocks > 0
                and region.stride_bytes >= page_bytes
                and 0 <= region.base < end <= _ADDRESSES
            ):
                raise incompatible(f"{whose} rank {rank} has a region that cannot be: {region}")


def _check_count(name: str, value: int) -> None:
    if not 1 <= value <= _MOST:
        raise incompatible(f"{name} is {value}")


def _check_spec(group: KvCacheGroup, name: str) -> None:
    spec = group.spec
    _check_count(f"{name}'s number of KV heads", spec.num_heads)
    if (spec.kind == "sliding_window") != (spec.window is not None):
        raise incompatible(f"{name} is of kind {spec.kind} and has a window of {spec.window}")
    if spec.window is not None:
        _check_count(f"{name}'s window", spec.window)
    for channels, width in spec.channels:
        _check_count(f"{name}'s width of a {channels}", width)


def _check_layout(group: KvCacheGroup, heads: int, name: str) -> None:
    layout = group.layout
    _check_count(f"{name}'s block size", layout.block_tokens)
    _check_count(f"{name}'s page", layout.page_bytes)
    if not layout.parts:
        return
    if layout.dtype not in ITEM_BYTES:
        raise incompatible(
            f"{name} has elements of {layout.dtype}, known are {', '.join(ITEM_BYTES)}"
        )
    parts = tuple((part.kind, part.width) for part in layout.parts)
    if parts != group.spec.channels:
        raise incompatible(f"{name}'s pages have {parts}, its heads {group.spec.channels}")
    item_bytes = ITEM_BYTES[layout.dtype]
    for part in layout.parts:
        _check_part(part, layout, heads, name)
    of_token = heads * sum(part.width for part in layout.parts) * item_bytes
    if of_token * layout.block_tokens > layout.page_bytes:
        raise incompatible(
            f"{name} has pages of {layout.page_bytes} bytes, too few for {layout.block_tokens} "
            f"tokens of {of_token} bytes"
        )


def _check_part(part: Part, layout: KvCacheLayout, heads: int, name: str) -> None:
    """Refuse tiles that do not make up the block, and elements that lie outside of the page."""
    tiles = part.token_tile, part.channel_tile
    steps = (*part.strides, part.start, layout.head_stride)
    if min(tiles) < 1 or layout.block_tokens % tiles[0] or part.width % tiles[1]:
        raise incompatible(
            f"{name}'s {part.kind} lies in tiles of {tiles[0]} tokens by {tiles[1]} channels, in "
            f"blocks of {layout.block_tokens} tokens by {part.width}"
        )
    if len(part.strides) != 4 or not all(0 <= step <= _MOST for step in steps):
        raise incompatible(f"{name}'s {part.kind} has start and strides {steps}")
    lengths = (layout.block_tokens // tiles[0], tiles[0], part.width // tiles[1], tiles[1], heads)
    strides = (*part.strides, layout.head_stride)
    last = part.start + sum((n - 1) * step for n, step in zip(lengths, strides, strict=True))
    end = (last + 1) * ITEM_BYTES[layout.dtype]
    if end > layout.page_bytes:
        raise incompatible(
            f"{name}'s {part.kind} reaches to byte {end} of pages of {layout.page_bytes} bytes"
        )
