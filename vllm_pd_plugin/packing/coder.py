"""Per process: moves pieces of KV between a rank's cache and its staging memory, with the ops."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from vllm_pd_plugin.codecs import heads, ops
from vllm_pd_plugin.codecs.codec import Codec, Encoding, encoding_of
from vllm_pd_plugin.memory.layout import BlockTables, RankLayout
from vllm_pd_plugin.packing.digests import slab_digest
from vllm_pd_plugin.packing.heads import HeadsPiece, positions_of
from vllm_pd_plugin.packing.packer import Coding
from vllm_pd_plugin.packing.pieces import Piece, Pieces, Slice, blocks_at
from vllm_pd_plugin.packing.streams import stream_of

_TRIAL_BYTES = 4 * 2**20
_TRIALS = 3


class BlockCoder:
    """See ``packer.Coder``.

    caches: one a layer, in the order of the regions; see ``ops.as_plane``.
    outgoing, incoming: staging memory, uint8, one contiguous dimension, on the caches' device.
    """

    def __init__(
        self,
        layout: RankLayout,
        pieces: Pieces,
        caches: Sequence[torch.Tensor],
        outgoing: torch.Tensor,
        incoming: torch.Tensor,
    ) -> None:
        self._groups = layout.groups
        self._pieces = pieces
        self._planes = [ops.as_plane(cache) for cache in caches]
        groups = [group for group in layout.groups for _ in group.layers]
        self._parts = [
            [ops.part_of(cache, part) for part in group.parts]
            for cache, group in zip(caches, groups, strict=True)
        ]
        self._outgoing = outgoing
        self._incoming = incoming
        self._stream = stream_of(incoming.device)

    def encode(self, piece: Piece, codec: Codec, tables: BlockTables, offset: int) -> Coding:
        slab = self._outgoing[offset : offset + piece.num_bytes]
        with self._stream.entered() as coding:
            for part, blocks, memory in self._places(piece, codec, tables, slab):
                if codec is Codec.RAW:
                    ops.pack_blocks([self._planes[layer] for layer in part.layers], blocks, memory)
                    continue
                for encoding, parts, stripes in self._stripes(part, codec, memory):
                    ops.encode_blocks(parts, blocks, part.tokens, encoding, part.sinks, stripes)
        return coding

    def decode(self, piece: Piece, codec: Codec, tables: BlockTables, offset: int) -> Coding:
        slab = self._incoming[offset : offset + piece.num_bytes]
        with self._stream.entered() as coding:
            for part, blocks, memory in self._places(piece, codec, tables, slab):
                if codec is Codec.RAW:
                    planes = [self._planes[layer] for layer in part.layers]
                    ops.unpack_blocks(memory, blocks, planes)
                    continue
                for encoding, parts, stripes in self._stripes(part, codec, memory):
                    ops.decode_blocks(stripes, blocks, part.tokens, encoding, part.sinks, parts)
        return coding

    def gather(self, piece: HeadsPiece, tables: BlockTables, offset: int) -> Coding:
        slab = self._outgoing[offset : offset + piece.num_bytes]
        with self._stream.entered() as coding:
            layers, blocks, tokens = self._heads(piece, tables)
            heads.gather_heads(
                layers, piece.heads, blocks, tokens, piece.dtype, slab, _unscaled(layers)
            )
        return coding

    def scatter(self, piece: HeadsPiece, tables: BlockTables, offset: int) -> Coding:
        slab = self._incoming[offset : offset + piece.num_bytes]
        with self._stream.entered() as coding:
            layers, blocks, tokens = self._heads(piece, tables)
            heads.scatter_heads(
                slab, piece.dtype, blocks, tokens, piece.heads, layers, _unscaled(layers)
            )
        return coding

    def digest_outgoing(self, offset: int, num_bytes: int) -> bytes:
        return slab_digest(self._outgoing[offset : offset + num_bytes])

    def digest_incoming(self, offset: int, num_bytes: int) -> bytes:
        return slab_digest(self._incoming[offset : offset + num_bytes])

    def speed(self, codec: Codec) -> float:
        """Return how many bytes of KV a second are written down and read back, one after the other.

        It is tried on the first blocks of the first layer, which must not be in use: their KV is
        what a decoder makes of it afterwards.
        """
        index = next(index for index, group in enumerate(self._groups) if group.layers)
        group, plane = self._groups[index], self._planes[0]
        block_bytes = plane[0].numel() * plane.element_size()
        count = max(1, min(len(plane) - 1, _TRIAL_BYTES // block_bytes))
        positions = range(count)
        stretch = (positions, *(range(0) for _ in self._planes[1:]))
        piece = self._pieces.piece(stretch, count * group.block_tokens, codec)
        tables: list[list[int]] = [[] for _ in self._groups]
        tables[index] = list(range(1, count + 1))
        fits = piece.num_bytes <= min(len(self._outgoing), len(self._incoming))
        best_s = float("inf")
        for _ in range(_TRIALS if fits else 0):
            began = time.perf_counter()
            self.encode(piece, codec, tables, 0).wait()
            with self._stream.entered() as copying:
                self._incoming[: piece.num_bytes].copy_(self._outgoing[: piece.num_bytes])
            copying.wait()
            self.decode(piece, codec, tables, 0).wait()
            best_s = min(best_s, time.perf_counter() - began)
        return piece.kv_bytes / best_s

    def _heads(
        self, piece: HeadsPiece, tables: BlockTables
    ) -> tuple[list[list[torch.Tensor]], torch.Tensor, range]:
        """Return where the layers of a piece lie, the blocks of its tokens, and which tokens of
        those they are."""
        group = self._groups[piece.group]
        positions = positions_of(group, piece.tokens)
        blocks = blocks_at(tables[piece.group], positions)
        before = positions.start * group.block_tokens
        tokens = range(piece.tokens.start - before, piece.tokens.stop - before)
        on_device = torch.tensor(blocks, dtype=torch.int64, device=self._incoming.device)
        return [self._parts[region] for region in piece.regions], on_device, tokens

    def _places(
        self, piece: Piece, codec: Codec, tables: BlockTables, slab: torch.Tensor
    ) -> Iterator[tuple[Slice, torch.Tensor, torch.Tensor]]:
        """Yield each slice with its blocks and its bytes."""
        start = 0
        for part in piece.slices:
            size = self._pieces.slice_bytes(part, codec)
            blocks = blocks_at(tables[part.group], part.positions)
            on_device = torch.tensor(blocks, dtype=torch.int64, device=slab.device)
            yield part, on_device, slab[start : start + size]
            start += size

    def _stripes(
        self, part: Slice, codec: Codec, memory: torch.Tensor
    ) -> Iterator[tuple[Encoding, list[torch.Tensor], torch.Tensor]]:
        """Yield each part of a slice's KV: how it is written down, where it lies in the caches, and
        its bytes."""
        group = self._groups[part.group]
        start = 0
        for index, channels in enumerate(group.parts):
            encoding = encoding_of(codec, channels)
            stripe = encoding.stripe_bytes(part.tokens, channels.width, part.sinks)
            size = len(part.layers) * group.heads * stripe
            parts = [self._parts[layer][index] for layer in part.layers]
            yield encoding, parts, memory[start : start + size]
            start += size


def _unscaled(layers: Sequence[Sequence[torch.Tensor]]) -> list[list[float]]:
    """Return the scales of an fp8 cache that has none: others are refused at the start."""
    return [[1.0] * len(parts) for parts in layers]
