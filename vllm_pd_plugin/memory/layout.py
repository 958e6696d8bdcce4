"""Where KV lies in memory, and which engines' KV fit together.

One engine's KV cache is a few *groups* (vLLM's KV cache groups: layers that share one block
table), each group has *layers*, and each layer's blocks are one *region* of a rank's memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from vllm_pd_plugin.codecs.codec import FLOATS, Part
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.ids import BlockId

GroupKind = Literal["full", "sliding_window"]

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
    """Layers that share one block table.

    block_tokens: tokens in one block.
    window: tokens that attention looks back on, the current one included; None for full attention.
    block_shape: shape of one layer's block on one rank, as vLLM lays it out: heads, tokens,
        channels; without heads where all share one row.
    block_strides: elements from one to the next, in each of those dimensions.
    parts: what the channels of a row are; empty where that is not known.
    """

    kind: GroupKind
    block_tokens: int
    window: int | None
    layers: tuple[str, ...]
    block_shape: tuple[int, ...]
    dtype: str
    block_strides: tuple[int, ...] = ()
    parts: tuple[Part, ...] = ()

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


class EngineLayout(msgspec.Struct, frozen=True):
    """How KV lies, as far as it must agree between two engines before one may read the other's;
    what it is, is in ``KvIdentity``."""

    tensor_parallel_size: int
    groups: tuple[Group, ...]

    @property
    def layers(self) -> list[str]:
        """The layers in the order of their regions: group by group."""
        return [layer for group in self.groups for layer in group.layers]

    def forward_order(self) -> list[int]:
        """Return the indices of the regions in the order in which a forward pass fills them.

        vLLM names a layer by its place in the model, such as ``model.layers.7.self_attn.attn``;
        groups take layers from all over it.
        """
        layers = self.layers
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
    numbers = [int(part) for part in layer.split(".") if part.isdigit()]
    return numbers[0] if numbers else 0


def check_compatible(local: EngineLayout, remote: EngineLayout) -> None:
    """Refuse a peer whose KV blocks do not mean the same as ours.

    Raises:
        PeerError: names the first thing that differs.
    """
    for name, ours, theirs in _facets(local, remote):
        if ours != theirs:
            raise PeerError(
                Reason.PEER_INCOMPATIBLE,
                f"the peer's {name} is {theirs}, ours is {ours}; both engines need the same "
                "model, data types, block size and tensor parallel size",
            )


def _facets(local: EngineLayout, remote: EngineLayout) -> list[tuple[str, object, object]]:
    rows: list[tuple[str, object, object]] = [
        ("tensor parallel size", local.tensor_parallel_size, remote.tensor_parallel_size),
        ("number of KV cache groups", len(local.groups), len(remote.groups)),
    ]
    for index, (ours, theirs) in enumerate(zip(local.groups, remote.groups, strict=False)):
        rows += [
            (f"KV cache group {index} {field}", getattr(ours, field), getattr(theirs, field))
            for field in Group.__struct_fields__
        ]
    return rows
