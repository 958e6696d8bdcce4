"""Which bytes of two pages lie alike, so that a read can move them as they are.

A *chunk* is the tokens of the smaller block: it lies within one block on both sides. It can be read
as it lies where whole heads of it are runs of bytes, in the same order on both sides; heads that
lie token by token between others, or keys in columns of another block size, cannot.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from vllm_pd_plugin.codecs.codec import Part
from vllm_pd_plugin.mapping.kv_cache import ITEM_BYTES, KvCacheLayout


class Run(NamedTuple):
    """Bytes of a chunk that lie together in both pages.

    They begin at ``source_start + n * source_step`` of their page, where the chunk is the nth of
    its block there, and at ``start + m * step`` of ours, where it is the mth.
    """

    source_start: int
    source_step: int
    start: int
    step: int
    num_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Direct:
    """Read as it lies: for each chunk these runs.

    source_block_tokens, block_tokens: of their blocks, and of ours.
    """

    chunk_tokens: int
    source_block_tokens: int
    block_tokens: int
    runs: tuple[Run, ...]

    @classmethod
    def of_whole_pages(cls, layout: KvCacheLayout) -> Direct:
        """Return how pages are read that are alike."""
        run = Run(0, 0, 0, 0, layout.page_bytes)
        return cls(layout.block_tokens, layout.block_tokens, layout.block_tokens, (run,))

    @property
    def is_by_block(self) -> bool:
        """Whether each of their blocks is one run, and becomes one of ours."""
        return self.source_block_tokens == self.block_tokens and [run[:4] for run in self.runs] == [
            (0, 0, 0, 0)
        ]

    def cover(self, tokens: range) -> range:
        """Return the tokens of the whole chunks that are read for some tokens."""
        chunk = self.chunk_tokens
        return range(tokens.start // chunk * chunk, math.ceil(tokens.stop / chunk) * chunk)

    def chunks(self, tokens: range) -> range:
        """Return the same as numbers of chunks, counted from token 0."""
        covered = self.cover(tokens)
        return range(covered.start // self.chunk_tokens, covered.stop // self.chunk_tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class Heads:
    """Neighbouring heads of one side's pages, the first of them as numbered in the page."""

    layout: KvCacheLayout
    first: int
    count: int


def find_direct(theirs: Heads, ours: Heads) -> Direct | None:
    """Return how as many heads of theirs as of ours are read as they lie; None where they cannot
    be."""
    here, there = ours.layout, theirs.layout
    chunk, larger = sorted((here.block_tokens, there.block_tokens))
    if here.dtype != there.dtype or larger % chunk:
        return None
    runs: list[Run] = []
    for source, local in _paired(there.parts, here.parts):
        found = _runs_of_part((source, theirs), (local, ours), chunk)
        if found is None:
            return None
        runs += found
    return Direct(chunk, there.block_tokens, here.block_tokens, tuple(_joined(sorted(runs))))


def _paired(theirs: Sequence[Part], ours: Sequence[Part]) -> list[tuple[Part, Part]]:
    """Return which parts correspond; where they are one row on both sides, they count as one."""
    if _are_one_row(theirs) and _are_one_row(ours):
        width = sum(part.width for part in ours)
        source, local = (
            dataclasses.replace(side[0], width=width, channel_tile=width) for side in (theirs, ours)
        )
        return [(source, local)]
    return list(zip(theirs, ours, strict=True))


def _are_one_row(parts: Sequence[Part]) -> bool:
    """Say whether a token's parts lie behind each other, channel after channel."""
    return all(_is_row(part) for part in parts) and all(
        after.start == before.start + before.width
        and (after.token_tile, after.strides[:2]) == (before.token_tile, before.strides[:2])
        for before, after in pairwise(parts)
    )


def _is_row(part: Part) -> bool:
    return part.channel_tile == part.width and part.strides[3] == 1


def _runs_of_part(
    theirs: tuple[Part, Heads], ours: tuple[Part, Heads], chunk: int
) -> list[Run] | None:
    """Return a part's runs, one for all heads or one for each; None where a head is not one."""
    sides = [_side(part, heads, chunk) for part, heads in (theirs, ours)]
    if sides[0] is None or sides[1] is None:
        return None
    there, here = sides[0], sides[1]
    if [axis.length for axis in there.axes] != [axis.length for axis in here.axes]:
        return None
    axes = [(a.length, a.stride, b.stride) for a, b in zip(there.axes, here.axes, strict=True)]
    heads = ours[1].count, there.head_bytes, here.head_bytes
    num_bytes = ITEM_BYTES[ours[1].layout.dtype]
    rest = [axis for axis in (*axes, heads) if axis[0] > 1]
    while grown := next((axis for axis in rest if axis[1] == axis[2] == num_bytes), None):
        num_bytes *= grown[0]
        rest.remove(grown)
    if rest not in ([], [heads]):
        return None
    separate = heads[0] if rest else 1
    return [
        Run(
            there.start + head * there.head_bytes,
            there.step,
            here.start + head * here.head_bytes,
            here.step,
            num_bytes,
        )
        for head in range(separate)
    ]


class _Axis(NamedTuple):
    """length: how many there are. stride: bytes from one to the next."""

    length: int
    stride: int


class _Side(NamedTuple):
    """A part of a chunk in one side's pages, in bytes: where its first head begins, how far it is
    to the block's next chunk and to the next head, and the axes of tokens and channels."""

    start: int
    step: int
    head_bytes: int
    axes: tuple[_Axis, ...]


def _side(part: Part, heads: Heads, chunk: int) -> _Side | None:
    """Return how a part lies; None where chunks and the part's tiles do not divide each other, or
    chunks of a block do not lie at equal distances."""
    layout = heads.layout
    item = ITEM_BYTES[layout.dtype]
    to_tile, to_token, to_channel_tile, to_channel = (item * stride for stride in part.strides)
    tile = part.token_tile
    inside = min(chunk, tile)
    if chunk % inside or tile % inside:
        return None
    tokens = _one_axis(_Axis(chunk // inside, to_tile), _Axis(inside, to_token))
    channels = _one_axis(
        _Axis(part.width // part.channel_tile, to_channel_tile),
        _Axis(part.channel_tile, to_channel),
    )
    if chunk == layout.block_tokens:
        step = 0
    elif chunk >= tile:
        step = chunk // tile * to_tile
    elif tile == layout.block_tokens or to_tile == tile * to_token:
        step = chunk * to_token
    else:
        return None
    head_bytes = layout.head_stride * item
    start = part.start * item + heads.first * head_bytes
    return _Side(start, step, head_bytes, (*tokens, *channels))


def _one_axis(outer: _Axis, inner: _Axis) -> list[_Axis]:
    """Return both as one where they can be, and without what has nothing to count."""
    axes = [axis for axis in (outer, inner) if axis.length > 1]
    if len(axes) == 2 and outer.stride == inner.length * inner.stride:
        return [_Axis(outer.length * inner.length, inner.stride)]
    return axes


def _joined(runs: Sequence[Run]) -> list[Run]:
    """Return the same runs, in the order of their pages, with neighbours on both sides as one."""
    joined: list[Run] = []
    for run in runs:
        last = joined[-1] if joined else None
        if last is not None and (
            last.source_start + last.num_bytes == run.source_start
            and last.start + last.num_bytes == run.start
            and (last.source_step, last.step) == (run.source_step, run.step)
        ):
            joined[-1] = last._replace(num_bytes=last.num_bytes + run.num_bytes)
        else:
            joined.append(run)
    return joined
