"""KV caches as vLLM lays them out, also where its kernels have smaller blocks than its block
tables."""

from __future__ import annotations

import importlib.metadata
import warnings
from pathlib import Path

import pytest

from vllm_pd_plugin.errors import UnsupportedError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    import torch
    from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, MLAAttentionSpec
    from vllm.v1.kv_cache_layout import KVCacheLayout

    from tests import kv_caches
    from tests.kv_caches import LAYERS, NUM_BLOCKS, Cache, outcome
    from vllm_pd_plugin.edge.geometry import block_views

PAGE = Path(__file__).parents[3] / "docs" / "compatibility.md"
HEADS = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=8, dtype=torch.float32)
LATENT = MLAAttentionSpec(block_size=128, num_kv_heads=1, head_size=8, dtype=torch.float32)


@pytest.mark.parametrize("kernel_tokens", [None, 128, 64, 32, 16])
@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC])
@pytest.mark.parametrize("spec", [HEADS, LATENT], ids=["heads", "latent"])
def test_every_token_is_where_the_other_engine_s_kernels_look_for_it(
    spec: AttentionSpec, layout: KVCacheLayout, kernel_tokens: int | None
) -> None:
    assert outcome(spec, layout, kernel_tokens) == "right"


def test_a_layer_that_is_addressed_by_kernel_blocks_would_be_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the trial is worth: without our views of whole blocks it finds the wrong ones."""

    def first_blocks(_: object, caches: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {layer: cache[:NUM_BLOCKS] for layer, cache in caches.items()}

    monkeypatch.setattr(kv_caches, "block_views", first_blocks)
    assert outcome(HEADS, KVCacheLayout.LBHNC, None) == "right"
    assert outcome(HEADS, KVCacheLayout.LBHNC, 64) == "wrong"


@pytest.mark.parametrize("kernel_tokens", [64, 16])
def test_a_view_of_whole_blocks_has_all_tokens_where_a_token_s_heads_lie_together(
    kernel_tokens: int,
) -> None:
    """So that codecs know which row is which token's."""
    cache = Cache(HEADS, KVCacheLayout.LBNHC, kernel_tokens)
    for view in block_views(cache.config, cache.kernel_views).values():
        assert view.shape[:3] == (NUM_BLOCKS, 2, 128)


def test_what_is_no_whole_number_of_blocks_is_refused() -> None:
    cache = Cache(HEADS, KVCacheLayout.LBHNC)
    layer = LAYERS[0]
    with pytest.raises(UnsupportedError, match="--block-size"):
        block_views(cache.config, {layer: cache.kernel_views[layer][:-1]})


def test_blocks_with_gaps_between_their_parts_are_refused() -> None:
    gaps = torch.zeros(4 * NUM_BLOCKS, 2, 64, 16)[::2]
    cache = Cache(HEADS, KVCacheLayout.LBHNC)
    with pytest.raises(UnsupportedError, match="strides"):
        block_views(cache.config, {LAYERS[0]: gaps})


@pytest.mark.skipif(
    not importlib.metadata.version("vllm").startswith("0.32."), reason="the page is of vLLM 0.32"
)
def test_every_attention_backend_is_handed_off_right_or_refused_as_the_page_says() -> None:
    """`make compatibility` writes it."""
    page = kv_caches.page()
    assert "WRONG" not in page
    assert page.count("handed off |") > 20
    assert PAGE.read_text() == page


@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.BLHNC])
def test_a_layer_that_is_not_where_the_configuration_puts_it_is_refused(
    layout: KVCacheLayout,
) -> None:
    cache = Cache(HEADS, layout)
    caches = dict(cache.kernel_views)
    assert block_views(cache.config, caches)
    elsewhere = {**caches, LAYERS[1]: caches[LAYERS[1]].clone()}
    with pytest.raises(UnsupportedError, match=f"{LAYERS[1]} lies .* after that of {LAYERS[0]}"):
        block_views(cache.config, elsewhere)
    swapped = {**caches, LAYERS[0]: caches[LAYERS[1]], LAYERS[1]: caches[LAYERS[0]]}
    with pytest.raises(UnsupportedError, match="in a way of its own"):
        block_views(cache.config, swapped)


def test_blocks_that_are_further_apart_than_the_configuration_says_are_refused() -> None:
    cache = Cache(HEADS, KVCacheLayout.LBHNC)
    cache.config.kv_cache_tensors[0].block_stride *= 2
    with pytest.raises(UnsupportedError, match="bytes apart"):
        block_views(cache.config, cache.kernel_views)
