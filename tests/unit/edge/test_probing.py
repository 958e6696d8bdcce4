"""The probe prompt on a worker: what is sketched does not depend on where the KV lies."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    import torch
    from vllm.distributed.kv_transfer import kv_transfer_state
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_worker import Worker as WorkerOfVllm

    from tests.fakes import llama
    from tests.fakes.sketches import TOKENS, sketch_of
    from vllm_pd_plugin.codecs import ops
    from vllm_pd_plugin.codecs.codec import Part
    from vllm_pd_plugin.codecs.cpu_layout import parts_of_cpu_kernel
    from vllm_pd_plugin.config import PdConfig
    from vllm_pd_plugin.edge import probing
    from vllm_pd_plugin.edge.connector import PdConnector
    from vllm_pd_plugin.edge.probing import scratch_tables, why_not
    from vllm_pd_plugin.edge.worker import WorkerSide
    from vllm_pd_plugin.ids import EngineId
    from vllm_pd_plugin.mapping.kv_cache import RankPlace
    from vllm_pd_plugin.memory import probe
from vllm_pd_plugin.memory.layout import Group, RankLayout

WEIGHTS = llama.random_weights()
WIDTH = llama.HEAD_DIM


def rows(tokens: int) -> tuple[Part, ...]:
    return (
        Part.of_rows("key", WIDTH, 0, 2 * WIDTH),
        Part.of_rows("value", WIDTH, WIDTH, 2 * WIDTH),
    )


def vectors(tokens: int) -> tuple[Part, ...]:
    return parts_of_cpu_kernel("vec", tokens, WIDTH)


def tiles(tokens: int) -> tuple[Part, ...]:
    return parts_of_cpu_kernel("amx", tokens, WIDTH)


def vllm_config(tp_size: int = 1, **changes: Any) -> Any:
    facts: dict[str, Any] = {
        "runner_type": "generate", "dp_size": 1, "pp_size": 1, "max_model_len": 4096,
        "batched": 2048,
    } | changes  # fmt: skip
    return SimpleNamespace(
        model_config=SimpleNamespace(
            runner_type=facts["runner_type"],
            max_model_len=facts["max_model_len"],
            use_mla=False,
            get_vocab_size=lambda: llama.VOCAB,
            get_total_num_kv_heads=lambda: llama.KV_HEADS,
        ),
        parallel_config=SimpleNamespace(
            data_parallel_size=facts["dp_size"],
            tensor_parallel_size=tp_size,
            pipeline_parallel_size=facts["pp_size"],
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=facts["batched"]),
        num_lookahead_tokens=0,
    )


class Model:
    """gives_logits: as those of the last pipeline stage do."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.gives_logits = True

    def compute_logits(self, hidden: None) -> torch.Tensor | None:
        padding = torch.zeros(64)  # of a vocabulary that is divided among ranks
        return (
            torch.cat([self._worker.computed.logits, padding])[None] if self.gives_logits else None
        )


class Worker:
    """One rank of an engine: what vLLM's worker does with a step, and its KV caches.

    steps: those that it was given, each with the connector that it would have told.
    """

    def __init__(
        self,
        parts: Callable[[int], tuple[Part, ...]] = rows,
        block_tokens: int = 16,
        tp_size: int = 1,
        rank: int = 0,
        dtype: torch.dtype = torch.float32,
        groups: int = 1,
    ) -> None:
        self.tp_size = tp_size
        copies = max(1, tp_size // llama.KV_HEADS)
        self.heads = llama.KV_HEADS * copies // tp_size
        self.first_head = rank // copies * self.heads
        self.dtype = dtype
        names = [f"model.layers.{i}.self_attn.attn" for i in range(llama.LAYERS)]
        shape = (self.heads, block_tokens, 2 * WIDTH)
        kind = str(dtype).removeprefix("torch.")
        self.layout = RankLayout(
            tuple(
                Group("full", block_tokens, None, tuple(names[g::groups]), shape, kind,
                      parts=parts(block_tokens))
                for g in range(groups)
            ),
        )  # fmt: skip
        self.caches = {name: torch.full((40, *shape), torch.nan, dtype=dtype) for name in names}
        self.model_runner = SimpleNamespace(model=Model(self))
        self.steps: list[tuple[SchedulerOutput, Any]] = []
        self.fails_in = ""

    def execute_model(self, step: SchedulerOutput) -> None:
        self.steps.append((step, kv_transfer_state._KV_CONNECTOR_AGENT))
        if not step.scheduled_new_reqs:
            return
        (request,) = step.scheduled_new_reqs
        if self.fails_in == "execute_model":
            raise RuntimeError("out of memory")
        assert step.num_scheduled_tokens == {request.req_id: len(TOKENS)}
        self.computed = llama.compute(WEIGHTS, request.prompt_token_ids or [], self.dtype)
        tables = dict(zip(self.layout.groups, request.block_ids, strict=True))
        for group, table in tables.items():
            for name in group.layers:
                self._write(group, name, table)

    def _write(self, group: Group, name: str, table: list[int]) -> None:
        layer = int(name.split(".")[2])
        own = slice(self.first_head, self.first_head + self.heads)
        for part, values in zip(
            group.parts, (self.computed.keys[layer], self.computed.values[layer]), strict=True
        ):
            view = ops.part_of(self.caches[name], part)
            for token, row in enumerate(values[:, own].to(self.dtype)):
                block, place = table[token // group.block_tokens], token % group.block_tokens
                tile, inside = divmod(place, part.token_tile)
                shape = view[block, :, tile, inside].shape
                view[block, :, tile, inside] = row.reshape(shape)

    def sample_tokens(self, grammar: None) -> None:
        logits = self.model_runner.model.compute_logits(None)
        if logits is not None:
            logits.div_(1e6)  # in place, as samplers do
        if self.fails_in == "sample_tokens":
            raise RuntimeError("out of memory")

    def run(self, rank: int = 0) -> dict[str, probe.Sums]:
        return probing.run(self, vllm_config(self.tp_size), self.layout, self.caches, rank)


def farthest(*workers: Worker, dtype: torch.dtype = torch.float32) -> float:
    """How far a sketch made by ranks is from that of the model itself."""
    found = probe.together([worker.run(rank) for rank, worker in enumerate(workers)])
    return probe.distances(found, sketch_of(WEIGHTS, dtype))[0].relative


@pytest.mark.parametrize("block_tokens", [16, 32, 48, 128])
@pytest.mark.parametrize("parts", [rows, vectors, tiles])
def test_the_sketch_is_that_of_the_model_wherever_its_kv_lies(
    parts: Callable[[int], tuple[Part, ...]], block_tokens: int
) -> None:
    assert farthest(Worker(parts, block_tokens)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_does_not_depend_on_the_type_that_kv_is_stored_in(dtype: torch.dtype) -> None:
    assert farthest(Worker(dtype=dtype), dtype=dtype) < 1e-5


@pytest.mark.parametrize("tp_size", [2, 4], ids=["a head each", "heads on two ranks each"])
def test_the_ranks_sketches_are_together_that_of_the_model(tp_size: int) -> None:
    assert farthest(*(Worker(tp_size=tp_size, rank=rank) for rank in range(tp_size))) < 1e-5


def test_groups_of_one_cache_get_no_block_in_common_and_none_gets_the_null_block() -> None:
    worker = Worker(groups=2)
    assert farthest(worker) < 1e-5
    (request,) = worker.steps[0][0].scheduled_new_reqs
    blocks = [block for table in request.block_ids for block in table]
    assert len(blocks) == len(set(blocks)) == 6
    assert 0 not in blocks


def test_a_rank_that_has_no_logits_sketches_its_kv() -> None:
    worker = Worker()
    worker.model_runner.model.gives_logits = False
    found = worker.run()
    assert "logits" not in found
    assert "layer 0 key" in found


def test_the_model_is_as_it_was_when_the_prompt_is_computed() -> None:
    worker = Worker()
    worker.run()
    assert "compute_logits" not in vars(worker.model_runner.model)


def test_kv_of_which_it_is_not_known_how_it_lies_is_left_out() -> None:
    worker = Worker(lambda tokens: ())
    worker._write = lambda *_: None  # type: ignore[method-assign]
    assert worker.run().keys() == {"logits"}


def test_kv_of_eight_bits_is_left_out() -> None:
    worker = Worker()
    groups = (msgspec.structs.replace(group, dtype="uint8") for group in worker.layout.groups)
    worker.layout = RankLayout(tuple(groups))
    assert worker.run().keys() == {"logits"}


@pytest.mark.parametrize("fails_in", ["", "execute_model", "sample_tokens"])
def test_no_connector_is_told_of_the_prompt_and_the_runner_forgets_it(
    monkeypatch: pytest.MonkeyPatch, fails_in: str
) -> None:
    agent: Any = object()
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", agent)
    worker = Worker()
    worker.fails_in = fails_in
    if fails_in:
        with pytest.raises(RuntimeError, match="out of memory"):
            worker.run()
    else:
        worker.run()
    assert [told for _, told in worker.steps] == [None, None]
    assert kv_transfer_state._KV_CONNECTOR_AGENT is agent
    (request,) = worker.steps[0][0].scheduled_new_reqs
    assert worker.steps[-1][0].finished_req_ids == {request.req_id}


def test_a_runner_that_has_a_switch_for_its_connector_has_it_off_meanwhile() -> None:
    worker = Worker()
    states: list[bool] = []
    worker.model_runner.kv_connector = SimpleNamespace(set_disabled=states.append)
    worker.run()
    assert states == [True, False]


@pytest.mark.parametrize(
    ("changes", "num_blocks", "why"),
    [
        ({}, 100, ""),
        ({}, 4, ""),
        ({}, 3, "it takes 3 blocks, and there are 3"),
        ({"max_model_len": 48}, 100, "48 tokens are more than the 47"),
        ({"batched": 47}, 100, "48 tokens are more than the 47"),
        ({"runner_type": "pooling"}, 100, "run as pooling"),
        ({"dp_size": 2}, 100, "data parallel ranks"),
        ({"pp_size": 2}, 100, "pipeline stages"),
    ],
)
def test_an_engine_that_cannot_compute_it_as_others_do_says_why(
    changes: dict[str, Any], num_blocks: int, why: str
) -> None:
    found = why_not(vllm_config(**changes), Worker().layout, num_blocks)
    assert (why in found) if why else not found


def test_blocks_for_tokens_that_are_speculated_are_there_too() -> None:
    config = vllm_config()
    config.num_lookahead_tokens = 1
    assert [len(table) for table in scratch_tables(config, Worker().layout)] == [4]


class Ours(PdConnector):
    """Takes note of what it is asked."""

    def __init__(self, asked: list[str]) -> None:
        self.asked = asked

    def probe(self, worker: Any) -> None:
        self.asked.append("probe")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of a worker that describes itself, and of its connector."""
    asked: list[str] = []
    monkeypatch.setattr(
        WorkerOfVllm,
        "get_kv_connector_handshake_metadata",
        lambda self: asked.append("describe"),
    )
    monkeypatch.setattr(WorkerOfVllm, probing._MARK, False, raising=False)
    for _ in range(2):
        probing.probe_at_start()
    return asked


@pytest.mark.parametrize("among_others", [False, True])
def test_a_worker_computes_the_prompt_before_it_describes_itself(
    monkeypatch: pytest.MonkeyPatch, asked: list[str], among_others: bool
) -> None:
    ours = Ours(asked)
    agent = SimpleNamespace(sub_connectors=[object(), ours]) if among_others else ours
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", agent)
    WorkerOfVllm.get_kv_connector_handshake_metadata(object.__new__(WorkerOfVllm))
    assert asked == ["probe", "describe"]


@pytest.mark.parametrize("agent", [None, object()], ids=["none", "another"])
def test_a_worker_without_our_connector_only_describes_itself(
    monkeypatch: pytest.MonkeyPatch, asked: list[str], agent: Any
) -> None:
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", agent)
    WorkerOfVllm.get_kv_connector_handshake_metadata(object.__new__(WorkerOfVllm))
    assert asked == ["describe"]


@pytest.fixture
def side() -> Iterator[WorkerSide]:
    side = WorkerSide(PdConfig(), EngineId("engine"), RankPlace(0, 0, 1, 1))
    yield side
    side._loop.close()


def test_a_probe_that_fails_is_a_fault_and_the_engine_goes_on(side: WorkerSide) -> None:
    worker = Worker()
    worker.fails_in = "sample_tokens"
    assert side.probe(worker.run, "") is None
    assert side._contain.faults == 1
    found = side.probe(Worker().run, "")
    assert found is not None
    assert "logits" in found


def test_a_rank_that_fails_does_not_leave_the_others_waiting(side: WorkerSide) -> None:
    side.place = RankPlace(0, 0, 1, 2)
    worker = Worker()
    worker.fails_in = "execute_model"
    with pytest.raises(RuntimeError, match="out of memory"):
        side.probe(worker.run, "")


def test_the_prompt_draws_no_seed() -> None:
    """Model runner V2 draws one for a request without, and later requests would get others."""
    worker = Worker()
    worker.run()
    (request,) = worker.steps[0][0].scheduled_new_reqs
    assert request.sampling_params.seed is not None


def test_why_there_is_no_probe_is_said(side: WorkerSide, caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker()
    with caplog.at_level("WARNING", "vllm_pd_plugin"):
        assert side.probe(worker.run, "there is a reason not to") is None
    assert "there is a reason not to" in caplog.text
    assert not worker.steps
    assert side._contain.faults == 0


def test_an_operator_can_leave_the_probe_out(caplog: pytest.LogCaptureFixture) -> None:
    side, worker = (
        WorkerSide(PdConfig(probe="never"), EngineId("engine"), RankPlace(0, 0, 1, 1)),
        Worker(),
    )
    try:
        with caplog.at_level("WARNING", "vllm_pd_plugin"):
            assert side.probe(worker.run, "") is None
        assert "probe=never" in caplog.text
        assert not worker.steps
    finally:
        side._loop.close()
