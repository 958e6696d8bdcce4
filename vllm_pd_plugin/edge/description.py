"""What this engine is, and what a frontend has to know of it before it can attach."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from vllm.version import __version__ as vllm_version

from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.engine_port.messages import EngineDescription
from vllm_pd_plugin.engine_port.served_options import served_options
from vllm_pd_plugin.ids import EngineId
from vllm_pd_plugin.memory.identity import KvIdentity
from vllm_pd_plugin.protocol.params import allowed_codecs

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclasses.dataclass(frozen=True, slots=True)
class EngineRole:
    """What this engine may do with KV, and what it does when a fetch fails."""

    produces: bool
    consumes: bool
    recomputes: bool

    @property
    def name(self) -> str:
        if self.produces and self.consumes:
            return "both"
        return "prefill" if self.produces else "decode"


def describe(
    vllm_config: VllmConfig,
    config: PdConfig,
    role: EngineRole,
    engine_id: EngineId,
    port: int,
    kv: KvIdentity,
) -> EngineDescription:
    """Return it. port: of the control channel. kv: what this engine's KV is."""
    served = vllm_config.model_config.served_model_name
    return EngineDescription(
        engine_id=engine_id,
        role=role.name,
        model=served if isinstance(served, str) else served[0],
        vllm_version=vllm_version,
        control_host=config.advertise_host,
        control_port=port,
        max_model_len=vllm_config.model_config.max_model_len,
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        data_parallel_size=vllm_config.parallel_config.data_parallel_size,
        codecs=allowed_codecs(config),
        vocab_size=vllm_config.model_config.get_vocab_size(),
        kv=kv,
        kv_tokens=vllm_config.cache_config.kv_cache_size_tokens or 0,
        block_tokens=vllm_config.cache_config.block_size,
        data_parallel_rank=vllm_config.parallel_config.data_parallel_index,
        options=served_options(vllm_config),
        has_lora=vllm_config.lora_config is not None,
    )
