"""What a decode engine gets of a prompt's KV: through the project's own ops, and its bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vllm_pd_plugin import ops
from vllm_pd_plugin.codecs import SINK_TOKENS, Codec, Encoding, Part, encoding_of, row_bytes

BLOCK_TOKENS = 128

Kv = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, ``[sequences, heads, tokens, dim]``."""

Trip = Callable[[list[torch.Tensor]], list[torch.Tensor]]
"""What becomes of one part of one sequence's KV: ``[heads, tokens, dim]`` of each layer."""


def hand_over(kv: Kv, key: Trip, value: Trip) -> Kv:
    """Send each sequence for itself, keys and values each in one piece from token 0 on."""
    sequences = []
    for number in range(len(kv[0][0])):
        keys = key([keys[number] for keys, _ in kv])
        values = value([values[number] for _, values in kv])
        sequences.append((keys, values))
    return [
        (
            torch.stack([keys[layer] for keys, _ in sequences]),
            torch.stack([values[layer] for _, values in sequences]),
        )
        for layer in range(len(kv))
    ]


def through(codec: Codec, kv: Kv) -> Kv:
    """Return the KV as it comes out of a codec. Raises AssertionError if raw changes a bit."""
    if codec is Codec.RAW:
        out = hand_over(kv, packed, packed)
        for before, after in zip(kv, out, strict=True):
            assert all(map(_same_bits, before, after)), "raw is not bit-exact"
        return out
    key, value = (encoding_of(codec, part) for part in parts(kv[0][0].shape[3]))
    return hand_over(kv, lambda rows: encoded(rows, key), lambda rows: encoded(rows, value))


def encoded(rows: Sequence[torch.Tensor], encoding: Encoding) -> list[torch.Tensor]:
    """Encode ``[heads, tokens, dim]`` of each layer, and decode into other blocks."""
    heads, tokens, width = rows[0].shape
    planes, blocks = _planes(rows)
    size = len(rows) * heads * encoding.stripe_bytes(tokens, width, SINK_TOKENS)
    slab = torch.empty(size, dtype=torch.uint8)
    ops.encode_blocks(planes, blocks, tokens, encoding, SINK_TOKENS, slab)
    remote, remote_blocks = _empty_planes(planes)
    ops.decode_blocks(slab, remote_blocks, tokens, encoding, SINK_TOKENS, remote)
    return [_rows(plane, remote_blocks, tokens) for plane in remote]


def packed(rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copy ``[heads, tokens, dim]`` of each layer into a slab, and out into other blocks."""
    tokens = rows[0].shape[1]
    planes, blocks = _planes(rows)
    slab = torch.empty(sum(row.numel() * row.element_size() for row in rows), dtype=torch.uint8)
    ops.pack_blocks(planes, blocks, tokens, slab)
    remote, remote_blocks = _empty_planes(planes)
    ops.unpack_blocks(slab, remote_blocks, tokens, remote)
    return [_rows(plane, remote_blocks, tokens) for plane in remote]


def parts(dim: int) -> list[Part]:
    """Return the parts of a row that has a head's key and then its value."""
    return [Part("key", 0, dim), Part("value", dim, dim)]


def bytes_ratio(codec: Codec, dim: int, lengths: Sequence[int], element_bytes: int) -> float:
    """Return the bytes of prompts on the wire; 1 is what raw KV of such elements takes."""
    if codec is Codec.RAW:
        return 1.0
    sent = sum(row_bytes(codec, parts(dim), tokens, SINK_TOKENS) for tokens in lengths)
    return sent / (2 * dim * sum(lengths) * element_bytes)


def _planes(rows: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Lay each layer out as ``[num_blocks, heads, BLOCK_TOKENS, dim]``."""
    heads, tokens, width = rows[0].shape
    count = -(-tokens // BLOCK_TOKENS)
    planes = []
    for row in rows:
        filled = torch.nn.functional.pad(row, (0, 0, 0, count * BLOCK_TOKENS - tokens))
        plane = filled.view(heads, count, BLOCK_TOKENS, width).transpose(0, 1).contiguous()
        planes.append(plane)
    return planes, torch.arange(count)


def _empty_planes(planes: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return what to decode into: in other blocks, and full of NaN, to show what is left out."""
    remote = [torch.full_like(plane, torch.nan) for plane in planes]
    return remote, torch.arange(len(planes[0])).flip(0)


def _rows(plane: torch.Tensor, blocks: torch.Tensor, tokens: int) -> torch.Tensor:
    return plane[blocks].transpose(0, 1).flatten(1, 2)[:, :tokens]


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))
