"""What the native ops say, in PyTorch: slower, and the measure that they are tested against.

The arguments are those of the ops as PyTorch registers them; ``ops`` describes them. The layout and
the arithmetic of ``csrc/slab.h`` and ``csrc/codes.h`` are written a second time here, on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vllm_pd_plugin.codecs.codec import MAX_WIDTH, TOKEN_GROUP, WIDE_CHANNELS, Encoding

Tensors = Sequence[torch.Tensor]

_KEY_STEP = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_ALIGNMENT = 16
_LARGEST_BFLOAT16 = 0x7F7F
_SMALLEST_SCALE = 1e-37


def pack_blocks(planes: Tensors, blocks: torch.Tensor, slab: torch.Tensor) -> None:
    _check_blocks(planes, blocks)
    _fill(slab, torch.cat([_as_bytes(plane[blocks]) for plane in planes]))


def unpack_blocks(slab: torch.Tensor, blocks: torch.Tensor, planes: Tensors) -> None:
    _check_blocks(planes, blocks)
    shape, dtype = (len(blocks), *planes[0].shape[1:]), planes[0].dtype
    size = math.prod(shape) * planes[0].element_size()
    _check_size(slab, size * len(planes))
    for plane, content in zip(planes, slab.split(size) if size else (), strict=False):
        plane[blocks] = content.clone().view(dtype).view(shape)


def encode_blocks(
    parts: Tensors,
    blocks: torch.Tensor,
    tokens: int,
    bits: int,
    group: int,
    by_channel: bool,
    sinks: int,
    slab: torch.Tensor,
) -> None:
    _check_blocks(parts, blocks)
    encoding = _check_encoding(parts, blocks, tokens, Encoding(bits, by_channel, group))
    stripes = [
        _encode(rows, encoding, sinks)
        for part in parts
        for rows in _in_rows(part[blocks]).transpose(0, 1).flatten(1, 2)[:, :tokens].float()
    ]
    _fill(slab, torch.cat(stripes))


def decode_blocks(
    slab: torch.Tensor,
    blocks: torch.Tensor,
    tokens: int,
    bits: int,
    group: int,
    by_channel: bool,
    sinks: int,
    parts: Tensors,
) -> None:
    _check_blocks(parts, blocks)
    encoding = _check_encoding(parts, blocks, tokens, Encoding(bits, by_channel, group))
    _, heads, block_tokens, width = _in_rows(parts[0][:0]).shape
    size = encoding.stripe_bytes(tokens, width, sinks)
    _check_size(slab, size * heads * len(parts))
    stripes = iter(slab.view(heads * len(parts), size))
    largest = torch.finfo(parts[0].dtype).max
    for part in parts:
        values = torch.stack(
            [_decode(next(stripes), tokens, width, encoding, sinks) for _ in range(heads)]
        )
        values = values.clamp(-largest, largest).to(part.dtype)
        for i, block in enumerate(blocks.tolist()):
            rows = _in_rows(part[block : block + 1]).clone()
            new = values[:, i * block_tokens : (i + 1) * block_tokens]
            rows[0, :, : new.shape[1]] = new
            part[block] = rows.view(part.shape[1:])


def digest_blocks(planes: Tensors, blocks: torch.Tensor) -> torch.Tensor:
    _check_blocks(planes, blocks)
    parts = []
    for plane in planes:
        _, heads, tokens, width = plane.shape
        row_bytes = width * plane.element_size()
        rows = plane[blocks].flatten().view(torch.uint8)
        rows = rows.view(len(blocks) * heads * tokens, row_bytes)
        parts.append(torch.nn.functional.pad(rows, (0, -row_bytes % 8)).flatten())
    words = torch.cat(parts).view(torch.int64)
    positions = torch.arange(1, len(words) + 1, device=words.device)
    keyed = words ^ (positions * _signed(_KEY_STEP))
    total = (words + (keyed & 0xFFFFFFFF) * ((keyed >> 32) & 0xFFFFFFFF)).sum()
    x = (int(total) & _MASK) ^ (len(words) * _KEY_STEP & _MASK)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return torch.tensor([_signed(x ^ (x >> 31))], device=blocks.device)


def _in_rows(part: torch.Tensor) -> torch.Tensor:
    """Return a part without its tiles, ``[blocks, heads, tokens, width]``."""
    blocks, heads, *tiles = part.shape
    return part.reshape(blocks, heads, tiles[0] * tiles[1], tiles[2] * tiles[3])


# --- encoding --------------------------------------------------------------------------------


def _encode(rows: torch.Tensor, encoding: Encoding, sinks: int) -> torch.Tensor:
    """Return the stripe of float32 rows ``[tokens, width]``."""
    groups = 0 if encoding.bits == 8 else len(rows) // TOKEN_GROUP
    sinks = min(sinks, TOKEN_GROUP) if groups else 0
    parts = []
    for index in range(groups):
        tile = rows[index * TOKEN_GROUP : (index + 1) * TOKEN_GROUP]
        uncounted = sinks if index == 0 and sinks < TOKEN_GROUP else 0
        parts += _encode_tile(tile, encoding, uncounted)
    parts += _encode_wide(rows[groups * TOKEN_GROUP :])
    parts += _encode_wide(rows[:sinks])
    return torch.cat(parts)


def _encode_tile(rows: torch.Tensor, encoding: Encoding, uncounted: int) -> list[torch.Tensor]:
    """Return a tile: zero points, scales, codes."""
    levels = 2**encoding.bits - 1
    if encoding.by_channel:
        grouped, counted = rows, rows[uncounted:]
        low, high = counted.amin(0, keepdim=True), counted.amax(0, keepdim=True)
    else:
        grouped = rows.view(len(rows), -1, encoding.group)
        low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    zeros = _bfloat16_below(low + 0.0)
    scales = _bfloat16_above((high - _float(zeros) + 0.0) / levels)
    codes = _rounded((grouped - _float(zeros)) * _inverse(_float(scales))) & levels
    codes = codes.reshape(rows.shape).to(torch.uint8)
    share = rows.shape[1] * encoding.bits // 8
    together = codes[:, :share].clone()
    for part in range(1, 8 // encoding.bits):
        together |= codes[:, part * share : (part + 1) * share] << (part * encoding.bits)
    return _padded([_as_bytes(zeros), _as_bytes(scales), together.flatten()])


def _encode_wide(rows: torch.Tensor) -> list[torch.Tensor]:
    """Return rows of int8: scales, codes."""
    scales, codes = [], []
    for part in rows.split(WIDE_CHANNELS, 1):
        largest = part.abs().amax(1, keepdim=True)
        scale = _bfloat16_above(largest / 127)
        scales.append(scale)
        codes.append((_rounded(part * _inverse(_float(scale))) & 255).to(torch.uint8))
    return _padded([_as_bytes(torch.cat(scales, 1)), torch.cat(codes, 1).flatten()])


def _decode(
    stripe: torch.Tensor, tokens: int, width: int, encoding: Encoding, sinks: int
) -> torch.Tensor:
    """Return float32 ``[tokens, width]``."""
    reader = _Reader(stripe)
    groups = 0 if encoding.bits == 8 else tokens // TOKEN_GROUP
    sinks = min(sinks, TOKEN_GROUP) if groups else 0
    tiles = [_decode_tile(reader, width, encoding) for _ in range(groups)]
    rows = torch.cat([*tiles, _decode_wide(reader, tokens - groups * TOKEN_GROUP, width)])
    rows[:sinks] = _decode_wide(reader, sinks, width)
    return rows


def _decode_tile(reader: _Reader, width: int, encoding: Encoding) -> torch.Tensor:
    shape = (1, width) if encoding.by_channel else (TOKEN_GROUP, width // encoding.group, 1)
    zeros, scales = reader.floats(shape), reader.floats(shape)
    share = width * encoding.bits // 8
    together = reader.take(TOKEN_GROUP * share).view(TOKEN_GROUP, share).int()
    reader.align()
    levels = 2**encoding.bits - 1
    codes = torch.cat(
        [together >> (part * encoding.bits) & levels for part in range(8 // encoding.bits)], 1
    )
    grouped = codes if encoding.by_channel else codes.view(TOKEN_GROUP, -1, encoding.group)
    return (zeros + grouped.float() * scales).view(TOKEN_GROUP, width)


def _decode_wide(reader: _Reader, rows: int, width: int) -> torch.Tensor:
    scales = reader.floats((rows, -(-width // WIDE_CHANNELS)))
    codes = reader.take(rows * width).view(torch.int8).view(rows, width)
    reader.align()
    return codes.float() * scales.repeat_interleave(WIDE_CHANNELS, 1)[:, :width]


class _Reader:
    """Reads a stripe from its beginning."""

    def __init__(self, stripe: torch.Tensor) -> None:
        self._stripe = stripe
        self._place = 0

    def take(self, size: int) -> torch.Tensor:
        self._place += size
        return self._stripe[self._place - size : self._place]

    def floats(self, shape: Sequence[int]) -> torch.Tensor:
        count = 1
        for size in shape:
            count *= size
        return _float(self.take(2 * count).clone().view(torch.int16).view(*shape))

    def align(self) -> None:
        self._place += -self._place % _ALIGNMENT


# --- numbers ---------------------------------------------------------------------------------


def _float(bfloat16_bits: torch.Tensor) -> torch.Tensor:
    return bfloat16_bits.view(torch.bfloat16).float()


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32).long() & 0xFFFFFFFF


def _bfloat16_above(values: torch.Tensor) -> torch.Tensor:
    """Return the bits of bfloat16 that are not below values that are not negative."""
    up = (_bits(values) + 0xFFFF) >> 16
    return up.clamp(max=_LARGEST_BFLOAT16).to(torch.int16)


def _bfloat16_below(values: torch.Tensor) -> torch.Tensor:
    down = (_bits(values) + torch.where(values < 0, 0xFFFF, 0)) >> 16
    return torch.where(down >= 2**15, down - 2**16, down).to(torch.int16)


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales > _SMALLEST_SCALE, 1 / scales, 0.0)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """Return the nearest integers of values below 2^22, in the low bits."""
    return _bits(values + 12582912.0)


def _as_bytes(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().flatten().view(torch.uint8)


def _padded(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    size = sum(len(part) for part in parts)
    return [*parts, torch.zeros(-size % _ALIGNMENT, dtype=torch.uint8, device=parts[0].device)]


def _signed(word: int) -> int:
    """The 64-bit word as PyTorch's int64 has it."""
    return word - 2**64 if word >= 2**63 else word


# --- arguments -------------------------------------------------------------------------------


def _check_blocks(tensors: Tensors, blocks: torch.Tensor) -> None:
    if not tensors:
        raise RuntimeError("no planes or parts were given")
    for tensor in tensors:
        if len(blocks) and not 0 <= int(blocks.min()) <= int(blocks.max()) < len(tensor):
            raise RuntimeError(f"a block lies outside a plane of {len(tensor)} blocks")


def _check_encoding(
    parts: Tensors, blocks: torch.Tensor, tokens: int, encoding: Encoding
) -> Encoding:
    _, _, block_tokens, width = _in_rows(parts[0][:0]).shape
    room = len(blocks) * block_tokens
    if not room - block_tokens < tokens <= room:
        raise RuntimeError(
            f"{tokens} tokens are not those of {len(blocks)} blocks of {block_tokens}"
        )
    if parts[0].dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise RuntimeError("only float32, bfloat16 and float16 can be encoded")
    bits, by_group = encoding.bits, encoding.bits < 8 and not encoding.by_channel
    if width > MAX_WIDTH or width * bits % 8 or (by_group and width % encoding.group):
        raise RuntimeError(f"rows of {width} channels cannot be encoded so")
    return encoding


def _check_size(slab: torch.Tensor, size: int) -> None:
    if len(slab) != size:
        raise RuntimeError(f"the slab has {len(slab)} bytes, {size} are needed")


def _fill(slab: torch.Tensor, content: torch.Tensor) -> None:
    _check_size(slab, len(content))
    slab.copy_(content)
