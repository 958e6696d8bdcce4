"""KV caches as planes, laid out as attention backends do, and what is around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

NUM_BLOCKS = 6
GUARD = 64
"""Elements before and behind, where nothing may be written."""

Shape = tuple[int, int, int]
"""Heads, tokens of a block, channels."""

_Pick = Callable[[torch.Tensor, Shape], torch.Tensor]
_LAYOUTS: dict[str, tuple[Callable[[int, int, int], tuple[int, ...]], _Pick]] = {
    "dense": (
        lambda heads, tokens, width: (NUM_BLOCKS, heads, tokens, width),
        lambda whole, shape: whole,
    ),
    "tokens before heads": (
        lambda heads, tokens, width: (NUM_BLOCKS, tokens, heads, width),
        lambda whole, shape: whole.transpose(1, 2),
    ),
    "keys beside values": (
        lambda heads, tokens, width: (NUM_BLOCKS, heads, tokens, 2 * width),
        lambda whole, shape: whole[..., shape[2] :],
    ),
    "some of the heads": (
        lambda heads, tokens, width: (NUM_BLOCKS, heads + 3, tokens, width),
        lambda whole, shape: whole[:, 2 : 2 + shape[0]],
    ),
    "every second block": (  # and not from the start
        lambda heads, tokens, width: (2 * NUM_BLOCKS + 1, heads, tokens, width),
        lambda whole, shape: whole[1::2],
    ),
    "all layers of a block together": (
        lambda heads, tokens, width: (NUM_BLOCKS, 3, tokens, heads, 2 * width),
        lambda whole, shape: whole[:, 1, ..., : shape[2]].transpose(1, 2),
    ),
}
LAYOUTS = list(_LAYOUTS)


@dataclasses.dataclass(frozen=True, slots=True)
class Planes:
    """Some planes ``[NUM_BLOCKS, heads, tokens, width]``.

    memory: what each lies in, one dimension, with all that is beside it.
    offset: where in its memory a plane's own begins, in elements.
    """

    memory: list[torch.Tensor]
    layout: str
    shape: Shape
    offset: int

    @property
    def views(self) -> list[torch.Tensor]:
        whole_shape, pick = _LAYOUTS[self.layout]
        wholes = (memory[self.offset : -GUARD] for memory in self.memory)
        return [pick(whole.view(whole_shape(*self.shape)), self.shape) for whole in wholes]

    def copy(self) -> Planes:
        """The same, in memory of its own."""
        return dataclasses.replace(self, memory=[memory.clone() for memory in self.memory])

    def is_equal(self, other: Planes) -> bool:
        """Whether every bit is, of what lies beside the planes too."""
        pairs = zip(self.memory, other.memory, strict=True)
        return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def make_planes(
    shape: Shape,
    dtype: torch.dtype,
    layout: str = "dense",
    num_planes: int = 2,
    misalignment: int = 0,
    fill: Callable[[int], torch.Tensor] | None = None,
) -> Planes:
    """Planes of random bytes, unless ``fill`` says what so many elements are.

    misalignment: by how many elements they do not begin where memory does.
    """
    offset = GUARD + misalignment
    whole_shape, _ = _LAYOUTS[layout]
    size = torch.Size(whole_shape(*shape)).numel() + offset + GUARD
    generator = torch.Generator().manual_seed(shape[0] + 10 * shape[1] + 100 * shape[2])

    def random_bytes(count: int) -> torch.Tensor:
        num_bytes = count * torch.empty(0, dtype=dtype).element_size()
        return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)

    make = fill or random_bytes
    memory = [make(size).view(dtype) for _ in range(num_planes)]
    return Planes(memory, layout, shape, offset)


class Slab:
    """A slab of zeros with sentinels on both sides."""

    _SENTINEL = 0xA5

    def __init__(self, num_bytes: int) -> None:
        self._memory = torch.full((num_bytes + 2 * GUARD,), self._SENTINEL, dtype=torch.uint8)
        self.bytes = self._memory[GUARD : GUARD + num_bytes].zero_()

    @property
    def is_intact(self) -> bool:
        """Whether nothing was written beside it."""
        beside = (self._memory[:GUARD], self._memory[GUARD + len(self.bytes) :])
        return all(bool((part == self._SENTINEL).all()) for part in beside)
