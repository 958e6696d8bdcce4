"""Ranks of several pipeline stages: what each notes in a step, and what they come to together."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.fakes.consumer import Consumer, new_source
from tests.fakes.shapes import Shape
from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import new_incarnation
from vllm_pd_plugin.mapping.kv_cache import EngineKvCache, RankPlace
from vllm_pd_plugin.memory.layout import RankMemory, Region
from vllm_pd_plugin.transfer.announcer import Announcement, Mark
from vllm_pd_plugin.transfer.specs import FetchCounts, FetchResult

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.fakes.bare_engine import _identify
    from vllm_pd_plugin.edge.description import EngineRole
    from vllm_pd_plugin.edge.metadata import FetchReport, RankHandshake, StepMetadata
    from vllm_pd_plugin.edge.scheduler import SchedulerSide
    from vllm_pd_plugin.edge.worker import WorkerSide

SHAPE = Shape(tp=2, stages=((0, 1), (2, 3, 4)), windowed=(3,))
CONTROL = (("127.0.0.1", 7000), new_incarnation())


# --- a worker in the forward pass ------------------------------------------------------------


class Worker:
    """A rank of the second stage, that notes its marks."""

    def __init__(self, stage: int = 1) -> None:
        self.side = WorkerSide(PdConfig(), "engine", RankPlace(stage, 0, 2, 2))
        self.marks: list[Mark] = []
        side: Any = self.side
        side._announcer = SimpleNamespace(
            add=self.marks.append, connect=lambda *_: None, set_lending=lambda _: None
        )
        side._plane = SimpleNamespace(set_lending=lambda _: None)
        side._loop.call = lambda act: act()
        layout = SHAPE.layout(stage)
        order = layout.forward_order()
        side._places = {layout.layers[region]: place for place, region in enumerate(order)}

    def step(self, *after_layers: tuple[int, ...]) -> None:
        announcement = Announcement(5, after_layers)
        self.side.step(StepMetadata((), (), {}, (), True, announcement, CONTROL))

    def written(self) -> list[int]:
        return [mark.num_layers for mark in self.marks]


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    close = type(worker.side._loop).close
    yield worker
    close(worker.side._loop)


def test_layers_are_counted_as_their_own_stage_has_them(worker: Worker) -> None:
    worker.step((1, 2), (2, 3))
    for layer in ("layers.2", "layers.3", "layers.4"):
        worker.side.layer_written(layer)
    assert worker.written() == [2, 3]
    worker.side.forward_ended()
    assert worker.written() == [2, 3]


def test_layers_of_other_stages_count_for_nothing(worker: Worker) -> None:
    worker.step((1, 2), (1, 2, 3))
    worker.side.layer_written("layers.0")
    worker.side.layer_written("layers.1")
    assert worker.written() == []
    worker.side.layer_written("layers.2")
    assert worker.written() == [1]


def test_at_the_end_of_a_step_all_layers_of_the_stage_are_written(worker: Worker) -> None:
    """Also where none of them has said so, as in a graph."""
    worker.step((1, 2), (1, 3))
    worker.side.forward_ended()
    assert worker.written() == [3]


# --- the scheduler's half, with all ranks -----------------------------------------------------


def handshakes() -> list[RankHandshake]:
    """Of two stages of two ranks, in the order of the ranks."""
    found = []
    for place in SHAPE.places:
        layout = SHAPE.layout(place.stage)
        base = 2**20 * (place.rank + 1)
        region = Region(base, 8, SHAPE.page_bytes, SHAPE.page_bytes)
        memory = RankMemory((region,) * len(layout.layers), bytes([place.rank]))
        kv_cache = EngineKvCache.seen_by_rank(layout, memory, place)
        found.append(RankHandshake(new_incarnation(), layout, kv_cache, memory))
    return found


def test_a_scheduler_says_what_the_ranks_of_all_stages_are() -> None:
    ranks = handshakes()
    side = SchedulerSide(
        PdConfig(allow_fp8=True), "engine", EngineRole(True, False, False), _identify
    )
    try:
        side.start(ranks)
        control: Any = side._control
        welcome = control._welcome
        assert welcome.kv_cache == EngineKvCache.merged([ranks[0].kv_cache, ranks[2].kv_cache])
        assert welcome.kv_cache.tensor_parallel_size == 2
        assert [welcome.kv_cache.layers_of(stage) for stage in (0, 1)] == [
            ["layers.0", "layers.1"], ["layers.2", "layers.4", "layers.3"],
        ]  # fmt: skip
        assert [rank.transport_metadata for rank in welcome.ranks] == [b"\0", b"\1", b"\2", b"\3"]
        assert control._workers == {rank.incarnation for rank in ranks}
        assert control._allow_fp8
        assert side._tp_size == 2
        assert side._producing._num_layers == [2, 3]
        assert control._exports._num_layers == [2, 3]
        assert control._exports.num_ranks == 4
        control._check_fit(msgspec.structs.replace(welcome))
    finally:
        side.close()


# --- blocks that lack tokens -------------------------------------------------------------------


def result(request_id: str, lacks_tokens: bool, reason: Reason | None = None) -> FetchResult:
    one = FetchResult(request_id, reason, FetchCounts(), Codec.RAW, 0.1, 0)
    return dataclasses.replace(one, lacks_tokens=lacks_tokens)


def test_a_worker_reports_whose_blocks_lack_tokens(worker: Worker) -> None:
    worker.side._results += [result("a", True), result("b", False)]
    worker.side.take_results()
    report = worker.side.take_report()
    assert report is not None
    assert report.lacking == {"a"}
    assert worker.side.take_report() is None


def test_what_one_rank_lacks_the_request_lacks() -> None:
    nothing: tuple[Any, ...] = ({}, {}, {}, {}, {})
    one, other = FetchReport(*nothing, {"a"}), FetchReport(*nothing, {"b"})
    assert one.aggregate(other).lacking == {"a", "b"}
    assert FetchReport(*nothing).aggregate(one).lacking == {"a"}


def disowned_by(consumer: Consumer) -> list[str]:
    """Return whose KV nobody is to find, from now on."""
    found: list[str] = []
    provenance: Any = SimpleNamespace(
        disown=lambda request: found.append(request.request_id), arrived=lambda *_: None
    )
    consumer.requests._provenance = provenance
    return found


def lacks(consumer: Consumer, *names: str) -> None:
    consumer.report(FetchReport({}, {}, {}, {}, {}, set(names)))


def test_what_lacks_tokens_is_found_by_nobody_else() -> None:
    consumer = Consumer()
    disowned = disowned_by(consumer)
    requests = [consumer.fetching(name, new_source()) for name in "rst"]
    lacks(consumer, "r", "t")
    for request in requests:
        consumer.collect(request)
    assert disowned == ["r", "t"]
    # Nor by itself, when it is preempted before its own KV has filled the block.
    assert [r.skip_reading_prefix_cache for r in requests] == [True, False, True]


def test_of_a_fetch_that_failed_only_what_is_kept_is_hidden() -> None:
    consumer = Consumer(recomputes=True)
    disowned = disowned_by(consumer)
    for name, valid_tokens in (("r", 32), ("s", 0)):
        request = consumer.fetching(name, new_source())
        lacks(consumer, name)
        consumer.collect(request, Reason.PEER_UNREACHABLE, valid_tokens)
    assert disowned == ["r"]


def test_a_later_request_of_the_same_name_is_not_mistaken_for_one_that_lacked() -> None:
    consumer = Consumer()
    disowned = disowned_by(consumer)
    for lacking in (True, False):
        request = consumer.fetching("r", new_source())
        if lacking:
            lacks(consumer, "r")
        consumer.collect(request)
        consumer.requests.finish("r")
    assert disowned == ["r"]
