"""Pages in the formats that attention backends have, or could have."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from vllm_pd_plugin.codecs.codec import Part

FORMATS = (
    "rows", "rows", "rows", "token major", "token major", "swapped", "planes", "columns", "tiles",
    "kernel blocks",
)  # fmt: skip
"""A head's tokens after each other, key beside value; all heads of a token beside each other; the
value first; all keys before all values; keys in columns and values in rows; both in tiles; a block
of several smaller ones."""
STATE = "state"
"""One row for all tokens."""


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """Its parts, how many elements it is from head to head, and how many there are."""

    parts: tuple[Part, ...]
    head_stride: int
    num_elements: int


def page(form: str, channels: Sequence[tuple[str, int]], heads: int, block: int) -> Page:
    """Return a page of some format, for so many heads and tokens."""
    ends = list(itertools.accumulate((width for _, width in channels), initial=0))
    starts, width = ends[:-1], ends[-1]
    tile = math.gcd(block, 4)

    def parts(of: Sequence[int], token_tile: int, *strides: int) -> tuple[Part, ...]:
        return tuple(
            Part(kind, each, start, token_tile, each, strides)
            for (kind, each), start in zip(channels, of, strict=True)
        )

    whole, head = heads * block * width, block * width
    behind = [block * start for start in starts]
    if form == "token major":
        return Page(parts(starts, 1, heads * width, 0, 0, 1), width, whole)
    if form == "swapped":
        from_the_end = [width - end for end in ends[1:]]
        return Page(parts(from_the_end, 1, width, 0, 0, 1), head, whole)
    if form == "planes" and len({each for _, each in channels}) == 1:
        of_one = width // len(channels)
        planes = [heads * each for each in behind]
        return Page(parts(planes, 1, of_one, 0, 0, 1), block * of_one, whole)
    if form == "columns":
        (kind, each), *others = channels
        columns = Part.of_columns(kind, each, 0, block)
        rows = [
            Part.of_rows(kind, each, start, each)
            for (kind, each), start in zip(others, behind[1:], strict=True)
        ]
        return Page((columns, *rows), head, whole)
    if form == "tiles":
        tiles = [
            Part(kind, each, start, tile, 2, (tile * each, 2, 2 * tile, 1))
            for (kind, each), start in zip(channels, behind, strict=True)
        ]
        return Page(tuple(tiles), head, whole)
    if form == "kernel blocks":
        return Page(parts(starts, tile, heads * tile * width, width, 0, 1), tile * width, whole)
    if form == STATE:
        return Page(parts(starts, block, 0, 0, 0, 1), width, heads * width)
    return Page(parts(starts, 1, width, 0, 0, 1), head, whole)
