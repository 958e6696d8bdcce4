"""Where a rank's KV lies in memory.

One engine's KV cache is a few *groups* (vLLM's KV cache groups: layers that share one block
table), each group has *layers*, and each layer's blocks are one *region* of a rank's memory. What
two engines' KV is to each other is in ``mapping``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from vllm_pd_plugin.codecs.codec import FLOATS, Part
from vllm_pd_plugin.ids import BlockId

GroupKind = Literal["full", "sliding_window", "mla"]

BlockTables = Sequence[Sequence[BlockId]]
"""One block table for each KV cache group, indexed by position in the sequence."""

Stretch = tuple[range, ...]
"""Positions in the block table, for each layer in the order of the regions."""


class Region(msgspec.Struct, frozen=True):
    """A registered stretch of KV memory (one layer on one rank), addressed in blocks."""

    base: int
    num_blocks: int
    block_bytes: int
    stride_bytes: int

    def address(self, block: BlockId) -> int:
        """Return the address of a block's first byte."""
        return self.base + block * self.stride_bytes

    @property
    def is_dense(self) -> bool:
        """Whether neighbouring blocks touch, so that a run of them is one stretch of bytes."""
        return self.stride_bytes == self.block_bytes


class Span(msgspec.Struct, frozen=True):
    """A stretch of memory."""

    address: int
    num_bytes: int


class Group(msgspec.Struct, frozen=True):
    """Those layers of one rank that share one block table; a pipeline stage may have none of them.

    block_tokens: tokens in one block.
    window: tokens that attention looks back on, the current one included; None for full attention.
    block_shape: shape of one layer's block on one rank, as vLLM lays it out: heads, tokens,
        channels; without heads where all share one row.
    block_strides: elements from one to the next, in each of those dimensions.
    parts: what the channels of a row are; empty where that is not known.
    model_heads: KV heads of the whole model; 0 stands for those of this rank.
    channels: what a head has of a token, wherever it lies; see ``mapping.kv_cache.KvCacheSpec``.
    """

    kind: GroupKind
    block_tokens: int
    window: int | None
    layers: tuple[str, ...]
    block_shape: tuple[int, ...]
    dtype: str
    block_strides: tuple[int, ...] = ()
    parts: tuple[Part, ...] = ()
    model_heads: int = 0
    channels: tuple[tuple[str, int], ...] = ()

    @property
    def heads(self) -> int:
        """KV heads on one rank."""
        return self.block_shape[0] if len(self.block_shape) > 2 else 1

    @property
    def is_encodable(self) -> bool:
        """Whether lossy codecs know what to do with it."""
        return bool(self.parts) and self.dtype in FLOATS

    def needed_blocks(self, first_token: int, num_tokens: int) -> range:
        """Return the positions in the block table that a consumer must fetch.

        The consumer has KV for tokens [0, first_token) and wants [0, num_tokens). It then
        computes token ``num_tokens - 1`` again, so a window reaches back from that token.
        """
        first = first_token
        if self.window is not None:
            first = max(first, num_tokens - self.window)
        return range(first // self.block_tokens, math.ceil(num_tokens / self.block_tokens))

    def tokens_at(self, positions: range, num_tokens: int) -> range:
        """Return which of a prompt's ``num_tokens`` tokens some positions of the table have."""
        start, stop = (end * self.block_tokens for end in (positions.start, positions.stop))
        return range(start, min(stop, num_tokens)) if positions else range(0)


class RankLayout(msgspec.Struct, frozen=True):
    """How one rank's KV lies: all groups of its engine, and the layers that it has of each."""

    groups: tuple[Group, ...]

    @property
    def layers(self) -> list[str]:
        """The layers in the order of their regions: group by group."""
        return [layer for group in self.groups for layer in group.layers]

    def forward_order(self) -> list[int]:
        """Return the indices of the regions in the order in which a forward pass fills them."""
        return forward_order(self.layers)


def forward_order(layers: Sequence[str]) -> list[int]:
    """Return the indices of some layers in the order in which a forward pass fills them.

    vLLM names a layer by its place in the model, such as ``model.layers.7.self_attn.attn``;
    groups take layers from all over it.
    """
    return sorted(range(len(layers)), key=lambda i: (_place(layers[i]), i))


class RankMemory(msgspec.Struct, frozen=True):
    """One rank's KV memory as a peer needs it.

    regions: one a layer, in the order of the groups' ``layers``.
    transport_metadata: opaque bytes for ``Transport.add_peer``.
    staging: where packed pieces are put; None without.
    """

    regions: tuple[Region, ...]
    transport_metadata: bytes
    staging: Span | None = None


def _place(layer: str) -> int:
    # A peer says what its layers are called.
    numbers = [int(part) for part in layer.split(".") if part.isdecimal() and len(part) < 10]
    return numbers[0] if numbers else 0
