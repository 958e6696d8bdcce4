"""What a decode engine gets of a prompt's KV: through the project's own ops, and its bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_pd_plugin.codecs import ops
from vllm_pd_plugin.codecs.codec import SINK_TOKENS, Codec, Part, encoding_of, row_bytes

BLOCK_TOKENS = 128

Kv = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, ``[sequences, heads, tokens, dim]``."""


def through(codec: Codec, kv: Kv) -> Kv:
    """Return the KV as decode engines get it that are sent each sequence for itself.

    Raises AssertionError if raw changes a bit.
    """
    layers = [torch.cat(pair, 3) for pair in kv]
    sequences = [
        handed_over(codec, [layer[number] for layer in layers]) for number in range(len(layers[0]))
    ]
    after = [torch.stack(list(rows)) for rows in zip(*sequences, strict=True)]
    if codec is Codec.RAW:
        assert all(map(_same_bits, layers, after)), "raw is not bit-exact"
    return [(keys, values) for keys, values in (rows.chunk(2, 3) for rows in after)]


def handed_over(codec: Codec, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Write each layer's ``[heads, tokens, key and value]`` down, and read it into other blocks."""
    heads, tokens, width = rows[0].shape
    local = [_in_blocks(row) for row in rows]
    blocks = torch.arange(len(local[0]))
    # Other blocks, full of NaN: what is not written there shows.
    remote, remote_blocks = [torch.full_like(plane, torch.nan) for plane in local], blocks.flip(0)
    if codec is Codec.RAW:
        slab = torch.empty(sum(map(_num_bytes, local)), dtype=torch.uint8)
        ops.pack_blocks(local, blocks, slab)
        ops.unpack_blocks(slab, remote_blocks, remote)
    else:
        for part in parts(width // 2):
            encoding = encoding_of(codec, part)
            size = len(rows) * heads * encoding.stripe_bytes(tokens, part.width, SINK_TOKENS)
            slab = torch.empty(size, dtype=torch.uint8)
            source = [ops.part_of(plane, part) for plane in local]
            ops.encode_blocks(source, blocks, tokens, encoding, SINK_TOKENS, slab)
            target = [ops.part_of(plane, part) for plane in remote]
            ops.decode_blocks(slab, remote_blocks, tokens, encoding, SINK_TOKENS, target)
    return [plane[remote_blocks].transpose(0, 1).flatten(1, 2)[:, :tokens] for plane in remote]


def parts(dim: int) -> list[Part]:
    """Return the parts of rows that have a head's key and then its value."""
    return [
        Part.of_rows("key", dim, start=0, stride=2 * dim),
        Part.of_rows("value", dim, start=dim, stride=2 * dim),
    ]


def bytes_ratio(codec: Codec, dim: int, lengths: Sequence[int], element_bytes: int) -> float:
    """Return the bytes of prompts on the wire; 1 is what raw KV of such elements takes."""
    if codec is Codec.RAW:
        return 1.0
    sent = sum(row_bytes(codec, parts(dim), tokens, SINK_TOKENS) for tokens in lengths)
    return sent / (2 * dim * sum(lengths) * element_bytes)


def _in_blocks(row: torch.Tensor) -> torch.Tensor:
    """Lay ``[heads, tokens, width]`` out as ``[num_blocks, heads, BLOCK_TOKENS, width]``."""
    heads, tokens, width = row.shape
    count = -(-tokens // BLOCK_TOKENS)
    filled = torch.nn.functional.pad(row, (0, 0, 0, count * BLOCK_TOKENS - tokens))
    return filled.view(heads, count, BLOCK_TOKENS, width).transpose(0, 1).contiguous()


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))
