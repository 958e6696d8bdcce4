"""An engine's KV caches in memory in which every byte knows what it is of.

The model says for itself where each element lies and which rank has which head; of the mapping it
takes only the descriptions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vllm_pd_plugin.codecs.codec import Part
from vllm_pd_plugin.mapping.kv_cache import ITEM_BYTES, EngineKvCache
from vllm_pd_plugin.memory.layout import RankMemory

Numbers = NDArray[np.int64]

NOTHING = -1
"""What a byte is that nobody wrote."""
_BYTES, _CHANNELS, _TOKENS, _HEADS, _PARTS = 8, 64, 4096, 64, 4


def elements(layer: int, part: int, heads: Numbers, tokens: Numbers, width: int) -> Numbers:
    """Return the numbers of a layer's elements, ``[tokens, heads, channels]``; no two are alike.

    A byte's number is that of its element and which of its bytes it is.
    """
    of_heads = (layer * _PARTS + part) * _HEADS + heads[None, :, None]
    of_tokens = of_heads * _TOKENS + tokens[:, None, None]
    return (of_tokens * _CHANNELS + np.arange(width)) * _BYTES


def heads_on(num_heads: int, tensor_parallel_size: int, rank: int) -> range:
    """Return the heads of a tensor parallel rank, as vLLM says it."""
    if tensor_parallel_size >= num_heads:
        head = rank // (tensor_parallel_size // num_heads)
        return range(head, head + 1)
    each = num_heads // tensor_parallel_size
    return range(rank * each, rank * each + each)


@dataclasses.dataclass(frozen=True, slots=True)
class Engine:
    """One engine, and the blocks of one request.

    told: what it says of itself. parts: what is in the pages of each group, told or not.
    tables: a block table for each group. ranks: where each rank's regions are, from address 0.
    layers: all layers of the model, by number.
    """

    told: EngineKvCache
    parts: tuple[tuple[Part, ...], ...]
    tables: tuple[tuple[int, ...], ...]
    ranks: tuple[RankMemory, ...]
    layers: tuple[str, ...]

    def empty(self, rank: int) -> Numbers:
        """Return a rank's memory, a number for each byte, with nothing in it."""
        regions = self.ranks[rank].regions
        size = max((r.base + r.num_blocks * r.stride_bytes for r in regions), default=0)
        return np.full(size, NOTHING, np.int64)

    def written(self, rank: int) -> Numbers:
        """Return a rank's memory with KV in all blocks that the tables have."""
        memory = self.empty(rank)
        for group in range(len(self.told.groups)):
            for places, numbers in self.contents(rank, group, self.held(group)):
                memory[places] = numbers
        return memory

    def held(self, group: int) -> range:
        """Return the tokens for which a group's block table has blocks."""
        table, block = self.tables[group], self.told.groups[group].layout.block_tokens
        return range(table.count(0) * block, len(table) * block)

    def contents(self, rank: int, group: int, tokens: range) -> Iterator[tuple[Numbers, Numbers]]:
        """Yield where all bytes are that a rank has of some tokens in the layers of a group, and
        their numbers."""
        told, tp = self.told.groups[group], self.told.tensor_parallel_size
        stage, tp_rank = divmod(rank, tp)
        heads = heads_on(told.spec.num_heads, tp, tp_rank)
        counted = self.counted(group, tokens)
        first = sum(len(other.layout.layers[stage]) for other in self.told.groups[:group])
        for region, layer in enumerate(told.layout.layers[stage], first):
            number = self.layers.index(layer)
            for part, each in enumerate(self.parts[group]):
                places = self.places(rank, group, region, part, range(len(heads)), counted)
                of_part = elements(number, part, np.array(heads), counted, each.width)
                nth = np.arange(ITEM_BYTES[told.layout.dtype])
                yield places[..., None] + nth, of_part[..., None] + nth

    def counted(self, group: int, tokens: range) -> Numbers:
        """Return the tokens that have KV: a Mamba state is that of its block's last token."""
        every = np.array(tokens, np.int64)
        if self.told.groups[group].spec.kind != "mamba":
            return every
        block = self.told.groups[group].layout.block_tokens
        return every[every % block == block - 1]

    def places(
        self, rank: int, group: int, region: int, part: int, heads: range, tokens: Numbers
    ) -> Numbers:
        """Return where elements begin, ``[tokens, heads, channels]``.

        region: by its number on the rank. heads: by their numbers in the page.
        """
        layout, memory = self.told.groups[group].layout, self.ranks[rank].regions[region]
        blocks = np.array(self.tables[group], np.int64)[tokens // layout.block_tokens]
        assert blocks.all(), "a token is looked for in a block that is no more"
        each = self.parts[group][part]
        slots, channels = tokens % layout.block_tokens, np.arange(each.width)
        to_tile, to_token, to_channel_tile, to_channel = each.strides
        of_slots = slots // each.token_tile * to_tile + slots % each.token_tile * to_token
        of_channels = channels // each.channel_tile * to_channel_tile
        of_channels += channels % each.channel_tile * to_channel
        of_heads = each.start + np.array(heads) * layout.head_stride
        inside = of_slots[:, None, None] + of_heads[None, :, None] + of_channels
        pages = memory.base + blocks * memory.stride_bytes
        return pages[:, None, None] + inside * ITEM_BYTES[layout.dtype]
