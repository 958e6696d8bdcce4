"""What the ops of ``heads`` say, in PyTorch; see ``ops_reference``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from vllm_pd_plugin.codecs.codec import MAX_WIDTH

Tensors = Sequence[torch.Tensor]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FP8 = torch.float8_e4m3fn
_LARGEST_FP8 = 448.0
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""What elements of a size are moved as: PyTorch cannot index all types."""


def gather_heads(
    parts: Tensors,
    layers: int,
    blocks: torch.Tensor,
    first_token: int,
    tokens: int,
    first_head: int,
    heads: int,
    scales: Sequence[float],
    slab: torch.Tensor,
) -> None:
    _check(parts, layers, blocks, first_token, tokens, first_head, heads, slab)
    by_part = _scales(scales, parts, _dtype(parts[0]), slab.dtype)
    there = _in_slab(slab, parts, layers, tokens, heads)
    for part, scale, target in zip(parts, by_part, there, strict=True):
        places = _places(part, blocks, first_token, tokens, first_head, heads)
        values = _bits(part)[places].view(_dtype(part))
        _bits(target).copy_(_bits(_converted(values, slab.dtype, scale)).flatten(2))


def scatter_heads(
    slab: torch.Tensor,
    blocks: torch.Tensor,
    first_token: int,
    tokens: int,
    first_head: int,
    heads: int,
    scales: Sequence[float],
    layers: int,
    parts: Tensors,
) -> None:
    _check(parts, layers, blocks, first_token, tokens, first_head, heads, slab)
    by_part = _scales(scales, parts, slab.dtype, _dtype(parts[0]))
    there = _in_slab(slab, parts, layers, tokens, heads)
    for part, scale, source in zip(parts, by_part, there, strict=True):
        places = _places(part, blocks, first_token, tokens, first_head, heads)
        values = _bits(_converted(source, _dtype(part), scale))
        _bits(part)[places] = values.unflatten(2, part.shape[4:])


def _places(
    part: torch.Tensor,
    blocks: torch.Tensor,
    first_token: int,
    tokens: int,
    first_head: int,
    heads: int,
) -> tuple[torch.Tensor, ...]:
    """Return what of a part is meant, in its first four dimensions: each ``[tokens, heads]``."""
    block_tokens, tile = _tokens(part), part.shape[3]
    counted = first_token + torch.arange(tokens, device=part.device)
    slots = counted % block_tokens
    of_heads = first_head + torch.arange(heads, device=part.device)
    of_tokens = blocks[counted // block_tokens], slots // tile, slots % tile
    block, token_tile, in_tile = (each[:, None] for each in of_tokens)
    return block, of_heads[None], token_tile, in_tile


def _in_slab(
    slab: torch.Tensor, parts: Tensors, layers: int, tokens: int, heads: int
) -> Iterator[torch.Tensor]:
    """Yield each part's ``[tokens, heads, width]``."""
    widths = [_width(part) for part in parts[: len(parts) // layers]]
    for layer in slab.view(layers, tokens, heads, sum(widths)):
        yield from layer.split(widths, 2)


def _converted(values: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    if values.dtype == dtype:
        return values
    if dtype == _FP8:
        # A tensor: PyTorch may multiply by the inverse of a number.
        values = values.float() / torch.tensor([scale], device=values.device)
        values = values.clamp(-_LARGEST_FP8, _LARGEST_FP8)
    return values.to(dtype)


def _scales(
    scales: Sequence[float], parts: Tensors, source: torch.dtype, target: torch.dtype
) -> Sequence[float]:
    """Return what each part is divided by, where that is to be; refuse what cannot be converted."""
    if source == _FP8 != target:
        raise RuntimeError("fp8_e4m3 cannot become another type")
    if source == target or target != _FP8:
        return [1.0] * len(parts)
    if len(scales) != len(parts):
        raise RuntimeError(f"{len(scales)} scales were given, {len(parts)} are needed")
    for scale in torch.tensor(scales, dtype=torch.float32).tolist():
        if not (math.isfinite(scale) and scale > 0):
            raise RuntimeError(f"a scale of {scale} divides nothing")
    return scales


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(_BITS[values.element_size()])


def _dtype(part: torch.Tensor) -> torch.dtype:
    return _FP8 if part.dtype == torch.uint8 else part.dtype


def _tokens(part: torch.Tensor) -> int:
    """Of a block."""
    return int(part.shape[2] * part.shape[3])


def _width(part: torch.Tensor) -> int:
    return int(part.shape[4] * part.shape[5])


def _check(
    parts: Tensors,
    layers: int,
    blocks: torch.Tensor,
    first_token: int,
    tokens: int,
    first_head: int,
    heads: int,
    slab: torch.Tensor,
) -> None:
    if layers < 1 or not parts or len(parts) % layers:
        raise RuntimeError(f"{len(parts)} parts are not those of {layers} layers")
    for dtype in (_dtype(parts[0]), slab.dtype):
        if dtype not in (*_FLOATS, _FP8):
            raise RuntimeError(
                "only float32, bfloat16 and float16 can be encoded, and fp8_e4m3 converted"
            )
    per_layer = len(parts) // layers
    for index, part in enumerate(parts):
        _check_part(part, parts[0], parts[index % per_layer])
    block_tokens, room = _tokens(parts[0]), len(blocks) * _tokens(parts[0])
    if not (first_token >= 0 and tokens >= 0 and first_token + tokens <= room):
        raise RuntimeError(
            f"{tokens} tokens from {first_token} are not in {len(blocks)} blocks of {block_tokens}"
        )
    if not (first_head >= 0 and heads >= 0 and first_head + heads <= parts[0].shape[1]):
        raise RuntimeError(f"{heads} heads from {first_head} are not among {parts[0].shape[1]}")
    touched = blocks[first_token // block_tokens : -(-(first_token + tokens) // block_tokens)]
    for part in parts:
        if tokens and not 0 <= int(touched.min()) <= int(touched.max()) < len(part):
            raise RuntimeError(f"a block lies outside a plane of {len(part)} blocks")
    elements = layers * tokens * heads * sum(map(_width, parts[:per_layer]))
    if len(slab) != elements:
        raise RuntimeError(f"the slab has {len(slab)} elements, {elements} are needed")


def _check_part(part: torch.Tensor, first: torch.Tensor, alike: torch.Tensor) -> None:
    """alike: the same part of the first layer."""
    if part.dim() != 6:
        raise RuntimeError(f"a part has 6 dimensions, not {part.dim()}")
    if part.shape[1:] != alike.shape[1:] or part.stride()[2:] != alike.stride()[2:]:
        raise RuntimeError("parts differ in shape, strides, dtype or device")
    if (part.dtype, part.shape[1], _tokens(part)) != (first.dtype, first.shape[1], _tokens(first)):
        raise RuntimeError("the parts of a layer differ in heads, tokens, dtype or device")
    if 0 in part.shape[1:]:
        raise RuntimeError(f"a part has nothing in dimension {part.shape.index(0, 1)}")
    if _width(part) > MAX_WIDTH:
        raise RuntimeError(f"rows of {_width(part)} channels are too wide; {MAX_WIDTH} are allowed")
