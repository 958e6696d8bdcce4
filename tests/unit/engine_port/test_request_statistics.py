"""An engine's own metrics of what frontends have sent it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator

import pytest

from tests.fakes.series import newly_registered, value

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import (
        EngineCoreEvent,
        EngineCoreEventType,
        EngineCoreOutputs,
        FinishReason,
    )
    from vllm.v1.metrics.loggers import LoggingStatLogger, StatLoggerManager
    from vllm.v1.metrics.stats import IterationStats, PrefillStats, SchedulerStats
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    from tests.fakes.engine_core import FakeFrontend, ServingEngine
    from tests.fakes.stat_loggers import make_config
    from vllm_pd_plugin.edge.hooks import count_frontends_requests
    from vllm_pd_plugin.engine_port.request_statistics import carried

LENGTH, ABORT = FinishReason.LENGTH, FinishReason.ABORT


@pytest.fixture
def api_server() -> Iterator[StatLoggerManager]:
    """The loggers of an engine's API server, as our plug-in has changed them."""
    count_frontends_requests()
    with newly_registered():
        yield StatLoggerManager(make_config(), custom_stat_loggers=[LoggingStatLogger],
                                enable_default_loggers=False)  # fmt: skip


def over_the_wire(outputs: EngineCoreOutputs) -> EngineCoreOutputs:
    decoded: EngineCoreOutputs
    decoded = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(outputs))
    return decoded


def tell(engine: ServingEngine, api_server: StatLoggerManager) -> int:
    """Let the API server take what it is told, as vLLM's output handler does."""
    engine.server.turn()
    told = engine.told()
    for outputs in told:
        outputs = over_the_wire(outputs)
        assert not outputs.outputs
        api_server.record(
            engine_idx=0, scheduler_stats=outputs.scheduler_stats, iteration_stats=None
        )
    return len(told)


def events(queued: float, scheduled: float) -> list[EngineCoreEvent]:
    return [
        EngineCoreEvent(EngineCoreEventType.QUEUED, queued),
        EngineCoreEvent(EngineCoreEventType.SCHEDULED, scheduled),
    ]


def prompt_of(num_tokens: int, cached: int = 0, external: int = 0) -> PrefillStats:
    stats = PrefillStats()
    stats.set(num_tokens, cached, external)
    return stats


def answer(engine: ServingEngine, frontend: FakeFrontend, request_id: str = "r") -> None:
    """A request that gets three tokens."""
    frontend.add(request_id)
    first = {"prefill_stats": prompt_of(4, external=3), "events": events(10.0, 10.5)}
    engine.give(frontend, 1, request_id=request_id, timestamp=11.0, **first)
    engine.give(frontend, 2, request_id=request_id, timestamp=11.25)
    engine.give(frontend, 3, request_id=request_id, timestamp=11.5, finish=LENGTH)


def of_engine(name: str, **labels: str) -> float:
    return value(name, model_name="M", engine="0", **labels)


def test_tokens_and_requests_of_frontends_count_on_the_engine(
    engine: ServingEngine, frontend: FakeFrontend, api_server: StatLoggerManager
) -> None:
    before = time.time()
    answer(engine, frontend)
    tell(engine, api_server)
    assert of_engine("vllm:prompt_tokens_total") == 4
    assert of_engine("vllm:prompt_tokens_by_source_total", source="external_kv_transfer") == 3
    assert of_engine("vllm:prompt_tokens_by_source_total", source="local_compute") == 1
    assert of_engine("vllm:generation_tokens_total") == 3
    assert of_engine("vllm:request_success_total", finished_reason="length") == 1
    assert of_engine("vllm:iteration_tokens_total_count") == 3
    assert of_engine("vllm:iteration_tokens_total_sum") == 4  # one was computed, three sampled
    assert of_engine("vllm:inter_token_latency_seconds_sum") == pytest.approx(0.5)
    assert of_engine("vllm:request_queue_time_seconds_sum") == pytest.approx(0.5)
    assert of_engine("vllm:request_prefill_time_seconds_sum") == pytest.approx(0.5)
    assert of_engine("vllm:request_params_max_tokens_sum") == 8
    assert 0 <= of_engine("vllm:e2e_request_latency_seconds_sum") <= time.time() - before


def test_its_log_line_has_them_too(
    engine: ServingEngine, frontend: FakeFrontend, api_server: StatLoggerManager
) -> None:
    answer(engine, frontend)
    tell(engine, api_server)
    (adapter, _) = api_server.stat_loggers
    (line,) = adapter.per_engine_stat_loggers.values()
    assert (line.num_generation_tokens, line.num_prompt_tokens) == (3, 1)


def test_what_came_through_the_api_server_is_counted_beside_it_and_once(
    engine: ServingEngine, frontend: FakeFrontend, api_server: StatLoggerManager
) -> None:
    own = IterationStats()
    own.num_generation_tokens = 10
    api_server.record(SchedulerStats(2, kv_cache_usage=0.5), own)
    answer(engine, frontend)
    tell(engine, api_server)
    assert of_engine("vllm:generation_tokens_total") == 13
    # Nothing of what the scheduler has told is overwritten.
    assert of_engine("vllm:num_requests_running") == 2
    assert of_engine("vllm:kv_cache_usage_perc") == 0.5


def test_the_connector_s_own_counts_go_their_way(api_server: StatLoggerManager) -> None:
    stats = SchedulerStats(1, kv_connector_stats={"fetches": []})
    assert carried(stats) is None
    assert carried(None) is None
    assert carried(SchedulerStats()) is None


def test_frontends_that_get_outputs_of_one_step_share_it(
    engine: ServingEngine, frontend: FakeFrontend, api_server: StatLoggerManager
) -> None:
    other = engine.frontend("other")
    other.attach()
    for number, each in enumerate((frontend, other)):
        each.add(f"r{number}")
        engine.give(each, 1, 2, request_id=f"r{number}", timestamp=5.0 + number * 1e-5)
    tell(engine, api_server)
    assert of_engine("vllm:iteration_tokens_total_count") == 1
    assert of_engine("vllm:generation_tokens_total") == 4


def test_the_api_server_is_not_woken_at_every_step(
    engine: ServingEngine, frontend: FakeFrontend, api_server: StatLoggerManager
) -> None:
    frontend.add()
    told = []
    for step in range(9):
        engine.give(frontend, step, timestamp=1.0 + step)
        engine.server.turn()
        told.append(len(engine.told()))
        engine.clock.advance(0.0625)
    assert told == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    # And the last steps are not forgotten: it looks again when they are due.
    engine.give(frontend, 9, timestamp=20.0, finish=LENGTH)
    due = engine.server.turn()
    assert due is not None
    engine.clock.advance(due - engine.clock())
    assert tell(engine, api_server) == 1
    assert of_engine("vllm:request_success_total", finished_reason="length") == 1


def test_nothing_is_kept_of_requests_that_are_over(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    assert engine.server._counts is not None
    frontend.add("answered")
    engine.give(frontend, 1, request_id="answered", finish=LENGTH)
    frontend.add("given up")
    frontend.abort("given up")
    engine.core.refusal = ValueError("not here")
    frontend.add("refused")
    engine.core.refusal = None
    frontend.add("open")
    assert len(engine.server._counts) == 1
    frontend.attach()  # anew: what it had open is ended
    assert len(engine.server._counts) == 0


def test_what_still_comes_of_a_request_that_was_given_up_is_not_counted(
    engine: ServingEngine, frontend: FakeFrontend, api_server: StatLoggerManager
) -> None:
    frontend.add()
    engine.give(frontend, 1, timestamp=1.0)
    frontend.abort("r")
    engine.give(frontend, 2, timestamp=2.0, finish=ABORT)
    tell(engine, api_server)
    assert of_engine("vllm:generation_tokens_total") == 1
    assert of_engine("vllm:request_success_total", finished_reason="abort") == 0


def test_an_engine_that_keeps_no_statistics_keeps_none_of_these() -> None:
    engine = ServingEngine(log_stats=False)
    frontend = engine.frontend()
    frontend.attach()
    answer(engine, frontend)
    engine.server.turn()
    assert engine.told() == []
    assert len(frontend.outputs()) == 3
    engine.server.close()


def test_a_fault_in_counting_costs_no_output(
    engine: ServingEngine, frontend: FakeFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(outputs: EngineCoreOutputs) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(engine.server._counts, "gave_out", fail)
    frontend.add()
    engine.give(frontend, 1)
    assert [output.new_token_ids for output in frontend.outputs()] == [[1]]
    assert engine.server.faults == 1
