"""What vLLM says of its KV cache, as our layout; refuses what is not supported yet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vllm.platforms import current_platform
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_pd_plugin.codecs.codec import FLOATS, Codec, Part
from vllm_pd_plugin.codecs.cpu_layout import parts_of_cpu_kernel
from vllm_pd_plugin.errors import UnsupportedError
from vllm_pd_plugin.mapping.kv_cache import FP8, RankPlace
from vllm_pd_plugin.memory.layout import Group, GroupKind, RankLayout

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager

_SINGLE = (
    ("decode_context_parallel_size", "--decode-context-parallel-size"),
    ("prefill_context_parallel_size", "--prefill-context-parallel-size"),
)


_DEVICES = ("cpu", "cuda")
_MAX_PORT = 65535


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Refuse a configuration that pdplugin cannot serve, before anything is loaded.

    Raises:
        UnsupportedError: names the option and what is allowed.
    """
    parallel = vllm_config.parallel_config
    for name, flag in _SINGLE:
        size = getattr(parallel, name, 1)
        if size != 1:
            raise UnsupportedError(
                f"{flag}={size} is not supported by pdplugin yet; use 1 "
                "(tensor, pipeline and data parallelism are)"
            )
    staged = parallel.pipeline_parallel_size > 1
    is_old_ray = os.environ.get("VLLM_USE_RAY_V2_EXECUTOR_BACKEND") == "0"
    if staged and is_old_ray and parallel.distributed_executor_backend == "ray":
        raise UnsupportedError(
            "--pipeline-parallel-size with VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0 is not supported by "
            "pdplugin: that executor tells of the last stage only; leave the variable out, or use "
            "--distributed-executor-backend mp"
        )
    model = vllm_config.model_config
    if model is not None and (model.is_encoder_decoder or model.is_attention_free):
        raise UnsupportedError(
            f"model={model.model!r} is not supported by pdplugin: it needs a decoder-only model "
            "with attention"
        )
    if parallel.use_ubatching:
        raise UnsupportedError(
            "--enable-dbo and --ubatch-size are not supported by pdplugin: a layer would count as "
            "written when half of its batch is; leave them out"
        )
    remaps = ("enable_sleep_mode", "enable_cumem_allocator")
    if flag := next((name for name in remaps if getattr(model, name, False)), ""):
        raise UnsupportedError(
            f"--{flag.replace('_', '-')} is not supported by pdplugin: what peers read would be "
            "other memory after a wake-up; leave it out"
        )
    device = getattr(vllm_config.device_config, "device_type", "cpu")
    if device not in _DEVICES:
        raise UnsupportedError(
            f"device type {device!r} is not supported by pdplugin: it is not known when its KV is "
            f"written; supported are {', '.join(_DEVICES)} (ROCm is cuda to PyTorch)"
        )
    if vllm_config.speculative_config is not None:
        method = vllm_config.speculative_config.method
        if method != "ngram":
            raise UnsupportedError(
                f"--speculative-config method={method!r} is not supported by pdplugin yet; "
                "use ngram, or none"
            )


def control_port(vllm_config: VllmConfig, port: int) -> int:
    """Return the port that this engine core's control channel binds: each data parallel rank has
    one of its own, counted from ``port``; 0 stays any free one.

    Raises:
        UnsupportedError: there are not as many.
    """
    parallel = vllm_config.parallel_config
    highest = _MAX_PORT + 1 - parallel.data_parallel_size
    if port > highest:
        raise UnsupportedError(
            f"port={port} leaves none for each of --data-parallel-size="
            f"{parallel.data_parallel_size} engines; use {highest} or less, or port=0, so that "
            "each picks a free one"
        )
    return port + parallel.data_parallel_index if port else 0


def refuse_unsupported_cache(config: KVCacheConfig) -> None:
    """Refuse kinds of KV cache that cannot be handed off yet. Raises UnsupportedError."""
    for group in config.kv_cache_groups:
        for spec in _specs(group):
            _kind(spec)


def block_views(
    config: KVCacheConfig, caches: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return each layer's KV cache with one block of vLLM's block tables in each row of its first
    dimension.

    caches: as vLLM's attention backends see them, ``[blocks, heads, tokens, channels]``. Their
        kernels may have smaller blocks than the tables, some of which then make one: side by side
        in memory, as ``create_kv_cache_views`` in vLLM demands. A view of a whole one has more
        tokens, or, where a head's tokens lie together in each small one, more heads.

    Raises:
        UnsupportedError: the blocks of a table are not made of them so.
    """
    num_blocks = {
        layer: config.num_blocks_of(tensor)
        for tensor in config.kv_cache_tensors
        for layer in tensor.layers
    }
    # A layer that shares another's cache has no tensor of its own.
    views = {
        layer: _block_view(layer, cache, num_blocks.get(layer, config.num_blocks))
        for layer, cache in caches.items()
    }
    _check_places(config, views)
    return views


def _check_places(config: KVCacheConfig, views: Mapping[str, torch.Tensor]) -> None:
    """Compare where the blocks lie with where vLLM's configuration puts them: block ``b`` of layer
    ``l`` of a tensor at ``l * layer_stride + b * block_stride`` (``KVCacheTensor``).

    Raises:
        UnsupportedError: a layer is not there.
    """
    for tensor in config.kv_cache_tensors:
        first = views.get(tensor.layers[0])
        for number, layer in enumerate(tensor.layers):
            view = views.get(layer)
            if first is None or view is None:
                continue
            found = view.data_ptr() - first.data_ptr(), view.stride(0) * view.element_size()
            if found != (number * tensor.layer_stride, tensor.block_stride):
                raise UnsupportedError(
                    f"the KV cache of {layer} lies {found[0]} bytes after that of "
                    f"{tensor.layers[0]}, and its blocks {found[1]} bytes apart; vLLM's own "
                    f"configuration says {number * tensor.layer_stride} and "
                    f"{tensor.block_stride}: the attention backend lays it out in a way of its "
                    "own; choose another one with --attention-backend, or another "
                    "VLLM_KV_CACHE_LAYOUT"
                )


def _block_view(layer: str, cache: torch.Tensor, num_blocks: int) -> torch.Tensor:
    ratio, rest = divmod(cache.shape[0], num_blocks)
    if not rest and ratio == 1:
        return cache
    if not rest and ratio and cache.dim() == 4:
        _, heads, tokens, channels = cache.shape
        of_block, of_head, of_token, of_channel = cache.stride()
        strides = (ratio * of_block, of_head, of_token, of_channel)
        if of_block == tokens * of_token:
            return cache.as_strided((num_blocks, heads, ratio * tokens, channels), strides)
        if of_block == heads * of_head:
            return cache.as_strided((num_blocks, ratio * heads, tokens, channels), strides)
    raise UnsupportedError(
        f"the KV cache of {layer} has shape {tuple(cache.shape)} and strides {cache.stride()} for "
        f"{num_blocks} blocks; use a --block-size that the attention backend's kernels have"
    )


def describe(
    vllm_config: VllmConfig, config: KVCacheConfig, caches: Mapping[str, torch.Tensor]
) -> RankLayout:
    """Return this rank's layout, one group for each of vLLM's KV cache groups; a pipeline stage may
    have no layers of one.

    caches: see ``block_views``.

    Raises:
        UnsupportedError: a group mixes blocks of several shapes.
    """
    groups = []
    for group in config.kv_cache_groups:
        specs = dict(zip(group.layer_names, _specs(group), strict=True))
        layers = tuple(name for name in group.layer_names if name in caches)
        if not layers:
            groups.append(_without_layers(group))
            continue
        shapes = {(caches[name].shape[1:], caches[name].stride()[1:]) for name in layers}
        spec = specs[layers[0]]
        kind, window = _kind(spec)
        if len(shapes) != 1:
            raise UnsupportedError(
                f"a KV cache group with blocks of {len(shapes)} shapes is not supported yet; "
                "use a model whose layers have equal KV heads"
            )
        shape, strides = shapes.pop()
        parts = _parts(vllm_config, spec, caches[layers[0]])
        dtype = str(caches[layers[0]].dtype).removeprefix("torch.")
        if dtype not in FLOATS:
            dtype, parts = _of_bytes(vllm_config, layers, dtype, parts)
        groups.append(
            Group(
                kind=kind,
                block_tokens=spec.block_size,
                window=window,
                layers=layers,
                block_shape=tuple(shape),
                dtype=dtype,
                block_strides=tuple(strides),
                parts=parts,
                model_heads=_model_heads(vllm_config, spec, shape[0] if len(shape) > 2 else 1),
                channels=_channels(vllm_config, spec),
            )
        )
    return RankLayout(tuple(groups))


def place_of(vllm_config: VllmConfig, stage: int, tensor_parallel_rank: int) -> RankPlace:
    """Return which rank of this engine a worker is."""
    parallel = vllm_config.parallel_config
    return RankPlace(
        stage,
        tensor_parallel_rank,
        parallel.pipeline_parallel_size,
        parallel.tensor_parallel_size,
    )


def _without_layers(group: KVCacheGroupSpec) -> Group:
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        spec = next(iter(spec.kv_cache_specs.values()))
    kind, window = _kind(spec)
    return Group(kind, spec.block_size, window, (), (1,), "")


def _model_heads(vllm_config: VllmConfig, spec: KVCacheSpec, heads: int) -> int:
    """Return how many KV heads the whole model has, in the layers of a group.

    heads: on this rank. Layers that do not have what the configuration says of all are taken to be
        divided, and not repeated.
    """
    if isinstance(spec, MLAAttentionSpec):
        return 1
    total = int(vllm_config.model_config.get_total_num_kv_heads())
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    return total if heads == max(1, total // tp_size) else heads * tp_size


def _of_bytes(
    vllm_config: VllmConfig, layers: Sequence[str], dtype: str, parts: tuple[Part, ...]
) -> tuple[str, tuple[Part, ...]]:
    """Return what a cache of bytes is, and whether what is in it can be taken apart: fp8 without
    scales. Where there are some, blocks are moved as they are."""
    name = vllm_config.cache_config.cache_dtype
    if name not in ("fp8", "fp8_e4m3"):
        return f"{dtype} ({name})", ()
    layer_of = vllm_config.compilation_config.static_forward_context
    scales = [
        getattr(layer_of.get(layer), f"_{kind}_scale_float", None)
        for layer in layers
        for kind in ("k", "v")
    ]
    if current_platform.is_fp8_fnuz():
        return f"{FP8}fnuz", ()
    return (FP8, parts) if set(scales) == {1.0} else (f"{FP8} with scales", ())


def refuse_unencodable(layout: RankLayout, narrowest: Codec) -> None:
    """Refuse lossy codecs for a KV cache that they cannot write down. Raises UnsupportedError."""
    for group in layout.groups:
        if narrowest is not Codec.RAW and group.layers and not group.is_encodable:
            raise UnsupportedError(
                f"codec or lossy_max {narrowest} cannot be used with a KV cache of {group.dtype} "
                f"and shape {group.block_shape}; use codec=raw, or a cache of float32, bfloat16 or "
                "float16"
            )


def retain_recomputed_token(manager: KVCacheManager) -> None:
    """Keep one token more in every sliding window, on both engines.

    A consumer computes the last of n tokens again, and that token's window begins at token
    n - window. vLLM drops a block once the window of token n has left it, so where token
    n - window is the last of its block, the producer would no longer have what is needed.
    """
    for group in manager.coordinator.single_type_managers:
        if isinstance(group, SlidingWindowManager):
            group.extra_retained_tokens = max(1, group.extra_retained_tokens)


def _specs(group: KVCacheGroupSpec) -> list[KVCacheSpec]:
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return [spec.kv_cache_specs[name] for name in group.layer_names]
    return [spec] * len(group.layer_names)


def _kind(spec: KVCacheSpec) -> tuple[GroupKind, int | None]:
    if type(spec) is FullAttentionSpec:
        return "full", None
    if type(spec) is MLAAttentionSpec:
        return "mla", None
    if type(spec) is SlidingWindowSpec:
        return "sliding_window", spec.sliding_window
    raise UnsupportedError(
        f"KV cache of kind {type(spec).__name__} is not supported by pdplugin yet; "
        "supported are full attention, MLA and sliding windows"
    )


def _channels(vllm_config: VllmConfig, spec: KVCacheSpec) -> tuple[tuple[str, int], ...]:
    """Return what a head has of a token."""
    if isinstance(spec, MLAAttentionSpec):
        rank = getattr(vllm_config.model_config.hf_text_config, "kv_lora_rank", None) or 0
        return ("latent", rank), ("rope", spec.head_size - rank)
    return ("key", spec.head_size), ("value", spec.head_size_v)


def _parts(vllm_config: VllmConfig, spec: KVCacheSpec, cache: torch.Tensor) -> tuple[Part, ...]:
    """Return what a head keeps in a block of this cache; nothing where that is not known.

    In vLLM 0.32 a cache's last dimension has a head's key and then its value, for every attention
    backend (``v1/kv_cache_layout.py``); MLA's has the latent and then the rotary key. The CPU
    backend takes only the size from that.
    """
    channels, stride = cache.shape[-1], cache.stride(-2)
    if cache.shape[-2] != spec.block_size:
        return ()  # it is not known which row is which token's
    if isinstance(spec, MLAAttentionSpec):
        rank = getattr(vllm_config.model_config.hf_text_config, "kv_lora_rank", None)
        if not rank or not 0 < rank < channels:
            return ()
        return (
            Part.of_rows("latent", rank, 0, stride),
            Part.of_rows("rope", channels - rank, rank, stride),
        )
    key, value = spec.head_size, spec.head_size_v
    if key + value != channels:
        return ()
    if cache.device.type == "cpu":
        return _parts_on_cpu(vllm_config, cache, key) if key == value else ()
    return Part.of_rows("key", key, 0, stride), Part.of_rows("value", value, key, stride)


def _parts_on_cpu(vllm_config: VllmConfig, cache: torch.Tensor, width: int) -> tuple[Part, ...]:
    """Return how the CPU backend's kernels keep a head's keys, and then its values, in a block."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    tokens = cache.shape[-2]
    kernel = _get_attn_isa(
        vllm_config.model_config.dtype, tokens, width, vllm_config.cache_config.cache_dtype
    )
    return parts_of_cpu_kernel(kernel, tokens, width)
