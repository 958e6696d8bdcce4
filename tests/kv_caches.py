"""KV caches on CPU memory, as vLLM's model runner lays them out for any attention backend, and a
handoff between two of them.

    python -m tests.kv_caches > docs/compatibility.md
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import sys
import warnings
from collections.abc import Iterator, Sequence

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    import torch
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.kv_cache_interface import (
        AttentionSpec,
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        KVCacheTensor,
        MLAAttentionSpec,
        SlidingWindowSpec,
        compute_layout_strides,
        create_kv_cache_views,
    )
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.utils import select_common_block_size

    from tests.matrix.page import section
    from vllm_pd_plugin.edge.geometry import block_views
    from vllm_pd_plugin.errors import UnsupportedError
    from vllm_pd_plugin.memory.regions import region_of

NUM_BLOCKS = 10
LAYERS = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")
BLOCK_SIZES = (16, 32, 64, 128, 256)
TABLES = ((3, 7, 1), (2, 9, 4))
"""The same prompt's blocks in two engines."""


class Cache:
    """One engine's KV cache: a buffer for all layers, and what a kernel sees of it.

    kernel_tokens: in a block of the attention kernels; None: as in one of the block tables.
    """

    def __init__(
        self, spec: AttentionSpec, layout: KVCacheLayout, kernel_tokens: int | None = None
    ) -> None:
        num_layers = len(LAYERS)
        of_layer, of_block, *_ = compute_layout_strides(spec, NUM_BLOCKS, num_layers, layout)
        self.raw = torch.zeros(NUM_BLOCKS * num_layers * spec.page_size_bytes, dtype=torch.int8)
        tensor = KVCacheTensor(
            size=self.raw.numel(), layers=list(LAYERS), layer_stride=of_layer,
            block_stride=of_block, offset=0,
        )  # fmt: skip
        kernel_views = create_kv_cache_views(
            self.raw, spec, NUM_BLOCKS, layout, tensor, kernel_block_size=kernel_tokens
        )
        self.config = KVCacheConfig(NUM_BLOCKS, [tensor], [KVCacheGroupSpec(list(LAYERS), spec)])
        self.kernel_views = dict(zip(LAYERS, kernel_views, strict=True))

    def rows(self, layer: str, table: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return in which kernel block, and where there, each token of a prompt is."""
        cache = self.kernel_views[layer]
        tokens, ratio = cache.shape[2], cache.shape[0] // NUM_BLOCKS
        blocks = torch.tensor([block * ratio + part for block in table for part in range(ratio)])
        return blocks.repeat_interleave(tokens), torch.arange(tokens).repeat(len(blocks))

    def write(self, layer: str, table: Sequence[int], kv: torch.Tensor) -> None:
        """Write a prompt's KV, ``[tokens, heads, channels]``, where a kernel would."""
        blocks, places = self.rows(layer, table)
        self.kernel_views[layer][blocks, :, places] = kv

    def read(self, layer: str, table: Sequence[int]) -> torch.Tensor:
        """Return a prompt's KV as a kernel would find it."""
        blocks, places = self.rows(layer, table)
        return self.kernel_views[layer][blocks, :, places]

    def pattern(self, layer: str, table: Sequence[int], seed: int) -> torch.Tensor:
        """Return KV for a prompt that no other seed gives."""
        shape = self.read(layer, table).shape
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randint(1, 120, shape, generator=generator)
        return numbers.to(self.kernel_views[layer].dtype)


def hand_off(source: Cache, target: Cache) -> None:
    """Copy a prompt's blocks as our regions say where they are. Raises UnsupportedError."""
    views = [block_views(each.config, each.kernel_views) for each in (source, target)]
    for layer in LAYERS:
        here, there = (region_of(layer, of[layer]) for of in views)
        assert here.num_blocks == there.num_blocks == NUM_BLOCKS
        for one, other in zip(*TABLES, strict=True):
            ctypes.memmove(there.address(other), here.address(one), here.block_bytes)


def outcome(spec: AttentionSpec, layout: KVCacheLayout, kernel_tokens: int | None) -> str:
    """Hand a prompt off between two such caches; return "right", "wrong" or why it is refused."""
    source, target = (Cache(spec, layout, kernel_tokens) for _ in range(2))
    written = {}
    for seed, layer in enumerate(LAYERS):
        written[layer] = source.pattern(layer, TABLES[0], seed)
        source.write(layer, TABLES[0], written[layer])
    try:
        hand_off(source, target)
    except UnsupportedError as refusal:
        return str(refusal)
    for layer in LAYERS:
        if not torch.equal(target.read(layer, TABLES[1]), written[layer]):
            return "wrong"
        others = sorted(set(range(NUM_BLOCKS)) - set(TABLES[1]))
        if target.read(layer, others).any():
            return "wrong"
    return "right"


# --- every attention backend of vLLM ---------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """A KV cache that a backend can have. outcome: see ``outcome``."""

    kind: str
    layout: str
    block_tokens: int
    kernel_tokens: int
    outcome: str

    @property
    def verdict(self) -> str:
        """What the table says."""
        if self.outcome == "wrong":
            return "WRONG"
        if self.outcome == "right":
            return "handed off"
        if "keeps a block in several pieces" in self.outcome:
            return "refused: a block lies in several pieces"
        return f"refused: {self.outcome}"

    @property
    def size(self) -> str:
        if self.kernel_tokens == self.block_tokens:
            return str(self.block_tokens)
        return f"{self.block_tokens} in {self.kernel_tokens}"


def backends() -> tuple[dict[str, type[AttentionBackend]], dict[str, str]]:
    """Return those that import on this machine, and why others do not."""
    found: dict[str, type[AttentionBackend]] = {}
    missing: dict[str, str] = {}
    for member in AttentionBackendEnum:
        if not member.value:
            continue
        try:
            found[member.name] = member.get_class()
        except Exception as error:  # noqa: BLE001  (anything that an import may raise)
            missing[member.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, missing


def specs(backend: type[AttentionBackend], block_size: int) -> Iterator[AttentionSpec]:
    if backend.is_mla():
        yield MLAAttentionSpec(
            block_size=block_size, num_kv_heads=1, head_size=576, dtype=torch.bfloat16
        )
        return
    shape = {"block_size": block_size, "num_kv_heads": 2, "head_size": 64}
    yield FullAttentionSpec(**shape, dtype=torch.bfloat16)
    if backend.supports_sliding_window():
        yield SlidingWindowSpec(**shape, dtype=torch.bfloat16, sliding_window=256)


def trials(backend: type[AttentionBackend]) -> Iterator[Trial]:
    """Try every layout and block size that a backend, and vLLM with it, can have."""
    layouts = backend.supported_kv_cache_layouts() or tuple(KVCacheLayout)
    for layout, block_size in itertools.product(layouts, BLOCK_SIZES):
        for plain in specs(backend, block_size):
            spec = backend.customize_spec(plain)
            try:
                kernel = select_common_block_size(block_size, [backend], [spec])
                result = _outcome_of_equal(spec, layout, kernel)
            except ValueError:
                continue  # vLLM itself refuses the block size, in this layout
            kind = {"MLAAttentionSpec": "MLA", "FullAttentionSpec": "full"}
            name = kind.get(type(plain).__name__, "sliding window")
            yield Trial(name, layout.name, block_size, kernel, result)


_known: dict[tuple[object, ...], str] = {}


def _outcome_of_equal(spec: AttentionSpec, layout: KVCacheLayout, kernel: int) -> str:
    """Backends that want the same memory get the same: it need not be tried again."""
    key = (
        spec.num_heads, spec.block_size, spec.get_num_kernel_states(kernel),
        spec.state_content_size_bytes, spec.page_size_bytes, spec.dtype, layout, kernel,
    )  # fmt: skip
    if key not in _known:
        _known[key] = outcome(spec, layout, kernel)
    return _known[key]


HEAD = """# Compatibility

## Attention backends

What vLLM's attention backends make of a KV cache, and whether it can be handed off. Written by
`make compatibility`; a unit test does the same, and fails where this page says otherwise.

For each backend of vLLM that imports without a GPU, and each layout that it can have, two KV caches
are laid out in CPU memory as vLLM's model runner does it, with block sizes from 16 to 256 and the
kernel block size that vLLM chooses for each. One gets a prompt's KV where a kernel of that backend
would write it, its blocks are copied as our regions say where they are, and the other is read as a
kernel would. No kernel runs, and nothing here was run on a GPU.

*Handed off* means that every element was where the other engine looks for it, and that no other
block was touched; *refused*, that an engine says so at its start. `128 in 64` is a block size of
128 tokens whose kernels have blocks of 64: raw KV only, where a head's tokens lie together in each.

| backend | KV cache | layouts | block sizes | outcome |
| --- | --- | --- | --- | --- |
"""
TAIL = """
Between two engines layout, block size and strides may differ where it is known what is in a page
([mapping](mapping.md)); `128 in 64` is known where a head's tokens of all small blocks lie in one
row, and else has to be the same on both. Where vLLM offers a choice, `VLLM_KV_CACHE_LAYOUT` takes a
layout's name. These do not import on a machine without their GPU or libraries, and were
not tried: """


def page() -> str:
    """Return ``docs/compatibility.md``."""
    found, missing = backends()
    lines = [line for name, backend in found.items() for line in lines_of(name, backend)]
    names = ", ".join(f"`{name}`" for name in missing)
    return f"{HEAD}{''.join(lines)}{TAIL}{names}.\n{section()}"


def lines_of(name: str, backend: type[AttentionBackend]) -> list[str]:
    """Return a backend's rows of the table; what has the same outcome shares one."""
    sizes: dict[tuple[str, str, str], list[str]] = {}
    for trial in trials(backend):
        sizes.setdefault((trial.kind, trial.layout, trial.verdict), []).append(trial.size)
    layouts: dict[tuple[str, str, str], list[str]] = {}
    for (kind, layout, verdict), found in sizes.items():
        layouts.setdefault((kind, ", ".join(found), verdict), []).append(f"`{layout}`")
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for (kind, found, verdict), named in layouts.items():
        kinds.setdefault((", ".join(named), found, verdict), []).append(kind)
    return [
        f"| `{name}` | {', '.join(of)} | {named} | {found} | {verdict} |\n"
        for (named, found, verdict), of in kinds.items()
    ]


if __name__ == "__main__":
    sys.stdout.write(page())
