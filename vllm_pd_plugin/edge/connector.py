"""``pdplugin``, the KV connector that vLLM loads: a facade over its two halves."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from vllm_pd_plugin.compat import moved, require_supported_vllm
from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.edge import geometry, probing, room, sampling
from vllm_pd_plugin.edge.description import EngineRole
from vllm_pd_plugin.edge.hooks import (
    admit_frontends,
    call_on_arrival,
    end_abandoned_requests,
    free_blocks_once,
    watch_weights,
)
from vllm_pd_plugin.edge.identity import LocalIdentity
from vllm_pd_plugin.edge.metadata import RankHandshake, StepMetadata
from vllm_pd_plugin.edge.metrics import PdPromMetrics, PdStats
from vllm_pd_plugin.edge.scheduler import SchedulerSide
from vllm_pd_plugin.edge.worker import WorkerSide, use_device
from vllm_pd_plugin.ids import RequestId
from vllm_pd_plugin.net.nixl_transport import NixlTransport

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

require_supported_vllm()


class PdConnector(KVConnectorBase_V1, SupportsHMA):
    """Hands KV from engine to engine; see ``docs/architecture.md``."""

    if (source := moved("CacheHitSource")) is not None:
        _cache_hit_source = source.P2P

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = self._kv_transfer_config
        config = PdConfig.parse(transfer.kv_connector_extra_config, os.environ)
        geometry.refuse_unsupported(vllm_config)
        geometry.refuse_unsupported_cache(kv_cache_config)
        config = replace(config, port=geometry.control_port(vllm_config, config.port))
        engine_id = transfer.engine_id or ""
        if role is KVConnectorRole.SCHEDULER:
            recomputes = transfer.kv_load_failure_policy == "recompute"
            engine_role = EngineRole(transfer.is_kv_producer, transfer.is_kv_consumer, recomputes)
            identify = partial(LocalIdentity, vllm_config, config.weights_id)
            steps_alone = vllm_config.parallel_config.data_parallel_size == 1
            self._scheduler = SchedulerSide(config, engine_id, engine_role, identify, steps_alone)
            self.update_failed = False
            """Whether the last change of the weights broke off; see ``hooks.watch_weights``."""
            self.receiving: set[RequestId] = set()
            """Requests that ended while their KV was received; see ``hooks.free_blocks_once``."""
            end_abandoned_requests()
            free_blocks_once()
            room.mend()
            call_on_arrival(self._scheduler.wake)
            admit_frontends()
            watch_weights()
        else:
            sampling.mend()
            probing.probe_at_start()
            stage, tp_rank = get_pp_group().rank_in_group, get_tensor_model_parallel_rank()
            place = geometry.place_of(vllm_config, stage, tp_rank)
            dp_rank = vllm_config.parallel_config.data_parallel_index
            self._worker = WorkerSide(config, engine_id, place, dp_rank)
            self._handshake: RankHandshake | None = None

    def shutdown(self) -> None:
        if self.role is KVConnectorRole.SCHEDULER:
            self._scheduler.close()
        elif self._handshake is not None:
            self._worker.close()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self.role is KVConnectorRole.SCHEDULER:
            return self._scheduler.take_stats()
        return self._worker.take_stats()

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        return PdStats() if data is None else PdStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PdPromMetrics:
        return PdPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # --- in the scheduler ------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        geometry.retain_recomputed_token(kv_cache_manager)
        self._scheduler.bind(kv_cache_manager)

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        ranks = [metadata[rank] for rank in sorted(metadata)]
        self._scheduler.start([rank for rank in ranks if isinstance(rank, RankHandshake)])

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        return tuple(range(len(self._kv_cache_config.kv_cache_groups)))

    def on_new_request(self, request: Request) -> None:
        self._scheduler.add(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._scheduler.step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._scheduler.collect(connector_output)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler.finish(request, block_ids)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Asked by vLLM's MultiConnector when another of its connectors knows one group only."""
        return self._scheduler.finish(request, (block_ids,))

    def reset_cache(self) -> bool:
        """Asked with ``reset_prefix_cache(reset_connector=True)``."""
        self._scheduler.reset()
        return True

    def weights_change(self, is_over: bool) -> None:
        """Take note of new weights; see ``hooks.watch_weights``."""
        self._scheduler.weights_change(is_over)

    def adapter_loaded(self, int_id: int) -> None:
        """Take note of an adapter that was loaded; see ``hooks.watch_weights``."""
        self._scheduler.adapter_loaded(int_id)

    def take_abandoned(self) -> tuple[list[RequestId], list[RequestId]]:
        """Return running requests to be ended; see ``hooks.end_abandoned_requests``."""
        return self._scheduler.take_abandoned()

    def admit_frontends(self, core: EngineCoreProc) -> None:
        """Be a client of this engine's core; see ``hooks.admit_frontends``."""
        self._scheduler.admit_frontends(core)

    def describe_engine(self) -> dict[str, Any]:
        """Say where frontends attach; see ``hooks.add_description_route``."""
        return self._scheduler.describe_engine()

    # --- in the worker ---------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        caches = geometry.block_views(self._kv_cache_config, kv_caches)
        layout = geometry.describe(self._vllm_config, self._kv_cache_config, caches)
        geometry.refuse_unencodable(layout, self._worker.narrowest)
        device = next(iter(caches.values())).device
        kind = "DRAM" if device.type == "cpu" else "VRAM"
        transfer = self._vllm_config.kv_transfer_config
        transport = NixlTransport(
            kind, device.index or 0, transfer.is_kv_consumer, partial(use_device, device)
        )
        self._handshake = self._worker.register(transport, layout, caches)
        self._caches = caches

    def probe(self, worker: Any) -> None:
        """Compute the probe prompt, once; see ``probing.probe_at_start``."""
        if self._handshake is not None and self._handshake.probe is None:
            layout, rank = self._handshake.layout, self._worker.place.rank
            compute = partial(probing.run, worker, self._vllm_config, layout, self._caches, rank)
            num_blocks = self._kv_cache_config.num_blocks
            why = probing.why_not(self._vllm_config, layout, num_blocks)
            found = self._worker.probe(compute, why)
            self._handshake = replace(self._handshake, probe=found)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._handshake

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        # Here and not in start_load_kv, which vLLM calls only after the step's forward.
        self._worker.step(connector_metadata)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self._worker.take_results()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._worker.take_report()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Nothing to do: loads start when the step's metadata arrives."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request runs only once all its KV has been committed."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Take note only: consumers read the KV where it lies."""
        self._worker.layer_written(layer_name)

    def finish_forward(self) -> None:
        """Called by model runner V2 when it has launched the forward pass, before it samples."""
        self._worker.forward_ended()

    def wait_for_save(self) -> None:
        """Nothing to wait for; called when the forward pass is launched, by model runner V1."""
        self._worker.forward_ended()
