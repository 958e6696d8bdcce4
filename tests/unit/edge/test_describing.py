"""What vLLM says of its KV cache, as our layout: heads of the model, elements, pipeline stages."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_pd_plugin.errors import UnsupportedError
from vllm_pd_plugin.mapping.checks import check_description
from vllm_pd_plugin.mapping.kv_cache import FP8, EngineKvCache, RankPlace
from vllm_pd_plugin.memory.layout import Group, RankMemory, Region

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    import torch
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        MLAAttentionSpec,
        SlidingWindowSpec,
        UniformTypeKVCacheSpecs,
    )

    from vllm_pd_plugin.edge.geometry import describe, place_of

BLOCK, HEADS, WIDTH, MODEL_HEADS, RANK = 16, 2, 64, 8, 96
FULL, WINDOWED = ("layers.0", "layers.2"), ("layers.1", "layers.3")


def config(cache_dtype: str = "auto", scales: dict[str, Any] | None = None) -> Any:
    """vLLM's, of a model whose layers have such scales; 1.0 for both, unless told."""
    layers = {
        layer: SimpleNamespace(**({"_k_scale_float": 1.0, "_v_scale_float": 1.0} | (scales or {})))
        for layer in (*FULL, *WINDOWED)
    }
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=3, tensor_parallel_size=4),
        model_config=SimpleNamespace(
            get_total_num_kv_heads=lambda: MODEL_HEADS,
            hf_text_config=SimpleNamespace(kv_lora_rank=RANK),
        ),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )


def full(dtype: torch.dtype = torch.bfloat16) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=WIDTH, dtype=dtype)


def windowed() -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=BLOCK, num_kv_heads=HEADS, head_size=WIDTH, dtype=torch.bfloat16,
        sliding_window=40,
    )  # fmt: skip


def caches(
    *layers: str, dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] | None = None
) -> dict[str, torch.Tensor]:
    """Caches as a GPU has them, without memory."""
    size = shape or (9, HEADS, BLOCK, 2 * WIDTH)
    return {layer: torch.empty(size, dtype=dtype, device="meta") for layer in layers}


def described(
    vllm_config: Any, views: dict[str, torch.Tensor], *specs: tuple[tuple[str, ...], Any]
) -> tuple[Group, ...]:
    groups = [KVCacheGroupSpec(list(layers), spec) for layers, spec in specs]
    return describe(vllm_config, KVCacheConfig(9, [], groups), views).groups


def test_a_worker_s_place_is_its_stage_and_its_tensor_parallel_rank() -> None:
    place = place_of(config(), 2, 3)
    assert place == RankPlace(2, 3, num_stages=3, tensor_parallel_size=4)
    assert (place.rank, place.num_ranks) == (11, 12)


def test_heads_are_those_of_the_model_and_of_the_rank() -> None:
    (group,) = described(config(), caches(*FULL), (FULL, full()))
    assert (group.heads, group.model_heads) == (HEADS, MODEL_HEADS)
    assert group.channels == (("key", WIDTH), ("value", WIDTH))
    assert [(part.kind, part.width) for part in group.parts] == list(group.channels)
    assert (group.dtype, group.layers) == ("bfloat16", FULL)


def test_all_heads_of_mla_share_one_row() -> None:
    spec = MLAAttentionSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=RANK + 32, dtype=torch.bfloat16
    )
    (group,) = described(config(), caches(*FULL, shape=(9, BLOCK, RANK + 32)), (FULL, spec))
    assert (group.kind, group.heads, group.model_heads) == ("mla", 1, 1)
    assert group.channels == (("latent", RANK), ("rope", 32))
    assert [(part.kind, part.width) for part in group.parts] == list(group.channels)


# --- pipeline stages -------------------------------------------------------------------------


def test_a_stage_has_its_own_layers_of_every_group() -> None:
    first, second = described(
        config(), caches("layers.2", "layers.3"), (FULL, full()), (WINDOWED, windowed())
    )
    assert (first.layers, second.layers) == (("layers.2",), ("layers.3",))
    assert (first.window, second.window) == (None, 40)


@pytest.mark.parametrize("is_uniform", [False, True])
def test_of_a_group_without_layers_a_stage_says_what_its_blocks_are(is_uniform: bool) -> None:
    spec: Any = windowed()
    if is_uniform:
        spec = UniformTypeKVCacheSpecs(
            block_size=BLOCK, kv_cache_specs={layer: windowed() for layer in WINDOWED}
        )
    groups = described(config(), caches(*FULL), (FULL, full()), (WINDOWED, spec))
    assert groups[1] == Group("sliding_window", BLOCK, 40, (), (1,), "")
    region = Region(0, 9, 2 * BLOCK * HEADS * WIDTH * 2, 10_000)
    layout = describe(
        config(),
        KVCacheConfig(9, [], [KVCacheGroupSpec(list(FULL), full()), KVCacheGroupSpec([], spec)])
        if not is_uniform
        else KVCacheConfig(
            9, [], [KVCacheGroupSpec(list(FULL), full()), KVCacheGroupSpec(list(WINDOWED), spec)]
        ),
        caches(*FULL),
    )
    place = RankPlace(0, 0, 3, 4)
    seen = EngineKvCache.seen_by_rank(layout, RankMemory((region, region), b""), place)
    check_description(seen, "our")
    assert seen.layers_of(0) == list(FULL)


def test_a_kind_that_is_not_supported_is_refused_on_stages_without_it_too() -> None:
    spec: Any = SimpleNamespace(block_size=BLOCK)
    with pytest.raises(UnsupportedError, match="kind SimpleNamespace"):
        described(config(), caches(*FULL), (FULL, full()), (WINDOWED, spec))


# --- caches of bytes ---------------------------------------------------------------------------


def of_bytes(cache_dtype: str, scales: dict[str, Any] | None = None) -> Group:
    views = caches(*FULL, dtype=torch.uint8)
    (group,) = described(config(cache_dtype, scales), views, (FULL, full(torch.uint8)))
    return group


@pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_e4m3"])
def test_fp8_without_scales_can_be_taken_apart(cache_dtype: str) -> None:
    group = of_bytes(cache_dtype)
    assert group.dtype == FP8
    assert len(group.parts) == 2
    assert not group.is_encodable


@pytest.mark.parametrize(
    "scales",
    [{"_k_scale_float": 0.5}, {"_v_scale_float": 2.0}, {"_v_scale_float": None}],
    ids=str,
)
def test_fp8_with_scales_is_moved_as_it_is(scales: dict[str, Any]) -> None:
    group = of_bytes("fp8", scales)
    assert (group.dtype, group.parts) == ("fp8_e4m3 with scales", ())


def test_fp8_of_layers_that_nobody_knows_is_moved_as_it_is() -> None:
    vllm_config = config("fp8")
    del vllm_config.compilation_config.static_forward_context["layers.2"]
    views = caches(*FULL, dtype=torch.uint8)
    (group,) = described(vllm_config, views, (FULL, full(torch.uint8)))
    assert (group.dtype, group.parts) == ("fp8_e4m3 with scales", ())


def test_bytes_of_another_meaning_are_moved_as_they_are() -> None:
    group = of_bytes("fp8_e5m2")
    assert (group.dtype, group.parts) == ("uint8 (fp8_e5m2)", ())
