"""What this engine computes for the probe prompt, once, when it starts; see ``memory.probe``.

The prompt goes through the model runner as a request would: real blocks, which nobody has yet, real
attention, CUDA graphs where there are any. So what is sketched is what a peer would read.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vllm_pd_plugin.codecs import ops
from vllm_pd_plugin.codecs.codec import Part
from vllm_pd_plugin.edge.compositions import own_connector
from vllm_pd_plugin.memory import probe
from vllm_pd_plugin.memory.layout import Group, RankLayout
from vllm_pd_plugin.memory.probe import PROMPT_TOKENS, Sums

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

logger = logging.getLogger(__name__)

_MARK = "_vllm_pd_plugin_probe"
_REQUEST_ID = "pd-probe"


def probe_at_start() -> None:
    """Let workers compute the probe prompt just before they describe themselves to the scheduler.

    They are asked all at once, when all memory is there, graphs are captured, and no request can
    have come.
    """
    from vllm.v1.worker.gpu_worker import Worker

    if getattr(Worker, _MARK, False):
        return
    describe = Worker.get_kv_connector_handshake_metadata

    @functools.wraps(describe)
    def and_probe(self: Worker) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        if has_kv_transfer_group() and (own := own_connector(get_kv_transfer_group())) is not None:
            own.probe(self)
        return describe(self)

    Worker.get_kv_connector_handshake_metadata = and_probe
    setattr(Worker, _MARK, True)


def why_not(vllm_config: VllmConfig, layout: RankLayout, num_blocks: int) -> str:
    """Say why an engine cannot compute the probe prompt as others do; empty where it can."""
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    if model.runner_type != "generate":
        return f"a model that is run as {model.runner_type} has no logits"
    if vllm_config.parallel_config.data_parallel_size > 1:
        return "data parallel ranks step together, and start one by one"
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return "pipeline stages have other layers than an engine of one has"
    longest = min(model.max_model_len - 1, scheduler.max_num_batched_tokens)
    if longest < PROMPT_TOKENS:
        return f"{PROMPT_TOKENS} tokens are more than the {longest} that fit into a step"
    needed = sum(len(table) for table in scratch_tables(vllm_config, layout))
    if num_blocks <= needed:
        return f"it takes {needed} blocks, and there are {num_blocks}, one of which is never used"
    return ""


def scratch_tables(vllm_config: VllmConfig, layout: RankLayout) -> tuple[list[int], ...]:
    """Return block tables for the prompt: groups share memory, so no block is in two of them; the
    first block is vLLM's null block."""
    tokens = PROMPT_TOKENS + vllm_config.num_lookahead_tokens
    tables, start = [], 1
    for group in layout.groups:
        count = math.ceil(tokens / group.block_tokens)
        tables.append(list(range(start, start + count)))
        start += count
    return tuple(tables)


def run(
    worker: Any,
    vllm_config: VllmConfig,
    layout: RankLayout,
    caches: Mapping[str, torch.Tensor],
    rank: int,
) -> dict[str, Sums]:
    """Compute the prompt, and return this rank's part of the sketch.

    caches: see ``geometry.block_views``. Raises whatever vLLM raises.
    """
    began = time.perf_counter()
    tables = scratch_tables(vllm_config, layout)
    logits = _compute(worker, vllm_config, tables)
    sums = sketch_caches(vllm_config, layout, caches, tables, rank)
    if logits is not None and rank == 0:
        sums["logits"] = probe.sketch_logits(logits)
    logger.info("pdplugin: the probe prompt took %.2f s", time.perf_counter() - began)
    return sums


def sketch_caches(
    vllm_config: VllmConfig,
    layout: RankLayout,
    caches: Mapping[str, torch.Tensor],
    tables: Sequence[Sequence[int]],
    rank: int,
) -> dict[str, Sums]:
    """Return the sketches of what the blocks of some layers hold. Nothing of those that cannot be
    read as numbers, or that another rank has as well and sketches."""
    sums: dict[str, Sums] = {}
    layers = layout.layers
    order = [layers[region] for region in layout.forward_order()]
    homes = {
        name: (group, table)
        for group, table in zip(layout.groups, tables, strict=True)
        for name in group.layers
    }
    for place in probe.probed_layers(len(order)):
        group, table = homes[order[place]]
        first_head = _first_head(vllm_config, group, rank)
        if group.is_encodable and first_head is not None:
            for part in group.parts:
                rows = rows_of(caches[order[place]], part, table)
                sums[f"layer {place} {part.kind}"] = probe.sketch(rows, first_head)
    return sums


def rows_of(cache: torch.Tensor, part: Part, table: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return a part of the prompt's KV as ``[tokens, heads, channels]``, wherever it lies."""
    tiles = ops.part_of(cache, part)[list(table)]
    blocks, heads, token_tiles, tokens, channel_tiles, channels = tiles.shape
    rows = tiles.permute(0, 2, 3, 1, 4, 5).reshape(
        blocks * token_tiles * tokens, heads, channel_tiles * channels
    )
    found: npt.NDArray[np.float32] = rows[:PROMPT_TOKENS].float().cpu().numpy()
    return found


def _first_head(vllm_config: VllmConfig, group: Group, rank: int) -> int | None:
    """Return which of the model's KV heads a rank's first is; None where a rank before it has the
    same."""
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    model = vllm_config.model_config
    total = 1 if model.use_mla else model.get_total_num_kv_heads()
    copies = max(1, tp_size * group.heads // total)
    return None if rank % copies else rank // copies * group.heads


def _compute(
    worker: Any, vllm_config: VllmConfig, tables: tuple[list[int], ...]
) -> npt.NDArray[np.float32] | None:
    """Compute the prompt in some blocks; return the logits after it, None on a rank that has none.

    They are taken where the model gives them out: log-probabilities of a whole vocabulary would
    have vLLM compile a kernel for them, which takes ten seconds on a CPU.
    """
    vocab_size = vllm_config.model_config.get_vocab_size()
    runner = worker.model_runner
    with _without_connectors(runner), _listening(runner.model) as logits:
        try:
            worker.execute_model(_step(probe.prompt(vocab_size), tables))
            worker.sample_tokens(None)
        finally:
            worker.execute_model(_end())
    return logits[0][:vocab_size] if logits else None


@contextlib.contextmanager
def _listening(model: Any) -> Iterator[list[npt.NDArray[np.float32]]]:
    """Collect the first row of all logits that a model gives out."""
    found: list[npt.NDArray[np.float32]] = []
    compute_logits = model.compute_logits

    def and_keep(*args: Any, **kwargs: Any) -> Any:
        logits = compute_logits(*args, **kwargs)
        if logits is not None:
            found.append(logits[0].float().cpu().numpy().copy())  # samplers write to them
        return logits

    model.compute_logits = and_keep
    try:
        yield found
    finally:
        del model.compute_logits


def _step(tokens: list[int], tables: tuple[list[int], ...]) -> SchedulerOutput:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

    step = SchedulerOutput.make_empty()
    request = NewRequestData(
        req_id=_REQUEST_ID,
        prompt_token_ids=tokens,
        mm_features=[],
        sampling_params=SamplingParams(
            temperature=0.0,
            max_tokens=1,
            seed=0,  # else one is drawn, which would change those of requests
            watermarking=False,
        ),
        pooling_params=None,
        block_ids=tables,
        num_computed_tokens=0,
        lora_request=None,
        prefill_token_ids=tokens,
    )
    step.scheduled_new_reqs = [request]
    step.num_scheduled_tokens = {_REQUEST_ID: len(tokens)}
    step.total_num_scheduled_tokens = len(tokens)
    step.num_common_prefix_blocks = [0] * len(tables)
    return step


def _end() -> SchedulerOutput:
    from vllm.v1.core.sched.output import SchedulerOutput

    step = SchedulerOutput.make_empty()
    step.finished_req_ids = {_REQUEST_ID}
    return step


@contextlib.contextmanager
def _without_connectors(runner: Any) -> Iterator[None]:
    """Let the runner step without any connector: what they are told with a step only a scheduler
    knows. Model runner V2 has a switch for that, for its own warm-up."""
    from vllm.distributed.kv_transfer import kv_transfer_state

    active: Any = getattr(runner, "kv_connector", None)
    if hasattr(active, "set_disabled"):
        active.set_disabled(True)
        try:
            yield
        finally:
            active.set_disabled(False)
        return
    agent = kv_transfer_state._KV_CONNECTOR_AGENT
    kv_transfer_state._KV_CONNECTOR_AGENT = None
    try:
        yield
    finally:
        kv_transfer_state._KV_CONNECTOR_AGENT = agent
