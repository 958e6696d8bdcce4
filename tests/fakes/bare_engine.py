"""Both halves of an engine's connector, with real sockets, threads, NIXL and ops, and with vLLM's
own requests and KV cache manager; only the model and the processes around it are not there.

``BareEngine.step`` does what vLLM's engine core does in a step.
"""

from __future__ import annotations

import dataclasses
import warnings
from itertools import chain
from types import SimpleNamespace
from typing import Any

from tests.fakes.engines import make_kv
from vllm_pd_plugin.codecs.codec import Part
from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.mapping.kv_cache import RankPlace
from vllm_pd_plugin.memory.identity import KvIdentity, Weights
from vllm_pd_plugin.memory.layout import Group, RankLayout
from vllm_pd_plugin.net.nixl_transport import NixlTransport

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    import torch
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
    )
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request, RequestStatus

    from vllm_pd_plugin.edge.description import EngineRole
    from vllm_pd_plugin.edge.scheduler import SchedulerSide
    from vllm_pd_plugin.edge.worker import WorkerSide

BLOCK, HEADS, WIDTH, NUM_BLOCKS = 16, 2, 32, 64
LAYERS = ("layers.0.attn", "layers.1.attn")
PARTS = Part.of_rows("key", WIDTH, 0, 2 * WIDTH), Part.of_rows("value", WIDTH, WIDTH, 2 * WIDTH)
LAYOUT = RankLayout(
    (
        Group(
            "full", BLOCK, None, LAYERS, (HEADS, BLOCK, 2 * WIDTH), "float32",
            (BLOCK * 2 * WIDTH, 2 * WIDTH, 1), PARTS,
        ),
    ),
)  # fmt: skip
TOKEN = 77
"""Sampled by every producer."""


class _Identity:
    """In place of ``LocalIdentity``: there are no weights."""

    kv = make_kv()

    def changing(self) -> KvIdentity:
        self.kv = make_kv(weights=Weights("unknown:being changed"))
        return self.kv

    def changed(self) -> KvIdentity:
        self.kv = make_kv(weights=Weights("unknown:changed"))
        return self.kv

    def probed(self, ranks: Any) -> None: ...

    def hash_fully(self, on_done: Any) -> None: ...

    def close(self) -> None: ...


def _identify(boot_id: str) -> Any:
    return _Identity()


@dataclasses.dataclass(slots=True, eq=False)
class Tracked:
    """A request, and how it ended: "handed off", "fetched", "failed" or "ended"."""

    request: Request
    outcome: str = ""
    params: dict[str, Any] | None = None
    waits_for_kv: bool = False
    is_held: bool = False
    kv: torch.Tensor | None = None


class BareEngine:
    """role: ``prefill`` or ``decode``. options: of ``PdConfig``."""

    def __init__(self, role: str, steps_alone: bool = True, **options: Any) -> None:
        config = PdConfig.parse(options, {})
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=HEADS, head_size=WIDTH, dtype=torch.float32
        )
        cache_config = KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(list(LAYERS), spec)])
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self.manager = KVCacheManager(
            cache_config, max_model_len=1024, scheduler_block_size=BLOCK, hash_block_size=BLOCK
        )
        self.caches = {
            layer: torch.zeros((NUM_BLOCKS, HEADS, BLOCK, 2 * WIDTH)) for layer in LAYERS
        }
        produces = role == "prefill"
        self.scheduler = SchedulerSide(
            config,
            role,
            EngineRole(produces, not produces, recomputes=False),
            _identify,
            steps_alone,
        )
        self.worker = WorkerSide(config, role, RankPlace(0, 0, 1, 1))
        handshake = self.worker.register(NixlTransport("DRAM", 0), LAYOUT, self.caches)
        self.scheduler.bind(self.manager)
        self.scheduler.start([handshake])
        self.requests: dict[str, Tracked] = {}

    @property
    def free_blocks(self) -> int:
        return int(self.manager.block_pool.get_num_free_blocks())

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.scheduler._listener.port

    def close(self) -> None:
        self.worker.close()
        self.scheduler.close()

    def add(self, name: str, prompt: list[int], params: dict[str, Any]) -> Tracked:
        """A request arrives."""
        sampling = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": params})
        request = Request(name, list(prompt), sampling, None, block_hasher=self._hasher)
        self.requests[name] = tracked = Tracked(request)
        self.scheduler.add(request)
        return tracked

    def step(self) -> None:
        """Schedule, compute, and take in what workers report."""
        scheduled: dict[str, int] = {}
        for name, tracked in list(self.requests.items()):
            if not tracked.outcome and not tracked.waits_for_kv:
                self._schedule(name, tracked, scheduled)
        output: Any = SimpleNamespace(
            total_num_scheduled_tokens=sum(scheduled.values()), num_scheduled_tokens=scheduled
        )
        metadata = self.scheduler.step(output)
        self.worker.step(metadata)
        for name in scheduled:
            self._compute(name)
        for layer in LAYERS:
            self.worker.layer_written(layer)
        self.worker.forward_ended()
        self._collect()
        for name in scheduled:
            self._end(name, RequestStatus.FINISHED_LENGTH_CAPPED)
        for name in chain(*self.scheduler.take_abandoned()):
            if name in self.requests and not self.requests[name].outcome:
                self._end(name, RequestStatus.FINISHED_ERROR)
        self.scheduler.take_stats()
        self.worker.take_stats()

    def _schedule(self, name: str, tracked: Tracked, scheduled: dict[str, int]) -> None:
        request = tracked.request
        external, is_async = self.scheduler.match(request, 0)
        if external is None:
            return
        if external and is_async:
            blocks = self.manager.allocate_slots(
                request, 0, num_external_computed_tokens=external, delay_cache_blocks=True
            )
            assert blocks is not None
            self.scheduler.allocated(request, self.manager.get_blocks(name), external)
            tracked.waits_for_kv = True
            return
        assert self.manager.allocate_slots(request, request.num_tokens) is not None
        self.scheduler.allocated(request, self.manager.get_blocks(name), 0)
        scheduled[name] = request.num_tokens

    def _compute(self, name: str) -> None:
        """Write the KV of a request's prompt: every number says whose it is and where."""
        request = self.requests[name].request
        (blocks,) = self.manager.get_block_ids(name)
        for place, layer in enumerate(LAYERS):
            self.caches[layer][blocks] = kv_of(request.prompt_token_ids or [], place)
        request.num_computed_tokens = request.num_tokens

    def _collect(self) -> None:
        results = self.worker.take_results()
        report = self.worker.take_report()
        assert results.finished_recving <= self.requests.keys(), "an unknown receive"
        assert results.finished_sending <= self.requests.keys(), "an unknown send"
        output = KVConnectorOutput(
            finished_sending=results.finished_sending,
            finished_recving=results.finished_recving,
            failed_recving=results.failed_recving,
            kv_connector_worker_meta=report,
        )
        self.scheduler.collect(output)
        for name in results.finished_recving:
            tracked = self.requests[name]
            assert tracked.waits_for_kv, "a receive was reported twice"
            tracked.waits_for_kv = False
            if name in results.failed_recving:
                self._end(name, RequestStatus.FINISHED_ERROR)
                continue
            # As vLLM does before it schedules the request, and before it hears that it must end.
            self.manager.cache_blocks(tracked.request, tracked.request.num_tokens)
            (blocks,) = self.manager.get_block_ids(name)
            tracked.kv = torch.stack([self.caches[layer][blocks] for layer in LAYERS])
            tracked.outcome = "fetched"
            self._end(name, RequestStatus.FINISHED_LENGTH_CAPPED)
        for name in results.finished_sending:
            tracked = self.requests[name]
            assert tracked.is_held, "blocks were released twice"
            tracked.is_held = False
            self.manager.free(tracked.request)

    def _end(self, name: str, status: RequestStatus) -> None:
        tracked = self.requests[name]
        request = tracked.request
        if status is RequestStatus.FINISHED_LENGTH_CAPPED and not tracked.outcome:
            request.append_output_token_ids(TOKEN)
            tracked.outcome = "handed off"
        tracked.outcome = tracked.outcome or "failed"
        request.status = status
        hold, tracked.params = self.scheduler.finish(request, self.manager.get_block_ids(name))
        tracked.is_held = hold
        if not hold:
            self.manager.free(request)


def kv_of(prompt: list[int], layer: int) -> torch.Tensor:
    """The KV of a prompt in one layer: [blocks, heads, tokens, channels]."""
    num_blocks = -(-len(prompt) // BLOCK)
    tokens = torch.zeros(num_blocks * BLOCK)
    tokens[: len(prompt)] = torch.tensor(prompt, dtype=torch.float32)
    rows = tokens.view(num_blocks, 1, BLOCK, 1).expand(-1, HEADS, -1, 2 * WIDTH)
    return rows + layer / 8 + torch.arange(2 * WIDTH) / 1024
