"""KV caches as the ops see them, laid out as attention backends do, and what is around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

NUM_BLOCKS = 6
GUARD = 64
"""Elements before and behind, where nothing may be written."""

Shape = tuple[int, int, int]
"""Heads, tokens of a block, channels."""

_Layout = tuple[Callable[[Shape], tuple[int, ...]], Callable[[torch.Tensor, Shape], torch.Tensor]]
"""The shape of the memory, and the view of it."""

_PLANES: dict[str, _Layout] = {
    "dense": (lambda s: (NUM_BLOCKS, *s), lambda t, s: t),
    "tokens before heads": (
        lambda s: (NUM_BLOCKS, s[1], s[0], s[2]),
        lambda t, s: t.transpose(1, 2),
    ),
    "keys beside values": (
        lambda s: (NUM_BLOCKS, s[0], s[1], 2 * s[2]),
        lambda t, s: t[..., s[2] :],
    ),
    "some of the heads": (
        lambda s: (NUM_BLOCKS, s[0] + 3, s[1], s[2]),
        lambda t, s: t[:, 2 : 2 + s[0]],
    ),
    "every second block": (  # and not from the start
        lambda s: (2 * NUM_BLOCKS + 1, *s),
        lambda t, s: t[1::2],
    ),
    "all layers of a block together": (
        lambda s: (NUM_BLOCKS, 3, s[1], s[0], 2 * s[2]),
        lambda t, s: t[:, 1, ..., : s[2]].transpose(1, 2),
    ),
}
LAYOUTS = list(_PLANES)


def _token_tile(shape: Shape) -> int:
    return next(size for size in (8, 4, 3, 2, 1) if shape[1] % size == 0)


def _channel_tile(shape: Shape) -> int:
    return next(size for size in (4, 2, 1) if shape[2] % size == 0)


def _tiles(s: Shape) -> tuple[int, int, int, int]:
    """Token tiles, tokens of one, channel tiles, channels of one."""
    return s[1] // _token_tile(s), _token_tile(s), s[2] // _channel_tile(s), _channel_tile(s)


_PARTS: dict[str, _Layout] = {
    name: (shape_of, lambda t, s, view=view: view(t, s).unsqueeze(3).unsqueeze(4))
    for name, (shape_of, view) in _PLANES.items()
} | {
    "columns": (
        lambda s: (NUM_BLOCKS, s[0], s[2], s[1]),
        lambda t, s: t.transpose(2, 3)[:, :, None, :, :, None],
    ),
    "columns beside rows": (
        lambda s: (NUM_BLOCKS, s[0], 2, s[2], s[1]),
        lambda t, s: t[:, :, 0].transpose(2, 3)[:, :, None, :, :, None],
    ),
    "tiles of rows": (
        lambda s: (NUM_BLOCKS, s[0], *_tiles(s)[::2], *_tiles(s)[1::2]),
        lambda t, s: t.permute(0, 1, 2, 4, 3, 5),
    ),
    "tiles of columns": (
        lambda s: (NUM_BLOCKS, s[0], 2, *_tiles(s)[2::-2], *_tiles(s)[:0:-2]),
        lambda t, s: t[:, :, 1].permute(0, 1, 3, 5, 2, 4),
    ),
}  # fmt: skip
PART_LAYOUTS = list(_PARTS)


@dataclasses.dataclass(frozen=True, slots=True)
class Laid:
    """Several layers' planes, or their parts.

    memory: what each lies in, one dimension, with all that is beside it.
    view: makes a plane, or part, of the memory between the guards.
    offset: elements in front of that.
    """

    memory: list[torch.Tensor]
    view: Callable[[torch.Tensor], torch.Tensor]
    offset: int

    @property
    def views(self) -> list[torch.Tensor]:
        return [self.view(memory[self.offset : -GUARD]) for memory in self.memory]

    @property
    def rows(self) -> list[torch.Tensor]:
        """Copies as ``[NUM_BLOCKS, heads, tokens, width]``."""
        views = self.views
        tiled = [view if view.dim() == 6 else view[:, :, :, None, None] for view in views]
        return [tile.clone().flatten(4, 5).flatten(2, 3) for tile in tiled]

    def copy(self) -> Laid:
        """The same, in memory of its own."""
        return dataclasses.replace(self, memory=[memory.clone() for memory in self.memory])

    def inverted(self) -> Laid:
        """The same with every bit another."""
        result = self.copy()
        for memory in result.memory:
            memory.view(torch.uint8).bitwise_xor_(0xFF)
        return result

    def to(self, device: torch.device) -> Laid:
        """A copy in a device's memory."""
        copies = [memory.to(device, copy=True) for memory in self.memory]
        return dataclasses.replace(self, memory=copies)

    def is_equal(self, other: Laid) -> bool:
        """Whether every bit is, of what lies beside the views too; wherever the two are."""
        pairs = zip(self.memory, other.memory, strict=True)
        return all(
            torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8)) for a, b in pairs
        )


def make_planes(
    shape: Shape,
    dtype: torch.dtype,
    layout: str = "dense",
    num_planes: int = 2,
    misalignment: int = 0,
) -> Laid:
    """Planes of random bytes, which begin some elements behind where memory does."""
    generator = torch.Generator().manual_seed(shape[0] + 10 * shape[1] + 100 * shape[2])

    def random_bytes(count: int) -> torch.Tensor:
        num_bytes = count * torch.empty(0, dtype=dtype).element_size()
        some = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
        return some.view(dtype)

    return _laid(_PLANES[layout], shape, num_planes, misalignment, random_bytes)


def make_parts(
    shape: Shape,
    fill: Callable[[int], torch.Tensor],
    layout: str = "dense",
    num_parts: int = 2,
    misalignment: int = 0,
) -> Laid:
    """Parts; ``fill`` says what so many elements are."""
    return _laid(_PARTS[layout], shape, num_parts, misalignment, fill)


def _laid(
    layout: _Layout,
    shape: Shape,
    count: int,
    misalignment: int,
    fill: Callable[[int], torch.Tensor],
) -> Laid:
    memory_shape, view = torch.Size(layout[0](shape)), layout[1]
    offset = GUARD + misalignment
    memory = [fill(offset + memory_shape.numel() + GUARD) for _ in range(count)]
    return Laid(memory, lambda t: view(t.view(memory_shape), shape), offset)


class Slab:
    """A slab of zeros with sentinels on both sides, which begins some bytes behind where memory
    does."""

    _SENTINEL = 0xA5

    def __init__(
        self, num_bytes: int, device: torch.device | None = None, misalignment: int = 0
    ) -> None:
        start = self._start = GUARD + misalignment
        self._memory = torch.full(
            (start + num_bytes + GUARD,), self._SENTINEL, dtype=torch.uint8, device=device
        )
        self.bytes = self._memory[start : start + num_bytes].zero_()

    @property
    def is_intact(self) -> bool:
        """Whether nothing was written beside it."""
        memory = self._memory.cpu()
        beside = (memory[: self._start], memory[self._start + len(self.bytes) :])
        return all(bool((part == self._SENTINEL).all()) for part in beside)
