"""Which steps' statistics an engine's API server is told."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from tests.fakes.clock import FakeClock

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats
    from vllm.v1.spec_decode.metrics import SpecDecodingStats

    from vllm_pd_plugin.engine_port.step_statistics import StepStatistics


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(0.0)


@pytest.fixture
def statistics(clock: FakeClock) -> StepStatistics:
    return StepStatistics(clock)


def test_gauges_are_told_four_times_a_second(statistics: StepStatistics, clock: FakeClock) -> None:
    told = []
    for _ in range(8):
        told.append(statistics.are_due(SchedulerStats(3, kv_cache_usage=0.5)))
        clock.advance(0.125)
    assert told == [True, False] * 4


@pytest.mark.parametrize(
    "gauge", ["num_running_reqs", "num_waiting_reqs", "num_skipped_waiting_reqs"]
)
def test_the_last_step_before_an_engine_falls_idle_is_told(
    statistics: StepStatistics, gauge: str
) -> None:
    busy = SchedulerStats(**{gauge: 1})
    idle = SchedulerStats(connector_prefix_cache_stats=PrefixCacheStats())
    assert [statistics.are_due(each) for each in (busy, busy, idle)] == [True, False, True]


@pytest.mark.parametrize(
    "counted",
    [
        {"prefix_cache_stats": PrefixCacheStats(requests=1, queries=10)},
        {"prefix_cache_stats": PrefixCacheStats(reset=True)},
        {"connector_prefix_cache_stats": PrefixCacheStats(requests=1, hits=5)},
        {"kv_connector_stats": {"fetches": 1}},
        {"spec_decoding_stats": SpecDecodingStats(num_spec_tokens=2, num_drafts=1)},
    ],
)
def test_what_a_step_has_counted_is_always_told(
    statistics: StepStatistics, counted: dict[str, Any]
) -> None:
    stats = [SchedulerStats(1), SchedulerStats(1, **counted), SchedulerStats(1)]
    assert [statistics.are_due(each) for each in stats] == [True, True, False]
