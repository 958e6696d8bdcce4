"""Pieces of KV that are packed and read as one: what is in them, and how large they are. Pure.

Producer and consumer both derive a piece's layout from the same few numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from vllm_pd_plugin.codecs.codec import SINK_TOKENS, TOKEN_GROUP, Codec, row_bytes
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.ids import NULL_BLOCK, BlockId
from vllm_pd_plugin.memory.layout import BlockTables, Group, RankLayout, Region, Stretch
from vllm_pd_plugin.protocol.wire import LayerRun


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """The same positions of the block table in some layers of one KV cache group.

    layers: indices of their regions.
    tokens: how many tokens in these blocks count.
    """

    group: int
    layers: tuple[int, ...]
    positions: range
    tokens: int

    @property
    def sinks(self) -> int:
        """How many of its first tokens are the sequence's first."""
        return SINK_TOKENS if self.positions.start == 0 else 0


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Slices, one after the other."""

    slices: tuple[Slice, ...]
    num_bytes: int
    kv_bytes: int
    """What it takes in the KV cache."""


def blocks_at(table: Sequence[BlockId], positions: range) -> list[BlockId]:
    """Return the blocks at some positions.

    Raises:
        HandoffError: the table does not reach so far, or no longer holds one of them.
    """
    blocks = list(table[positions.start : positions.stop])
    if len(blocks) < positions.stop - positions.start or NULL_BLOCK in blocks:
        raise HandoffError(
            Reason.MISSING_BLOCKS,
            f"a block table of {len(table)} does not hold positions {positions.start} to "
            f"{positions.stop}",
        )
    return blocks


class Pieces:
    """Makes pieces of one rank's KV."""

    def __init__(self, layout: RankLayout, regions: Sequence[Region]) -> None:
        self.layout = layout
        self.regions = regions
        self._groups = layout.groups
        self._order = layout.forward_order()
        self._group_of = [i for i, group in enumerate(layout.groups) for _ in group.layers]

    def piece(self, stretch: Stretch, num_tokens: int, codec: Codec) -> Piece:
        """Return a stretch as one piece; ``num_tokens`` are those of the handoff."""
        by_range: dict[tuple[int, range], list[int]] = {}
        for layer, positions in enumerate(stretch):
            if positions:
                by_range.setdefault((self._group_of[layer], positions), []).append(layer)
        slices = []
        for (index, positions), layers in by_range.items():
            block_tokens = self._groups[index].block_tokens
            end = min(positions.stop * block_tokens, num_tokens)
            tokens = end - positions.start * block_tokens
            slices.append(Slice(index, tuple(layers), positions, tokens))
        num_bytes = sum(self.slice_bytes(one, codec) for one in slices)
        kv_bytes = sum(self.slice_bytes(one, Codec.RAW) for one in slices)
        return Piece(tuple(slices), num_bytes, kv_bytes)

    def slice_bytes(self, part: Slice, codec: Codec) -> int:
        """Return what a slice takes in a piece."""
        group = self._groups[part.group]
        if codec is Codec.RAW:
            blocks = len(part.positions)
            return sum(blocks * self.regions[layer].block_bytes for layer in part.layers)
        stripe = row_bytes(codec, group.parts, part.tokens, part.sinks)
        return len(part.layers) * group.heads * stripe

    def split(
        self, stretch: Stretch, num_tokens: int, codec: Codec, max_bytes: int
    ) -> list[Stretch]:
        """Cut a stretch into pieces of at most ``max_bytes``, in the order of the forward pass.

        Raises:
            HandoffError: not even one block of one layer is that small.
        """
        cut: list[Stretch] = []
        taken: dict[int, range] = {}
        size = 0
        for layer in self._order:
            for positions in self._fitting(layer, stretch[layer], num_tokens, codec, max_bytes):
                more = self._bytes(layer, positions, num_tokens, codec)
                if taken and (size + more > max_bytes or layer in taken):
                    cut.append(self._filled(taken))
                    taken, size = {}, 0
                taken[layer] = positions
                size += more
        return [*cut, self._filled(taken)] if taken else cut

    def checked(
        self, runs: Sequence[LayerRun], num_tokens: int, codec: Codec, tables: BlockTables
    ) -> Piece:
        """Return the piece that a peer asks for, if it is one of what these block tables hold.

        Raises:
            HandoffError: it is not.
        """
        stretch = self.stretch(runs)
        if not any(positions.stop > positions.start for positions in stretch):
            raise HandoffError(Reason.MISSING_BLOCKS, "a piece of nothing is wanted")
        for layer, positions in enumerate(stretch):
            index, group = self._group_of[layer], self._group(layer)
            if positions.start * group.block_tokens >= num_tokens and positions:
                raise HandoffError(Reason.MISSING_BLOCKS, "a piece reaches beyond its tokens")
            if codec is not Codec.RAW and not group.is_encodable:
                raise HandoffError(Reason.INTERNAL, f"{codec} cannot write this KV cache down")
            blocks = blocks_at(tables[index], positions)
            if max(blocks, default=0) >= self.regions[layer].num_blocks:
                raise HandoffError(Reason.MISSING_BLOCKS, "a block lies outside its region")
        return self.piece(stretch, num_tokens, codec)

    def layer_runs(self, stretch: Stretch) -> tuple[LayerRun, ...]:
        """Return a stretch as it is told to a peer."""
        ordered = (stretch[layer] or range(0) for layer in self._order)
        return tuple(
            LayerRun(len(list(same)), positions.start, positions.stop)
            for positions, same in itertools.groupby(ordered)
        )

    def stretch(self, runs: Sequence[LayerRun]) -> Stretch:
        """Return the stretch that a peer has told.

        Raises:
            HandoffError: it is not one of this engine's layers.
        """
        num_layers = sum(run.num_layers for run in runs)
        if num_layers != len(self._order):
            raise HandoffError(
                Reason.MISSING_BLOCKS,
                f"a piece of {num_layers} layers is wanted, there are {len(self._order)}",
            )
        ordered = [range(run.start, run.stop) for run in runs for _ in range(run.num_layers)]
        return self._filled(dict(zip(self._order, ordered, strict=True)))

    def _bytes(self, layer: int, positions: range, num_tokens: int, codec: Codec) -> int:
        return self.piece(self._filled({layer: positions}), num_tokens, codec).num_bytes

    def _fitting(
        self, layer: int, positions: range, num_tokens: int, codec: Codec, max_bytes: int
    ) -> Iterator[range]:
        """Yield a layer's positions in runs that fit, of whole groups of tokens if possible."""
        if not positions:
            return
        if self._bytes(layer, positions, num_tokens, codec) <= max_bytes:
            yield positions
            return
        step = max(1, TOKEN_GROUP // self._group(layer).block_tokens)
        step = step if len(positions) > step else 1
        if len(positions) == 1:
            raise HandoffError(
                Reason.INTERNAL,
                f"a block of one layer does not fit into a piece of {max_bytes} bytes; "
                "raise staging_bytes",
            )
        half = max(1, len(positions) // 2 // step) * step
        for part in (positions[:half], positions[half:]):
            yield from self._fitting(layer, part, num_tokens, codec, max_bytes)

    def _filled(self, chosen: dict[int, range]) -> Stretch:
        return tuple(chosen.get(layer, range(0)) for layer in range(len(self._order)))

    def _group(self, layer: int) -> Group:
        return self._groups[self._group_of[layer]]
