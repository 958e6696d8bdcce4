"""What the ops are tried on: the layouts, types and values of the unit tests, drawn by a seed.

Every combination of type and layout (and, for the codecs, encoding) comes up in each round; what
else there is to choose is drawn.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence

import torch

from tests.fakes.planes import (
    GUARD,
    LAYOUTS,
    NUM_BLOCKS,
    PART_LAYOUTS,
    Laid,
    Shape,
    make_parts,
    make_planes,
)
from tests.fakes.values import VALUES, fill
from vllm_pd_plugin.codecs.codec import (
    MAX_WIDTH,
    SINK_TOKENS,
    WIDE,
    Codec,
    Encoding,
    Part,
    encoding_of,
)
from vllm_pd_plugin.codecs.ops import part_of

MOVED = (torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
CODED = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ((2, True), (2, False), (4, True), (4, False), (8, False))
"""Bits, and whether ranges are by channel."""

_LOSSY = [codec for codec in Codec if codec is not Codec.RAW]


@dataclasses.dataclass(frozen=True, slots=True)
class Moving:
    """Blocks that are packed, unpacked and hashed."""

    name: str
    planes: Laid
    blocks: Sequence[int]
    misalignment: int = 0
    """Of the slab, in bytes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Coding:
    """Tokens of blocks that are encoded and decoded."""

    name: str
    parts: Laid
    shape: Shape
    blocks: Sequence[int]
    tokens: int
    encoding: Encoding
    sinks: int

    @property
    def how(self) -> tuple[int, int, bool, int]:
        """What the ops take of an encoding."""
        encoding = self.encoding
        return encoding.bits, encoding.group, encoding.by_channel, self.sinks

    @property
    def num_bytes(self) -> int:
        """Of the slab."""
        stripe = self.encoding.stripe_bytes(self.tokens, self.shape[2], self.sinks)
        return len(self.parts.memory) * self.shape[0] * stripe


def moving(rounds: int) -> Iterator[Moving]:
    draw = random.Random(1)
    for _, dtype, layout in itertools.product(range(rounds), MOVED, LAYOUTS):
        shape = draw.randint(1, 4), draw.randint(1, 5), draw.randint(1, 40)
        offset = draw.choice([0, 3])
        planes = make_planes(shape, dtype, layout, draw.randint(1, 3), offset)
        blocks = draw.sample(range(NUM_BLOCKS), draw.randint(1, NUM_BLOCKS))
        slab = draw.choice([0, 0, 1, 4])
        name = f"{dtype} {layout} {shape} from {offset}, blocks {blocks}, slab from {slab}"
        yield Moving(name, planes, blocks, slab)


def moving_once() -> Iterator[Moving]:
    """What comes up once: nothing at all, rows as models have them, and many blocks."""
    planes = make_planes((2, 3, 8), torch.float32, "keys beside values")
    yield Moving("no blocks", planes, [])
    for dtype in CODED:
        mla = make_planes((1, 64, 576), dtype, num_planes=3)
        yield Moving(f"rows of MLA, {dtype}", mla, [4, 0, 5])
        keys = make_planes((8, 16, 128), dtype, "all layers of a block together", 4)
        yield Moving(f"keys of 8 heads, {dtype}", keys, [5, 1, 2, 0])
    # A grid has 4096 blocks of threads at the most, which then go on to further items.
    many = make_planes((25, 2, 8), torch.bfloat16, "tokens before heads", num_planes=33)
    yield Moving("more heads of blocks than a grid has", many, [*range(NUM_BLOCKS)])
    tokens = make_planes((1, 1000, 16), torch.bfloat16)
    yield Moving("blocks of 1000 tokens", tokens, [1, 5])
    one = make_planes((1, 1, 70_000), torch.uint8, num_planes=1, misalignment=3)
    yield Moving("a piece as one row", one, [0])


def coding(rounds: int) -> Iterator[Coding]:
    draw = random.Random(2)
    for number, dtype, layout, kind in itertools.product(range(rounds), CODED, PART_LAYOUTS, KINDS):
        bits, by_channel = kind
        widths = [4, 8, 12, 20, 64, 128, 132, 260] + [1, 7, 65] * (bits == 8)
        block_tokens = draw.choice([1, 3, 4, 8, 16, 24, 32, 80])
        shape = draw.randint(1, 2), block_tokens, draw.choice(widths)
        group = draw.choice([d for d in range(1, shape[2] + 1) if shape[2] % d == 0])
        blocks = draw.sample(range(NUM_BLOCKS), draw.randint(1, NUM_BLOCKS))
        tokens = len(blocks) * block_tokens - draw.randint(0, block_tokens - 1)
        values, offset = draw.choice(VALUES), draw.choice([0, 3])
        parts = make_parts(shape, fill(values, dtype, number), layout, draw.randint(1, 2), offset)
        encoding = Encoding(bits, by_channel, group)
        sinks = draw.choice([0, 1, 4, 31, 32, 40])
        name = (
            f"{encoding} {dtype} {layout} {shape} {values.__name__} from {offset}, "
            f"{tokens} tokens of {blocks}, {sinks} sinks"
        )
        yield Coding(name, parts, shape, blocks, tokens, encoding, sinks)


def coding_once() -> Iterator[Coding]:
    """What comes up once: nothing at all, zeros of both signs, the widest rows, the largest
    values."""
    normal, shape = VALUES[0], (1, 32, 64)
    by_token, by_channel = Encoding(4, False, 32), Encoding(4, True, 64)
    for encoding in (WIDE, by_token, by_channel):
        parts = make_parts(shape, fill(normal, torch.bfloat16, 1))
        yield Coding(f"no tokens, {encoding}", parts, shape, [], 0, encoding, 4)
        zeros = make_parts(shape, torch.zeros)
        for memory in zeros.memory:
            memory[::3] = -0.0
        yield Coding(f"zeros of both signs, {encoding}", zeros, shape, [2, 4], 64, encoding, 0)
    for dtype, encoding in itertools.product(CODED, (WIDE, by_token, by_channel)):
        largest = torch.finfo(dtype).max
        parts = make_parts(shape, lambda n, t=dtype, x=largest: torch.linspace(0, 1, n).to(t) * x)
        yield Coding(f"the largest {dtype}, {encoding}", parts, shape, [1], 32, encoding, 0)
    for bits in (2, 4, 8):
        shape = (1, 32, MAX_WIDTH)
        parts = make_parts(shape, lambda n: torch.linspace(-3, 2, n))
        widest = Encoding(bits, by_channel=bits < 8, group=MAX_WIDTH)
        yield Coding(f"the widest rows, {widest}", parts, shape, [1], 32, widest, 4)


def coding_of_many() -> Iterator[Coding]:
    """More tiles, and more rows, than the largest grid has blocks of threads; the references take
    long."""
    shape = (16, 320, 8)
    for encoding in (WIDE, Encoding(2, True, 8)):
        # 5 parts of 16 heads with 60 groups of tokens.
        parts = make_parts(shape, fill(VALUES[0], torch.float16, 2), "tokens before heads", 5)
        blocks = [*range(NUM_BLOCKS)]
        yield Coding(
            f"more tiles than a grid has, {encoding}", parts, shape, blocks, 1919, encoding, 4
        )


def coding_of_models() -> Iterator[Coding]:
    """Caches as models have them, written down as our codecs do: keys beside values with the tokens
    before the heads, and MLA's one head."""
    heads, block_tokens, width = 8, 16, 128
    row = 2 * width
    keys_beside_values = (
        (NUM_BLOCKS, block_tokens, heads, row),
        lambda memory: memory.transpose(1, 2),
        (
            Part.of_rows("key", width, 0, heads * row),
            Part.of_rows("value", width, width, heads * row),
        ),
    )
    mla = (
        (NUM_BLOCKS, 64, 576),
        lambda memory: memory,
        (Part.of_rows("latent", 512, 0, 576), Part.of_rows("rope", 64, 512, 576)),
    )
    for dtype, codec, cache in itertools.product(CODED, _LOSSY, (keys_beside_values, mla)):
        shape, view, parts = cache
        for part in parts:
            laid = _part_of_caches(shape, view, part, fill(VALUES[0], dtype, 3))
            _, in_heads, tiles, tile_tokens, _, _ = laid.views[0].shape
            blocks, tokens = [5, 0, 2, 4], 4 * tiles * tile_tokens - 7
            yield Coding(
                f"{part.kind} of {shape}, {codec}, {dtype}", laid,
                (in_heads, tiles * tile_tokens, part.width), blocks, tokens,
                encoding_of(codec, part), SINK_TOKENS,
            )  # fmt: skip


def _part_of_caches(
    shape: tuple[int, ...],
    view: Callable[[torch.Tensor], torch.Tensor],
    part: Part,
    fill: Callable[[int], torch.Tensor],
) -> Laid:
    """One part of the caches of two layers."""
    memory = [fill(2 * GUARD + math.prod(shape)) for _ in range(2)]
    return Laid(memory, lambda flat: part_of(view(flat.view(shape)), part), GUARD)
