"""Per process: make a rank's KV cache readable, and say where it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from vllm_pd_plugin.errors import UnsupportedError
from vllm_pd_plugin.memory.layout import RankMemory, Region, Span
from vllm_pd_plugin.net.transport import Transport


class _Storage(Protocol):
    def data_ptr(self) -> int: ...

    def nbytes(self) -> int: ...


class Tensor(Protocol):
    """What this module needs of ``torch.Tensor``: a KV cache ``[num_blocks, ...]``."""

    @property
    def shape(self) -> Sequence[int]: ...

    def data_ptr(self) -> int: ...

    def element_size(self) -> int: ...

    def stride(self, dim: int, /) -> int: ...

    def untyped_storage(self) -> _Storage: ...

    def __getitem__(self, index: int, /) -> Tensor: ...

    def numel(self) -> int: ...


def region_of(layer: str, cache: Tensor) -> Region:
    """Return the region of one layer's KV cache, whose first dimension counts blocks.

    Raises:
        UnsupportedError: a block is not one stretch of bytes.
    """
    block = cache[0]
    if not _is_one_stretch(block):
        raise UnsupportedError(
            f"the KV cache of {layer} keeps a block in several pieces; "
            "set VLLM_KV_CACHE_LAYOUT=LBHNC, or use an attention backend that can have that layout"
        )
    return Region(
        base=cache.data_ptr(),
        num_blocks=cache.shape[0],
        block_bytes=block.numel() * cache.element_size(),
        stride_bytes=cache.stride(0) * cache.element_size(),
    )


def _is_one_stretch(block: Tensor) -> bool:
    """Say whether a block has no gaps, in whichever order its dimensions lie."""
    size = 1
    for stride, length in sorted((block.stride(i), n) for i, n in enumerate(block.shape) if n > 1):
        if stride != size:
            return False
        size *= length
    return True


def register(
    transport: Transport,
    caches: Mapping[str, Tensor],
    layers: Iterable[str],
    staging: Sequence[Span] = (),
) -> RankMemory:
    """Register the storages under the named layers' caches, and the staging memory, of which peers
    read the first span; regions come in the order of the layers."""
    regions = tuple(region_of(layer, caches[layer]) for layer in layers)
    spans = {}
    for cache in caches.values():
        storage = cache.untyped_storage()
        spans[storage.data_ptr()] = storage.nbytes()
    spans |= {span.address: span.num_bytes for span in staging}
    metadata = transport.register(sorted(spans.items()))
    return RankMemory(regions, metadata, staging[0] if staging else None)
