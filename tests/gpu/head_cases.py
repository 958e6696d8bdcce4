"""What gathering and scattering heads is tried on, as ``cases`` is for the other ops."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import torch

from tests.fakes.planes import NUM_BLOCKS, PART_LAYOUTS, Laid, make_parts
from tests.fakes.values import VALUES, fill

FP8 = torch.float8_e4m3fn
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WAYS = (
    *itertools.product(FLOATS, FLOATS, FLOATS),
    *itertools.product((*FLOATS, FP8), (FP8,), (FP8,)),
)
"""Types of the pages, of the slab, and of the pages that it is scattered into."""


@dataclasses.dataclass(frozen=True, slots=True)
class HeadMoving:
    """Some heads of some tokens of several layers.

    pages, others: what is gathered from and scattered into, for each layer its parts.
    chosen: first token, tokens, first head, heads.
    """

    name: str
    pages: Sequence[Laid]
    others: Sequence[Laid]
    blocks: torch.Tensor
    chosen: tuple[int, int, int, int]
    dtype: torch.dtype
    scales: Sequence[float]

    @property
    def num_bytes(self) -> int:
        """Of the slab."""
        views = self.pages[0].views
        channels = sum(view.shape[4] * view.shape[5] for view in views)
        _, tokens, _, heads = self.chosen
        return len(self.pages) * tokens * heads * channels * self.dtype.itemsize

    def parts(self, layers: Sequence[Laid]) -> list[torch.Tensor]:
        return [view for laid in layers for view in laid.views]

    def typed(self, slab: torch.Tensor) -> torch.Tensor:
        return slab.view(self.dtype)


def moving_heads(rounds: int) -> Iterator[HeadMoving]:
    """Every layout with every way of types."""
    draw = random.Random(3)
    for number, layout, way in itertools.product(range(rounds), PART_LAYOUTS, WAYS):
        source, slab, target = way
        block_tokens = draw.choice([1, 3, 8, 16, 24, 32, 80])
        shape = draw.randint(1, 3), block_tokens, draw.choice([1, 7, 8, 20, 64, 128, 132])
        blocks = draw.sample(range(NUM_BLOCKS), draw.randint(1, NUM_BLOCKS))
        first_token = draw.randint(0, len(blocks) * block_tokens - 1)
        tokens = draw.randint(0, len(blocks) * block_tokens - first_token)
        first_head = draw.randint(0, shape[0] - 1)
        heads = draw.randint(0, shape[0] - first_head)
        layers, parts, offset = draw.randint(1, 2), draw.randint(1, 2), draw.choice([0, 3])
        pages, others = (
            [make_parts(shape, values, layout, parts, offset) for _ in range(layers)]
            for values in (_values(source, number), _values(target, number + 1))
        )
        chosen = first_token, tokens, first_head, heads
        name = f"{way} {layout} {shape} from {offset}, {chosen} of {blocks}, {layers} layers"
        scales = [draw.uniform(0.01, 3.0) for _ in range(layers * parts)]
        yield HeadMoving(name, pages, others, torch.tensor(blocks), chosen, slab, scales)


def _values(dtype: torch.dtype, seed: int) -> Callable[[int], torch.Tensor]:
    """Numbers; PyTorch may write any bits of a NaN where it converts one."""
    if dtype != FP8:
        return fill(VALUES[seed % len(VALUES)], dtype, seed)
    generator = torch.Generator().manual_seed(seed)

    def any_bytes(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(FP8)

    return any_bytes
