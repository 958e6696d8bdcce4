"""How KV is written down to be sent: bit for bit, or as small integers. Pure.

A codec chooses an ``Encoding`` for each *part* of the KV cache. ``csrc/slab.h`` has the
same layout for the kernels; ``tests/unit/codecs/test_codec.py`` holds the two together.

The axes are KIVI's (Liu et al., ICML 2024): keys have outlier channels, so each channel has a range
of its own over 32 tokens; values have none, so each token has. The first tokens of a sequence, on
which attention sinks (Xiao et al., ICLR 2024), and what does not fill a group of 32 tokens are
written in int8.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Literal

AUTO = "auto"
"""Stands for a choice by what was measured, where a codec is named."""

TOKEN_GROUP = 32
WIDE_CHANNELS = 128
SINK_TOKENS = 4
MAX_WIDTH = 1024
_ALIGNMENT = 16
_BFLOAT16_STEP = 2.0**-7
"""By how much a bfloat16 that is rounded up, or down, may be off."""

FLOATS = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Element types that can be encoded, and their bytes."""


class Codec(enum.StrEnum):
    """From the widest to the narrowest."""

    RAW = "raw"
    INT8 = "int8"
    INT4 = "int4"
    INT2 = "int2"

    @property
    def rank(self) -> int:
        """Grows as codecs get narrower."""
        return list(Codec).index(self)


@dataclasses.dataclass(frozen=True, slots=True)
class CodecChoice:
    """How KV is to be written down for the wire.

    codec: None chooses for each handoff, no narrower than ``narrowest``.
    """

    codec: Codec | None = Codec.RAW
    narrowest: Codec = Codec.RAW


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One part of what a head has in a block: a key, or value, or so, for each token.

    width: channels of a token.
    start: first element of the part, in a head's elements of a block.
    token_tile, channel_tile: attention kernels keep a part in tiles of so many tokens by so many
        channels; whole rows are one tile.
    strides: elements from token tile to token tile, from token to token in one, from channel tile
        to channel tile, and from channel to channel in one.
    """

    kind: Literal["key", "value", "latent", "rope"]
    width: int
    start: int
    token_tile: int
    channel_tile: int
    strides: tuple[int, int, int, int]

    @classmethod
    def of_rows(
        cls, kind: Literal["key", "value", "latent", "rope"], width: int, start: int, stride: int
    ) -> Part:
        """Return a part of which each token has a row; ``stride`` is that of the tokens."""
        return cls(kind, width, start, 1, width, (stride, 0, 0, 1))

    @classmethod
    def of_columns(
        cls, kind: Literal["key", "value"], width: int, start: int, block_tokens: int
    ) -> Part:
        """Return a part of which each channel has a row, of all tokens of the block."""
        return cls(kind, width, start, block_tokens, 1, (0, 1, block_tokens, 0))


@dataclasses.dataclass(frozen=True, slots=True)
class Encoding:
    """How one part is written down.

    bits: of a code; 8 stands for rows about zero with a scale for each token.
    by_channel: a range for each channel and 32 tokens; else for each token and ``group`` channels.
    """

    bits: int
    by_channel: bool
    group: int

    def stripe_bytes(self, tokens: int, width: int, sinks: int) -> int:
        """Return what one head of one layer takes; see ``Stripe`` in ``csrc/slab.h``."""
        groups = 0 if self.bits == 8 else tokens // TOKEN_GROUP
        sinks = min(sinks, TOKEN_GROUP) if groups else 0
        ranges = width if self.by_channel else TOKEN_GROUP * (width // self.group)
        tile = _aligned(4 * ranges + TOKEN_GROUP * (width * self.bits // 8))
        tail = tokens - groups * TOKEN_GROUP
        return groups * tile + _wide_bytes(tail, width) + _wide_bytes(sinks, width)

    def error_bound(self, low: float, high: float) -> float:
        """Return how far what comes back may be from a value, when all that share its range are
        between ``low`` and ``high``; rounding to the cache's own type comes on top."""
        if self.bits == 8:
            return max(abs(low), abs(high)) / 127 / 2 * (1 + _BFLOAT16_STEP)
        width = high - low + abs(low) * _BFLOAT16_STEP
        levels: int = 2**self.bits - 1
        return width / levels / 2 * (1 + _BFLOAT16_STEP)


WIDE = Encoding(8, by_channel=False, group=WIDE_CHANNELS)


def encoding_of(codec: Codec, part: Part) -> Encoding:
    """Return how a lossy codec writes a part down.

    MLA's latent is one vector for all heads and has no outlier channels: it is written as values
    are, and never in 2 bits, because it has been made small already. Its rotary key, a ninth of a
    row, stays in int8.
    """
    assert codec is not Codec.RAW
    if codec is Codec.INT8 or part.kind == "rope":
        return WIDE
    if part.kind == "key":
        return Encoding(4 if codec is Codec.INT4 else 2, by_channel=True, group=part.width)
    if part.kind == "latent":
        channels = 64 if codec is Codec.INT4 else 32
        return Encoding(4, by_channel=False, group=_divisor(part.width, channels))
    if codec is Codec.INT4:
        return Encoding(4, by_channel=False, group=_divisor(part.width, 64))
    return Encoding(2, by_channel=False, group=_divisor(part.width, 32))


def row_bytes(codec: Codec, parts: Sequence[Part], tokens: int, sinks: int) -> int:
    """Return what one head of one layer takes, all parts of its rows together."""
    return sum(encoding_of(codec, part).stripe_bytes(tokens, part.width, sinks) for part in parts)


def _divisor(width: int, at_most: int) -> int:
    return next(size for size in range(min(width, at_most), 0, -1) if width % size == 0)


def _wide_bytes(rows: int, width: int) -> int:
    return _aligned(rows * (2 * -(-width // WIDE_CHANNELS) + width))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
