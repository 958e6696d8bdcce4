"""When a step's KV counts as written, by how vLLM launches the forward pass on a GPU.

A GPU's stream and graphs are fakes here; what captures, replays and calls our hooks is vLLM's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    import torch
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from tests.fakes.forward import Graphs, RunnerV1, RunnerV2, connected
    from tests.fakes.stepping_engine import SteppingEngine
    from vllm_pd_plugin import CONNECTOR
    from vllm_pd_plugin.edge.worker import _mark_cuda_stream

PROMPT = list(range(100, 140))
BY_LAYER = [
    "input", "write 0", "attend 0", "event", "write 1", "attend 1", "event", "sample",
]  # fmt: skip
AS_A_WHOLE = ["input", "write 0", "attend 0", "write 1", "attend 1", "event", "sample"]
Runner = type[RunnerV1] | type[RunnerV2]


@pytest.fixture(params=[RunnerV1, RunnerV2], ids=["V1", "V2"])
def engine(request: pytest.FixtureRequest) -> Iterator[SteppingEngine]:
    engine = SteppingEngine("prefill", runner=request.param, stretch_bytes=1)
    yield engine
    engine.close()


def hands_off(engine: SteppingEngine, name: str = "r") -> None:
    engine.add(name, PROMPT, {"do_remote_decode": True})


def launched(engine: SteppingEngine) -> list[str]:
    """Return what the next step launches."""
    before = engine.stream.num_launched
    engine.schedule()
    return engine.stream.launched[before:]


@pytest.mark.parametrize("graphs", [Graphs.EAGER, Graphs.PIECEWISE, Graphs.BREAKABLE])
def test_each_layer_counts_when_its_attention_was_launched(
    engine: SteppingEngine, graphs: Graphs
) -> None:
    engine.graphs = graphs
    hands_off(engine)
    assert launched(engine) == BY_LAYER


def test_layers_in_one_graph_count_when_it_was_launched(engine: SteppingEngine) -> None:
    """A replay calls no hook. The event comes before what is sampled, with either runner."""
    engine.graphs = Graphs.FULL
    hands_off(engine)
    assert launched(engine) == AS_A_WHOLE


def test_steps_as_a_whole_and_in_pieces_may_alternate(engine: SteppingEngine) -> None:
    """As they do with ``FULL_AND_PIECEWISE``, vLLM's default."""
    for number, graphs in enumerate((Graphs.PIECEWISE, Graphs.FULL) * 2):
        engine.graphs = graphs
        hands_off(engine, f"r{number}")
        assert launched(engine) == (AS_A_WHOLE if graphs is Graphs.FULL else BY_LAYER)
        engine.finish()
        engine.scheduler.reset_prefix_cache()


@pytest.mark.parametrize("graphs", list(Graphs))
def test_what_is_not_handed_off_is_not_marked(engine: SteppingEngine, graphs: Graphs) -> None:
    engine.graphs = graphs
    engine.add("r", PROMPT)
    assert "event" not in launched(engine)


@pytest.mark.parametrize("graphs", list(Graphs))
def test_a_dummy_run_says_nothing(engine: SteppingEngine, graphs: Graphs) -> None:
    """A rank with nothing to compute makes them for the other data parallel ranks."""
    hands_off(engine)
    engine.schedule()
    before = engine.stream.num_launched
    with connected(engine.connector):
        if isinstance(engine.runner, RunnerV2):
            engine.runner.active.set_disabled(True)
        engine.forward.launch(graphs)
        if isinstance(engine.runner, RunnerV2):
            engine.runner.active.set_disabled(False)
    assert "event" not in engine.stream.launched[before:]


@pytest.mark.parametrize("graphs", list(Graphs))
def test_with_speculation_all_layers_count_though_it_saves_late(graphs: Graphs) -> None:
    """Model runner V1 saves when it has sampled and drafted, and what drafts keep is no KV here."""
    engine = SteppingEngine("prefill", False, RunnerV1, stretch_bytes=1)
    assert isinstance(engine.runner, RunnerV1)
    engine.runner.speculates = True
    engine.graphs = graphs
    try:
        hands_off(engine)
        late = ["input", "write 0", "attend 0", "write 1", "attend 1", "sample", "event"]
        assert launched(engine) == (late if graphs is Graphs.FULL else BY_LAYER)
    finally:
        engine.close()


def test_full_graphs_stay_allowed() -> None:
    """With them a decode step stays one launch; a prompt's last layers are not worth more."""
    cls = KVConnectorFactory.get_connector_class_by_name(CONNECTOR)
    assert not cls.requires_piecewise_for_cudagraph({})


class FakeEvent:
    """Of the stream that is current where it is recorded."""

    def __init__(self) -> None:
        self.recorded: list[tuple[Any, ...]] = []
        self.is_reached = False

    def record(self, *stream: Any) -> None:
        self.recorded.append(stream)

    def query(self) -> bool:
        assert self.recorded, "an event that was not recorded is always reached"
        return self.is_reached


def test_a_mark_is_an_event_of_the_stream_on_which_vllm_launches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[FakeEvent] = []

    def new_event() -> FakeEvent:
        events.append(FakeEvent())
        return events[-1]

    monkeypatch.setattr(torch.cuda, "Event", new_event)
    marks: list[Callable[[], bool]] = [_mark_cuda_stream(), _mark_cuda_stream()]
    assert [event.recorded for event in events] == [[()], [()]]
    events[0].is_reached = True
    assert [mark() for mark in marks] == [True, False]
