"""The native ops, and a reference in Python beside each.

``blocks`` is int64 ``[n]``: block numbers. *Planes* are KV caches, one a layer, seen as
``[num_blocks, heads, tokens, width]`` with any strides but in the last dimension, all of one shape
and dtype. *Parts* are the keys of several layers, or their values, or so, seen as ``[num_blocks,
heads, token tiles, tokens of a tile, channel tiles, channels of a tile]`` with any strides (see
``part_of``). All tensors of a call are on one device.

Where a native module does not serve (``native.py``), the references of ``ops_reference.py`` do, and
a warning says so once. On the CPU an op uses as many threads as the caller's PyTorch does; on a GPU
it runs on the caller's current stream.

Errors: RuntimeError where arguments do not fit; on a GPU block numbers are not checked, because
that would wait for it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from vllm_pd_plugin.codecs import native, ops_reference
from vllm_pd_plugin.codecs.codec import Encoding, Part

logger = logging.getLogger(__name__)

HAS_NATIVE = native.missing(on_cuda=False) is None
"""Whether the ops are registered, with their CPU kernels."""

Tensors = Sequence[torch.Tensor]


def as_plane(cache: torch.Tensor) -> torch.Tensor:
    """Return a KV cache as a plane: ``[num_blocks, heads, tokens, channels]``, or without heads
    where all share one row."""
    return cache if cache.dim() == 4 else cache.unsqueeze(1)


def part_of(cache: torch.Tensor, part: Part) -> torch.Tensor:
    """Return one part of a KV cache (see ``as_plane``), in tiles."""
    plane = as_plane(cache)
    blocks, heads, tokens, _ = plane.shape
    tiles = (tokens // part.token_tile, part.token_tile)
    channels = (part.width // part.channel_tile, part.channel_tile)
    return plane.as_strided(
        (blocks, heads, *tiles, *channels),
        (plane.stride(0), plane.stride(1), *part.strides),
        plane.storage_offset() + part.start,
    )


def pack_blocks(planes: Tensors, blocks: torch.Tensor, slab: torch.Tensor) -> None:
    """Copy some blocks into a slab.

    Args:
        slab: uint8, one contiguous dimension, of exactly the bytes that are copied. Gets plane
            after plane, block after block.
    """
    kernel("pack_blocks", blocks)(list(planes), blocks, slab)


def unpack_blocks(slab: torch.Tensor, blocks: torch.Tensor, planes: Tensors) -> None:
    """Copy a slab of ``pack_blocks`` into some blocks."""
    kernel("unpack_blocks", blocks)(slab, blocks, list(planes))


def encode_blocks(
    parts: Tensors,
    blocks: torch.Tensor,
    tokens: int,
    encoding: Encoding,
    sinks: int,
    slab: torch.Tensor,
) -> None:
    """Write the tokens of a run of blocks into a slab as small integers.

    Args:
        parts: float32, bfloat16 or float16, at most 1024 channels.
        tokens: the run's first tokens count; the last block has one of them at least.
        sinks: how many of the first tokens are written in int8 as well, and decoded from there.
        slab: as for ``pack_blocks``, of ``parts * heads * encoding.stripe_bytes(...)`` bytes;
            ``csrc/slab.h`` has its layout, which does not depend on that of the parts.
    """
    kernel("encode_blocks", blocks)(
        list(parts), blocks, tokens, encoding.bits, encoding.group, encoding.by_channel, sinks,
        slab,
    )  # fmt: skip


def decode_blocks(
    slab: torch.Tensor,
    blocks: torch.Tensor,
    tokens: int,
    encoding: Encoding,
    sinks: int,
    parts: Tensors,
) -> None:
    """Write the values of a slab of ``encode_blocks`` into a run of blocks; what lies behind the
    run's last token stays as it is."""
    kernel("decode_blocks", blocks)(
        slab, blocks, tokens, encoding.bits, encoding.group, encoding.by_channel, sinks,
        list(parts),
    )  # fmt: skip


def digest_blocks(planes: Tensors, blocks: torch.Tensor) -> torch.Tensor:
    """Hash what some blocks hold in every plane.

    Returns:
        int64 ``[1]``: it depends on every byte, on the order of the planes and on that of the
        blocks, and not on where they lie.
    """
    digest: torch.Tensor = kernel("digest_blocks", blocks)(list(planes), blocks)
    return digest


def kernel(
    op: str, blocks: torch.Tensor, references: ModuleType = ops_reference
) -> Callable[..., Any]:
    """Return the op of that name that serves the device of some blocks, or its reference, which
    takes the same arguments."""
    missing = native.missing(blocks.is_cuda)
    if missing is None:
        registered: Callable[..., Any] = getattr(torch.ops.vllm_pd_plugin, op)
        return registered
    _say_that_the_reference_is_used(missing)
    reference: Callable[..., Any] = getattr(references, op)
    return reference


@functools.cache
def _say_that_the_reference_is_used(missing: native.Missing) -> None:
    logger.warning(
        "vllm-pd-plugin runs without its native ops (%s): slower ones in PyTorch are used. "
        "To have them: %s",
        missing.why,
        missing.remedy,
    )


def returns_nothing(*arguments: object) -> None:
    """What these ops are to ``torch.compile``: they write to an argument."""


if HAS_NATIVE:
    for _name in ("pack_blocks", "unpack_blocks", "encode_blocks", "decode_blocks"):
        torch.library.register_fake(f"vllm_pd_plugin::{_name}", returns_nothing)

    @torch.library.register_fake("vllm_pd_plugin::digest_blocks")  # type: ignore[untyped-decorator]
    def _(planes: Tensors, blocks: torch.Tensor) -> torch.Tensor:
        return torch.empty(1, dtype=torch.int64, device=blocks.device)
