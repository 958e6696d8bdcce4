"""KV caches as vLLM lays them out, where its kernels have smaller blocks than its block tables."""

from __future__ import annotations

import ctypes
import warnings

import pytest

from vllm_pd_plugin.errors import UnsupportedError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    import torch
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        KVCacheTensor,
        MLAAttentionSpec,
        compute_layout_strides,
        create_kv_cache_views,
    )
    from vllm.v1.kv_cache_layout import KVCacheLayout

    from vllm_pd_plugin.edge.geometry import block_views
    from vllm_pd_plugin.memory.regions import region_of

NUM_BLOCKS = 10
LAYERS = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")
HEADS = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=8, dtype=torch.float32)
LATENT = MLAAttentionSpec(block_size=128, num_kv_heads=1, head_size=8, dtype=torch.float32)
TABLES = ((3, 7, 1), (2, 9, 4))
"""The same prompt's blocks in two engines."""


class Cache:
    """The KV cache of an engine, in one buffer, and what a kernel sees of it."""

    def __init__(
        self, spec: FullAttentionSpec, layout: KVCacheLayout, kernel_tokens: int | None
    ) -> None:
        num_layers = len(LAYERS)
        of_layer, of_block, *_ = compute_layout_strides(spec, NUM_BLOCKS, num_layers, layout)
        self.raw = torch.zeros(NUM_BLOCKS * num_layers * spec.page_size_bytes, dtype=torch.int8)
        tensor = KVCacheTensor(
            size=self.raw.numel(), layers=list(LAYERS), layer_stride=of_layer,
            block_stride=of_block, offset=0,
        )  # fmt: skip
        views = create_kv_cache_views(
            self.raw, spec, NUM_BLOCKS, layout, tensor, kernel_block_size=kernel_tokens
        )
        self.config = KVCacheConfig(NUM_BLOCKS, [tensor], [KVCacheGroupSpec(list(LAYERS), spec)])
        self.kernel_views = dict(zip(LAYERS, views, strict=True))
        self.views = block_views(self.config, self.kernel_views)

    def token(self, layer: str, table: tuple[int, ...], position: int) -> torch.Tensor:
        """Return a token's row, ``[heads, channels]``, where a kernel looks for it."""
        cache = self.kernel_views[layer]
        tokens = cache.shape[2]
        per_block = cache.shape[0] // NUM_BLOCKS
        place = table[position // (tokens * per_block)] * per_block
        place += position // tokens % per_block
        return cache[place, :, position % tokens]


def copy_blocks(source: Cache, target: Cache) -> None:
    """Do what a handoff does: copy each block of the table, as its region says."""
    for layer in LAYERS:
        here, there = (region_of(layer, each.views[layer]) for each in (source, target))
        assert here.num_blocks == there.num_blocks == NUM_BLOCKS
        for one, other in zip(*TABLES, strict=True):
            ctypes.memmove(there.address(other), here.address(one), here.block_bytes)


@pytest.mark.parametrize("kernel_tokens", [None, 128, 64, 32, 16])
@pytest.mark.parametrize(
    ("spec", "layout"),
    [
        (HEADS, KVCacheLayout.LBHNC),
        (HEADS, KVCacheLayout.LBNHC),
        (LATENT, KVCacheLayout.LBHNC),
        (LATENT, KVCacheLayout.LBNHC),
    ],
    ids=["heads first", "tokens first", "latent", "latent, tokens first"],
)
def test_every_token_is_where_the_other_engine_s_kernels_look_for_it(
    spec: FullAttentionSpec, layout: KVCacheLayout, kernel_tokens: int | None
) -> None:
    source, target = (Cache(spec, layout, kernel_tokens) for _ in range(2))
    positions = range(len(TABLES[0]) * spec.block_size)
    for number, layer in enumerate(LAYERS):
        for position in positions:
            row = source.token(layer, TABLES[0], position)
            row.copy_(torch.arange(row.numel()).view(row.shape) + 100 * position + number / 8)
    copy_blocks(source, target)
    for layer in LAYERS:
        for position in positions:
            expected = source.token(layer, TABLES[0], position)
            assert torch.equal(target.token(layer, TABLES[1], position), expected)
    used = set(TABLES[1])
    for layer in LAYERS:
        others = [target.views[layer][block] for block in range(NUM_BLOCKS) if block not in used]
        assert not any(other.any() for other in others)


@pytest.mark.parametrize("kernel_tokens", [64, 16])
def test_a_view_of_whole_blocks_has_all_tokens_where_a_token_s_heads_lie_together(
    kernel_tokens: int,
) -> None:
    """So that codecs know which row is which token's."""
    cache = Cache(HEADS, KVCacheLayout.LBNHC, kernel_tokens)
    for view in cache.views.values():
        assert view.shape[:3] == (NUM_BLOCKS, 2, 128)


def test_blocks_that_kernels_share_no_whole_number_of_are_refused() -> None:
    cache = Cache(HEADS, KVCacheLayout.LBHNC, None)
    layer = LAYERS[0]
    with pytest.raises(UnsupportedError, match="--block-size"):
        block_views(cache.config, {layer: cache.kernel_views[layer][:-1]})


def test_blocks_with_gaps_between_their_parts_are_refused() -> None:
    cache = Cache(HEADS, KVCacheLayout.LBHNC, None)
    layer = LAYERS[0]
    gaps = torch.zeros(4 * NUM_BLOCKS, 2, 64, 16)[::2]
    with pytest.raises(UnsupportedError, match="strides"):
        block_views(cache.config, {layer: gaps})
