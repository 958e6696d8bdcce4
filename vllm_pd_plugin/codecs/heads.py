"""KV of some heads and some tokens, written down for an engine of another shape, and taken apart.

For a slab ``[layers, tokens, heads, channels]`` without gaps, as ``mapping.match.Slab`` has it: the
producer gathers it from its pages, the consumer scatters it into its own, and whoever has the wider
elements converts them. The ops and their errors are as in ``ops``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from vllm_pd_plugin.codecs import heads_reference, ops
from vllm_pd_plugin.codecs.codec import Part

LayerParts = Sequence[torch.Tensor]
"""The parts of one layer's blocks (see ``Pages.of`` and ``ops.part_of``), in the order in which a
slab has their channels."""

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Pages:
    """How one layer's blocks lie on one rank.

    num_blocks, stride_bytes: how many there are, and from one to the next (``Region``).
    block_tokens: tokens in a block of the block table; several blocks of the attention kernel may
        make one up, and are token tiles of the parts then.
    num_heads, head_stride: heads in a block, and elements from one to the next in every part.
    """

    num_blocks: int
    stride_bytes: int
    block_tokens: int
    num_heads: int
    head_stride: int
    parts: tuple[Part, ...]

    def of(self, cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the parts of a KV cache, as views of it.

        cache: begins where the first block does, in any shape. Its elements are those of the pages;
            uint8 stands for fp8_e4m3.

        Raises:
            RuntimeError: blocks are no whole number of elements apart, or do not lie in the cache's
                memory.
        """
        block_stride, rest = divmod(self.stride_bytes, cache.element_size())
        if rest:
            raise RuntimeError(
                f"blocks are {self.stride_bytes} bytes apart, elements have {cache.element_size()}"
            )
        return tuple(
            cache.as_strided(
                (
                    self.num_blocks,
                    self.num_heads,
                    self.block_tokens // part.token_tile,
                    part.token_tile,
                    part.width // part.channel_tile,
                    part.channel_tile,
                ),
                (block_stride, self.head_stride, *part.strides),
                int(cache.storage_offset()) + part.start,
            )
            for part in self.parts
        )


def gather_heads(
    layers: Sequence[LayerParts],
    heads: range,
    blocks: torch.Tensor,
    tokens: range,
    dtype: str,
    slab: torch.Tensor,
    scales: Sequence[Sequence[float]] = (),
) -> None:
    """Write some heads of some tokens of several layers into a slab.

    float32, bfloat16 and float16 become each other, rounded to nearest, ties to even, and
    fp8_e4m3: divided by a scale and then no larger than 448, as by vLLM's cache kernels. Infinities
    and NaNs stay what they are, but for the infinities of fp8_e4m3, which has none. What has the
    slab's type already is copied bit for bit.

    Args:
        layers: at most 1024 channels a part; alike but for their number of blocks and the strides
            of blocks and heads.
        heads: as numbered in a block, neighbours.
        blocks: a block table, or a run of one. Blocks that none of the tokens is in are not looked
            at.
        tokens: neighbours, counted from the first token of ``blocks[0]``.
        dtype: of the slab: float32, bfloat16, float16 or fp8_e4m3.
        slab: uint8, one contiguous dimension, of exactly ``layers * tokens * heads * channels``
            elements; begins at a multiple of their size (of 16 bytes, to be as fast as can be).
        scales: where anything becomes fp8_e4m3, for each layer that of each part (vLLM's
            ``k_scale`` and ``v_scale``); else it does not matter.
    """
    parts, flat_scales = _flat(layers, scales)
    ops.kernel("gather_heads", blocks, heads_reference)(
        parts, len(layers), blocks, *_start_and_length(tokens, "tokens"),
        *_start_and_length(heads, "heads"), flat_scales, _typed(slab, dtype),
    )  # fmt: skip


def scatter_heads(
    slab: torch.Tensor,
    dtype: str,
    blocks: torch.Tensor,
    tokens: range,
    heads: range,
    layers: Sequence[LayerParts],
    scales: Sequence[Sequence[float]] = (),
) -> None:
    """Write a slab of ``gather_heads`` into some heads of some tokens of several layers, converted
    to their type; nothing else in the blocks is touched.

    No block may be among ``blocks`` twice.
    """
    parts, flat_scales = _flat(layers, scales)
    ops.kernel("scatter_heads", blocks, heads_reference)(
        _typed(slab, dtype), blocks, *_start_and_length(tokens, "tokens"),
        *_start_and_length(heads, "heads"), flat_scales, len(layers), parts,
    )  # fmt: skip


def _flat(
    layers: Sequence[LayerParts], scales: Sequence[Sequence[float]]
) -> tuple[list[torch.Tensor], list[float]]:
    """Return the same, layer by layer."""
    lengths = {len(parts) for parts in layers}
    if len(lengths) != 1 or not all(lengths):
        raise RuntimeError(f"layers have {sorted(lengths)} parts")
    if any(len(of_layer) not in lengths for of_layer in scales):
        raise RuntimeError("a layer has not as many scales as parts")
    return list(itertools.chain(*layers)), list(itertools.chain(*scales))


def _start_and_length(some: range, what: str) -> tuple[int, int]:
    if some.step != 1:
        raise RuntimeError(f"{what} are neighbours, and these are {some}")
    return some.start, len(some)


def _typed(slab: torch.Tensor, dtype: str) -> torch.Tensor:
    if dtype not in _DTYPES:
        raise RuntimeError(f"elements of {dtype} are not known, but {', '.join(_DTYPES)}")
    if slab.dtype != torch.uint8 or slab.dim() != 1:
        raise RuntimeError("a slab is one contiguous dimension of uint8")
    return slab.view(_DTYPES[dtype])


if ops.HAS_NATIVE:
    for _name in ("gather_heads", "scatter_heads"):
        torch.library.register_fake(f"vllm_pd_plugin::{_name}", ops.returns_nothing)
