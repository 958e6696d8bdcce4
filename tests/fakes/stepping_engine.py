"""An engine without a model and without processes: vLLM's own scheduler with our connector in it,
and a forward pass that runs on a fake GPU's stream.

``SteppingEngine.step`` does what ``EngineCore.step_with_batch_queue`` does, which is
``EngineCore.step`` where one step at a time is in flight.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from tests.fakes.forward import Batch, Forward, Graphs, RunnerV1, RunnerV2

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    import torch
    from vllm.config import (
        CacheConfig,
        KVTransferConfig,
        ModelConfig,
        SchedulerConfig,
        VllmConfig,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    from vllm_pd_plugin import CONNECTOR, register
    from vllm_pd_plugin.edge.connector import PdConnector

BLOCK, HEADS, WIDTH = 32, 2, 32
LAYERS = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")
EOS = 2
ROLES = {"prefill": "kv_producer", "decode": "kv_consumer", "both": "kv_both"}
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HEADS * WIDTH,
    "intermediate_size": 64, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
    "head_dim": WIDTH, "num_hidden_layers": len(LAYERS), "vocab_size": 1000,
    "max_position_embeddings": 1024,
}  # fmt: skip


@functools.cache
def _config(role: str) -> VllmConfig:
    """Return vLLM's for a model that has a configuration only."""
    register()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        model = ModelConfig(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=1024)
        return VllmConfig(
            model_config=model,
            cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
            scheduler_config=SchedulerConfig(
                max_num_batched_tokens=64,
                max_num_seqs=8,
                max_model_len=1024,
                is_encoder_decoder=False,
                enable_chunked_prefill=True,
            ),
            kv_transfer_config=KVTransferConfig(kv_connector=CONNECTOR, kv_role=ROLES[role]),
        )


class SteppingEngine:
    """role: ``prefill``, ``decode`` or ``both``. options: of ``PdConfig``.

    is_async: with vLLM's asynchronous scheduling: a step is scheduled while another is in flight.
    graphs: how the next steps are launched.
    answers: which tokens are sampled for a request, one after the other; 100, 101, ... without.
    """

    def __init__(
        self,
        role: str,
        is_async: bool = True,
        runner: type[RunnerV1] | type[RunnerV2] = RunnerV2,
        num_blocks: int = 40,
        **options: Any,
    ) -> None:
        config = self.config = copy.deepcopy(_config(role))
        config.scheduler_config.async_scheduling = is_async
        assert config.kv_transfer_config is not None
        config.kv_transfer_config.kv_connector_extra_config = {"weights_id": "w", **options}
        config.kv_transfer_config.engine_id = role
        config.cache_config.num_gpu_blocks = num_blocks
        self.graphs = Graphs.EAGER
        self.answers: dict[str, Iterator[int]] = {}
        self.outputs: dict[str, list[int]] = {}
        self.params: dict[str, dict[str, Any]] = {}
        self.ended: dict[str, str] = {}
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=HEADS, head_size=WIDTH, dtype=torch.float32
        )
        cache_config = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(list(LAYERS), spec)])
        self.caches = {
            layer: torch.zeros((num_blocks, HEADS, BLOCK, 2 * WIDTH)) for layer in LAYERS
        }
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        rank = "vllm_pd_plugin.edge.connector.get_tensor_model_parallel_rank"
        version = {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner is RunnerV2))}
        stages = "vllm_pd_plugin.edge.connector.get_pp_group"
        stage = SimpleNamespace(rank_in_group=0)
        with (
            patch.dict("os.environ", version),
            patch(rank, return_value=0),
            patch(stages, return_value=stage),
        ):
            cls = AsyncScheduler if is_async else Scheduler
            self.scheduler = cls(
                config, cache_config, StructuredOutputManager(config), BLOCK, BLOCK
            )
            self._num_in_flight = config.max_concurrent_batches
            self.connector = PdConnector(config, KVConnectorRole.WORKER, cache_config)
        self.forward = Forward(config, self.caches, self._write)
        self.stream = self.forward.stream
        self.runner = runner(self.connector, config, self.caches, self.forward)
        self.connector._worker._mark_stream = self.stream.record
        handshake = self.connector.get_handshake_metadata()
        assert handshake is not None
        self.scheduler_side.set_xfer_handshake_metadata_pp_aware({(0, 0): handshake})
        self._queue: deque[tuple[int, SchedulerOutput, ModelRunnerOutput]] = deque()

    @property
    def scheduler_side(self) -> PdConnector:
        connector = self.scheduler.get_kv_connector()
        assert isinstance(connector, PdConnector)
        return connector

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.scheduler_side._scheduler._listener.port

    @property
    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def close(self) -> None:
        self.connector.shutdown()
        self.scheduler.shutdown()

    def add(
        self,
        name: str,
        prompt: list[int],
        params: dict[str, Any] | None = None,
        max_tokens: int = 1,
    ) -> Request:
        """A request arrives."""
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0, extra_args={"kv_transfer_params": params}
        )
        sampling.update_from_generation_config({}, EOS)
        request = Request(name, list(prompt), sampling, None, block_hasher=self._hasher)
        self.answers.setdefault(name, iter(range(100, 1000)))
        self.outputs[name] = []
        self.scheduler.add_request(request)
        return request

    def blocks_of(self, name: str) -> list[int]:
        (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(name)
        return blocks

    def schedule(self) -> SchedulerOutput | None:
        """Schedule and launch one more step, if there is room for it: half of ``step``."""
        if not self.scheduler.has_requests() or len(self._queue) == self._num_in_flight:
            return None
        scheduled = self.scheduler.schedule()
        batch, output = self._inputs(scheduled)
        output.kv_connector_output = self.runner.step(scheduled, batch, self.graphs)
        self._queue.appendleft((self.stream.num_launched, scheduled, output))
        return scheduled

    def finish(self) -> None:
        """Wait for the oldest step in flight, and take its output: the other half."""
        if not self._queue:
            return
        until, scheduled, output = self._queue.pop()
        self.stream.run(until)
        for each in self.scheduler.update_from_output(scheduled, output).values():
            for out in each.outputs:
                self.outputs[out.request_id] += out.new_token_ids
                if out.finish_reason is not None:
                    self.ended[out.request_id] = str(out.finish_reason)
                if out.kv_transfer_params:
                    self.params[out.request_id] = out.kv_transfer_params

    def step(self) -> None:
        scheduled = self.schedule()
        if scheduled is None or len(self._queue) == self._num_in_flight:
            self.finish()

    def _inputs(self, scheduled: SchedulerOutput) -> tuple[Batch, ModelRunnerOutput]:
        """Return where a step's KV goes, and what it will have sampled."""
        batch, sampled = Batch(), []
        for name, num_tokens in scheduled.num_scheduled_tokens.items():
            request, blocks = self.scheduler.requests[name], self.blocks_of(name)
            start = request.num_computed_tokens - num_tokens
            known = list(request.all_token_ids)
            for place in range(start, start + num_tokens):
                batch.blocks.append(blocks[place // BLOCK])
                batch.places.append(place % BLOCK)
                # A token that was sampled by a step in flight is known to the GPU only.
                batch.tokens.append(known[place] if place < len(known) else -1)
            is_over = start + num_tokens >= request.num_tokens
            sampled.append([next(self.answers[name])] if is_over else [])
        names = list(scheduled.num_scheduled_tokens)
        index = {name: i for i, name in enumerate(names)}
        return batch, ModelRunnerOutput(names, index, sampled_token_ids=sampled)

    def _write(self, batch: Batch, layer: str) -> None:
        """Every number says whose token it is, and in which layer."""
        if batch.tokens:
            tokens = torch.tensor(batch.tokens, dtype=torch.float32)
            self.caches[layer][batch.blocks, :, batch.places] = _rows(tokens, LAYERS.index(layer))


def _rows(tokens: torch.Tensor, layer: int) -> torch.Tensor:
    rows = tokens.view(-1, 1, 1).expand(-1, HEADS, 2 * WIDTH)
    return rows + layer / 8 + torch.arange(2 * WIDTH) / 1024


def has_kv_of(engine: SteppingEngine, blocks: list[int], prompt: list[int]) -> bool:
    """Whether the blocks hold the KV of a prompt, in all layers."""
    for number, layer in enumerate(LAYERS):
        found = engine.caches[layer][blocks].permute(0, 2, 1, 3).flatten(0, 1)[: len(prompt)]
        if not torch.equal(found, _rows(torch.tensor(prompt, dtype=torch.float32), number)):
            return False
    return True
