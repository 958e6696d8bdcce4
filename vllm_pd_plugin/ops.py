"""The native ops, and a reference in Python beside each; the only importer of the extension.

Each op takes *planes*: one layer's KV cache each, seen as ``[num_blocks, heads, tokens, width]``
with any strides but in the last dimension, all of one shape and dtype. Where the extension was not
built, the references are used, and a warning says so once.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence

import torch

logger = logging.getLogger(__name__)

try:
    importlib.import_module("vllm_pd_plugin._C")  # which registers the ops
    HAS_NATIVE, _why_not = True, "it has no CUDA kernels"
except ImportError as error:
    HAS_NATIVE, _why_not = False, str(error)

_KEY_STEP = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def digest_blocks(planes: Sequence[torch.Tensor], blocks: torch.Tensor) -> torch.Tensor:
    """Hash what some blocks hold in every plane.

    Args:
        planes: see above; on the CPU or one CUDA device.
        blocks: int64 ``[n]``, on the same device.

    Returns:
        int64 ``[1]``: it depends on every byte, on the order of the planes and on that of the
        blocks, and not on where they lie.
    """
    if not _has_kernel("digest_blocks", blocks.device.type):
        _say_that_the_reference_is_used()
        return digest_blocks_reference(planes, blocks)
    digest: torch.Tensor = torch.ops.vllm_pd_plugin.digest_blocks(list(planes), blocks)
    return digest


def digest_blocks_reference(planes: Sequence[torch.Tensor], blocks: torch.Tensor) -> torch.Tensor:
    """``digest_blocks`` in PyTorch; ``csrc/hash.h`` says the same."""
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


def _signed(word: int) -> int:
    """The 64-bit word as PyTorch's int64 has it."""
    return word - 2**64 if word >= 2**63 else word


def _has_kernel(op: str, device: str) -> bool:
    key = "CUDA" if device == "cuda" else "CPU"
    name = f"vllm_pd_plugin::{op}"
    return HAS_NATIVE and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


@functools.cache
def _say_that_the_reference_is_used() -> None:
    logger.warning(
        "vllm-pd-plugin runs without its native extension (%s): slower ops in PyTorch are used. "
        "To have it, install a C++ compiler (for a GPU also the CUDA toolkit), then: "
        "pip install --no-build-isolation --force-reinstall --no-deps vllm-pd-plugin",
        _why_not,
    )


if HAS_NATIVE:

    @torch.library.register_fake("vllm_pd_plugin::digest_blocks")  # type: ignore[untyped-decorator]
    def _(planes: Sequence[torch.Tensor], blocks: torch.Tensor) -> torch.Tensor:
        return torch.empty(1, dtype=torch.int64, device=blocks.device)
