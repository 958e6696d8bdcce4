"""Engines of different shapes that serve the same model, and their memory, in which every element
knows what it is of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tests.fakes.coder import FakeCoder, FakeCoding
from tests.fakes.memory import FakeMemory
from tests.mapping.memory import heads_on
from tests.mapping.pages import Page, page
from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.mapping.kv_cache import ITEM_BYTES, RankPlace
from vllm_pd_plugin.memory.layout import BlockTables, Group, RankLayout
from vllm_pd_plugin.packing.heads import HeadsPiece

Values = NDArray[np.float32]
"""``[tokens, heads, channels]``."""

HEADS = 4
CHANNELS = (("key", 2), ("value", 2))
WIDTH = 4
MAX_TOKENS = 64
_STORED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}


@functools.cache
def model_kv(prompt: int, layer: int) -> Values:
    """A prompt's KV in a layer, of all tokens and heads: whole numbers that every type can hold,
    and never those of memory that nobody wrote."""
    generator = np.random.default_rng((prompt, layer))
    values = generator.integers(1, 256, (MAX_TOKENS, HEADS, WIDTH))
    return values.astype(np.float32)


def stored(values: Values, dtype: str) -> NDArray[np.generic]:
    """Return values as elements of a type."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(values).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return values


def loaded(elements: NDArray[np.generic], dtype: str) -> Values:
    """Return what such elements are."""
    if dtype == "bfloat16":
        return (elements.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return elements.astype(np.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """How an engine is divided, and how its KV lies.

    tp: tensor parallel size. stages: for each pipeline stage the numbers of its layers.
    windowed: layers with a window of so many tokens; they are a group of their own.
    form: see ``tests.mapping.pages``; window_form: of layers with a window, if it is another.
    is_told: whether it says what is in its pages.
    """

    tp: int = 1
    stages: tuple[tuple[int, ...], ...] = ((0, 1, 2),)
    block_tokens: int = 4
    form: str = "rows"
    window_form: str = ""
    dtype: str = "bfloat16"
    windowed: tuple[int, ...] = ()
    window: int = 6
    is_told: bool = True

    @property
    def places(self) -> list[RankPlace]:
        stages = len(self.stages)
        return [
            RankPlace(s, rank, stages, self.tp) for s in range(stages) for rank in range(self.tp)
        ]

    def page(self, group: int = 0) -> Page:
        form = (group and self.window_form) or self.form
        return page(form, CHANNELS, max(1, HEADS // self.tp), self.block_tokens)

    @property
    def page_bytes(self) -> int:
        return self.page().num_elements * ITEM_BYTES[self.dtype]

    @property
    def num_groups(self) -> int:
        return 2 if self.windowed else 1

    def layers(self, stage: int) -> list[list[int]]:
        """A stage's layers, group by group."""
        here = self.stages[stage]
        full = [layer for layer in here if layer not in self.windowed]
        return [full, [layer for layer in here if layer in self.windowed]][: self.num_groups]

    def layout(self, stage: int) -> RankLayout:
        return RankLayout(
            tuple(self._group(index, layers) for index, layers in enumerate(self.layers(stage)))
        )

    def _group(self, index: int, layers: Sequence[int]) -> Group:
        window = self.window if index else None
        kind = "sliding_window" if index else "full"
        if not layers:
            return Group(kind, self.block_tokens, window, (), (1,), "")
        made = self.page(index)
        heads = max(1, HEADS // self.tp)
        return Group(
            kind=kind,
            block_tokens=self.block_tokens,
            window=window,
            layers=tuple(f"layers.{layer}" for layer in layers),
            block_shape=(heads, self.block_tokens, WIDTH),
            dtype=self.dtype,
            block_strides=(made.head_stride, WIDTH, 1),
            parts=made.parts if self.is_told else (),
            model_heads=HEADS,
            channels=CHANNELS,
        )


class ShapedMemory(FakeMemory):
    """The KV cache of one rank of an engine.

    heads: of the model. numbers: of the layers, region by region.
    """

    def __init__(self, shape: Shape, place: RankPlace) -> None:
        super().__init__(shape.layout(place.stage), shape.page_bytes)
        self.shape, self.place = shape, place
        self.heads = heads_on(HEADS, shape.tp, place.tensor_parallel_rank)
        self.numbers = [layer for group in shape.layers(place.stage) for layer in group]

    def values(self, region: int, table: Sequence[int], heads: range, tokens: range) -> Values:
        """What some heads, as numbered in a page, hold of some tokens."""
        return loaded(
            self._elements(region)[self._where(region, table, heads, tokens)], self.shape.dtype
        )

    def put(
        self, region: int, table: Sequence[int], heads: range, tokens: range, values: Values
    ) -> None:
        self._elements(region)[self._where(region, table, heads, tokens)] = stored(
            values, self.shape.dtype
        )

    def write(self, prompt: int, tables: BlockTables, tokens: range, region: int) -> None:
        """Write a prompt's KV of some tokens in one layer, as a forward pass does."""
        kv = model_kv(prompt, self.numbers[region])[tokens.start : tokens.stop]
        here = kv[:, self.heads.start : self.heads.stop]
        self.put(region, tables[self.group_of(region)], range(len(self.heads)), tokens, here)

    def has(self, prompt: int, tables: BlockTables, tokens: range, region: int) -> bool:
        """Say whether a layer holds the KV of a prompt for some tokens."""
        kv = model_kv(prompt, self.numbers[region])[tokens.start : tokens.stop]
        table = tables[self.group_of(region)]
        found = self.values(region, table, range(len(self.heads)), tokens)
        return np.array_equal(found, kv[:, self.heads.start : self.heads.stop])

    def copy(self) -> ShapedMemory:
        """Return what it holds now."""
        copied = ShapedMemory(self.shape, self.place)
        copied.caches = [cache.copy() for cache in self.caches]
        return copied

    def is_like(self, other: ShapedMemory, tables: BlockTables, tokens: range, region: int) -> bool:
        """Say whether both hold the same for some tokens in a layer."""
        table, heads = tables[self.group_of(region)], range(len(self.heads))
        found = (memory.values(region, table, heads, tokens) for memory in (self, other))
        return np.array_equal(*found)

    def _elements(self, region: int) -> NDArray[np.generic]:
        elements: NDArray[np.generic] = self.caches[region].view(_STORED[self.shape.dtype])
        return elements

    def _where(
        self, region: int, table: Sequence[int], heads: range, tokens: range
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the blocks, and the places in them, of ``[tokens, heads, channels]``."""
        made, counted = self.shape.page(self.group_of(region)), np.array(tokens, np.int64)
        blocks = np.array(table, np.int64)[counted // self.shape.block_tokens]
        slots = counted % self.shape.block_tokens
        of_parts = []
        for part in made.parts:
            to_tile, to_token, to_channel_tile, to_channel = part.strides
            of_slots = slots // part.token_tile * to_tile + slots % part.token_tile * to_token
            channels = np.arange(part.width)
            of_channels = channels // part.channel_tile * to_channel_tile
            of_channels += channels % part.channel_tile * to_channel
            of_heads = part.start + np.array(heads) * made.head_stride
            of_parts.append(of_slots[:, None, None] + of_heads[None, :, None] + of_channels)
        return blocks[:, None, None], np.concatenate(of_parts, axis=2)


class ShapedCoder(FakeCoder):
    """The same as its parent, and for some heads."""

    def __init__(self, memory: ShapedMemory, num_bytes: int) -> None:
        super().__init__(memory, num_bytes)
        self._shaped = memory
        self.num_gathered = 0

    def gather(self, piece: HeadsPiece, tables: BlockTables, offset: int) -> FakeCoding:
        self._check(Codec.RAW)
        self.num_gathered += 1

        def write() -> None:
            table = tables[piece.group]
            layers = [
                self._shaped.values(region, table, piece.heads, piece.tokens)
                for region in piece.regions
            ]
            slab = np.frombuffer(stored(np.stack(layers), piece.dtype).tobytes(), np.uint8)
            assert len(slab) == piece.num_bytes, "a piece has another size than was agreed"
            self.outgoing[offset : offset + len(slab)] = slab + np.uint8(self.is_broken)

        return self._coding(write)

    def scatter(self, piece: HeadsPiece, tables: BlockTables, offset: int) -> FakeCoding:
        self._check(Codec.RAW)

        def read() -> None:
            slab = self.incoming[offset : offset + piece.num_bytes].copy()
            values = loaded(slab.view(_STORED[piece.dtype]), piece.dtype)
            shape = len(piece.regions), len(piece.tokens), len(piece.heads), WIDTH
            for region, of_layer in zip(piece.regions, values.reshape(shape), strict=True):
                self._shaped.put(region, tables[piece.group], piece.heads, piece.tokens, of_layer)

        return self._coding(read)
