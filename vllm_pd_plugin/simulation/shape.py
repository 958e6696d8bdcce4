"""How a simulated engine is set up, in vLLM's own types."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)

from vllm_pd_plugin.memory.layout import Group, RankLayout
from vllm_pd_plugin.simulation.memory import CELL_BYTES

MAX_TOKENS = 256
"""Of one request."""

_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer", "both": "kv_both"}
_MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 32, "num_hidden_layers": 3, "vocab_size": 1000,
    "max_position_embeddings": MAX_TOKENS,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Pace:
    """How long a step takes, and how long an engine that only waits rests between two."""

    step_s: float = 0.008
    token_s: float = 0.0005
    min_rest_s: float = 0.004
    max_rest_s: float = 0.256


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """role: ``prefill``, ``decode`` or ``both``. options: of ``PdConfig``.

    window: of a second KV cache group with a sliding window; None: there is none.
    recomputes: vLLM's ``kv_load_failure_policy`` is ``recompute``.
    step_tokens: what a step computes at the most.
    hash_s: how long after its start it has read all of its weights; None: it does not.
    """

    role: str
    num_blocks: int
    block_tokens: int = 4
    ranks: int = 1
    window: int | None = None
    recomputes: bool = False
    step_tokens: int = 16
    max_requests: int = 8
    hash_s: float | None = None
    pace: Pace = Pace()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def layout(self) -> RankLayout:
        return _layout(self.block_tokens, self.window)

    def kv_cache_config(self) -> KVCacheConfig:
        return _kv_cache_config(self.num_blocks, self.block_tokens, self.window)

    def vllm_config(self, engine_id: str, **extra: Any) -> VllmConfig:
        """Return vLLM's configuration; ``extra`` goes to the connector."""
        config = copy.copy(
            _vllm_config(self.role, self.recomputes, self.step_tokens, self.max_requests)
        )
        config.scheduler_config = copy.copy(config.scheduler_config)
        config.scheduler_config.async_scheduling = False
        config.kv_transfer_config = copy.copy(config.kv_transfer_config)
        config.kv_transfer_config.engine_id = engine_id
        config.kv_transfer_config.kv_connector_extra_config = extra
        return config


@functools.cache
def _layout(block_tokens: int, window: int | None) -> RankLayout:
    shape = (block_tokens, CELL_BYTES)
    groups = [Group("full", block_tokens, None, ("layers.0", "layers.2"), shape, "uint8")]
    if window is not None:
        layers = ("layers.1", "layers.3")
        groups.append(Group("sliding_window", block_tokens, window, layers, shape, "uint8"))
    return RankLayout(tuple(groups))


@functools.cache
def _kv_cache_config(num_blocks: int, block_tokens: int, window: int | None) -> KVCacheConfig:
    facts: dict[str, Any] = {
        "block_size": block_tokens, "num_kv_heads": 1, "head_size": CELL_BYTES, "dtype": torch.uint8
    }  # fmt: skip
    specs = [FullAttentionSpec(**facts)]
    if window is not None:
        specs.append(SlidingWindowSpec(**facts, sliding_window=window))
    groups = _layout(block_tokens, window).groups
    return KVCacheConfig(
        num_blocks,
        [],
        [KVCacheGroupSpec(list(g.layers), s) for g, s in zip(groups, specs, strict=True)],
    )


@functools.cache
def _vllm_config(role: str, recomputes: bool, step_tokens: int, max_requests: int) -> VllmConfig:
    """Return vLLM's for a model that has a configuration only."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_MODEL))
        model = ModelConfig(
            folder, skip_tokenizer_init=True, dtype="float32", max_model_len=MAX_TOKENS
        )
        config = VllmConfig(
            model_config=model,
            cache_config=CacheConfig(enable_prefix_caching=True),
            scheduler_config=SchedulerConfig(
                max_num_batched_tokens=max(step_tokens, max_requests),
                max_num_seqs=max_requests,
                max_model_len=MAX_TOKENS,
                is_encoder_decoder=False,
                enable_chunked_prefill=True,
            ),
            kv_transfer_config=KVTransferConfig(
                kv_connector="SimulatedConnector",
                kv_connector_module_path="vllm_pd_plugin.simulation.connector",
                kv_role=_ROLES[role],
                kv_load_failure_policy="recompute" if recomputes else "fail",
            ),
        )
    config.cache_config.num_gpu_blocks = 1  # the KV cache's own configuration counts
    return config
