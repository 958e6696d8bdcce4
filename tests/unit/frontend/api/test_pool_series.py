"""vLLM's own series and log line on a frontend: right, or not there."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import prometheus_client
import pytest

from tests.fakes.series import newly_registered, value

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager
    from vllm.v1.metrics.stats import IterationStats, PrefillStats

    from tests.fakes.links import link_of, make_member
    from tests.fakes.stat_loggers import make_config
    from vllm_pd_plugin.engine_port.messages import EngineLoad
    from vllm_pd_plugin.frontend.api.pool_series import OF_ENGINES, load_of, make_loggers
    from vllm_pd_plugin.frontend.pool.members import Member
    from vllm_pd_plugin.frontend.routing.choice import Role
    from vllm_pd_plugin.frontend.telemetry.metrics import MetricKinds

OF_CLIENTS = {
    "vllm:admission_rejections", "vllm:e2e_request_latency_seconds", "vllm:generation_tokens",
    "vllm:inter_token_latency_seconds", "vllm:prompt_tokens", "vllm:prompt_tokens_by_source",
    "vllm:prompt_tokens_cached", "vllm:request_decode_time_seconds",
    "vllm:request_generation_tokens", "vllm:request_inference_time_seconds",
    "vllm:request_max_num_generation_tokens", "vllm:request_params_max_tokens",
    "vllm:request_params_n", "vllm:request_prefill_kv_computed_tokens",
    "vllm:request_prefill_time_seconds", "vllm:request_prompt_tokens",
    "vllm:request_queue_time_seconds", "vllm:request_success",
    "vllm:request_time_per_output_token_seconds", "vllm:time_to_first_token_seconds",
}  # fmt: skip
"""What an API server counts by itself, from what it gives to clients."""
OF_THE_POOL = {
    "vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting",
}  # fmt: skip
ELSEWHERE = {"vllm:kv_block_idle_before_evict_seconds", "vllm:kv_block_lifetime_seconds",
             "vllm:kv_block_reuse_gap_seconds", "vllm:lora_requests_info",
             "vllm:cache_config_info", "vllm:num_requests_kv_fetch_by_stage"}  # fmt: skip
"""Series of engines that vLLM makes only with an option, or later."""


@pytest.fixture
def config() -> Iterator[Any]:
    with newly_registered():
        yield make_config()


@pytest.fixture
def loggers(config: Any) -> StatLoggerManager:
    return make_loggers(config, MetricKinds())


def names() -> set[str]:
    """Every family of vLLM's that is registered."""
    families = prometheus_client.REGISTRY.collect()
    return {family.name for family in families if family.name.startswith("vllm:")}


def engine(url: str, load: EngineLoad, kv_tokens: int = 1000, is_up: bool = True) -> Member:
    member = make_member(url, Role.DECODE, kv_tokens=kv_tokens)
    member.set_load(load)
    link_of(member).is_attached = is_up
    return member


def pool_value(name: str) -> float:
    return value(name, model_name="M", engine="0")


def test_every_series_of_vllm_is_either_right_here_or_left_out(config: Any) -> None:
    PrometheusStatLogger(config)
    of_vllm = names()
    assert of_vllm == OF_CLIENTS | OF_THE_POOL | (OF_ENGINES - ELSEWHERE)
    make_loggers(config, MetricKinds())
    assert names() == OF_CLIENTS | OF_THE_POOL


def test_the_pool_s_load_is_told_as_an_engine_s(loggers: StatLoggerManager) -> None:
    members = [
        engine("a", EngineLoad(3, 2, 50, 0.5), kv_tokens=1000),
        engine("b", EngineLoad(4, 0, 0, 0.1), kv_tokens=3000),
        engine("gone", EngineLoad(9, 9, 9, 1.0), is_up=False),
    ]
    loggers.record(load_of(members), None)
    assert pool_value("vllm:num_requests_running") == 7
    assert pool_value("vllm:num_requests_waiting") == 2
    assert pool_value("vllm:kv_cache_usage_perc") == pytest.approx(0.2)
    loggers.record(load_of(members[2:]), None)
    assert pool_value("vllm:num_requests_running") == 0
    assert pool_value("vllm:kv_cache_usage_perc") == 0


def test_tokens_are_counted_as_they_go_to_clients(loggers: StatLoggerManager) -> None:
    step = IterationStats()
    step.num_generation_tokens = 5
    prompt = PrefillStats()
    prompt.set(100, 16, 64)
    step.prompt_token_stats.update_from_output(prompt)
    loggers.record(None, step)
    assert pool_value("vllm:generation_tokens_total") == 5
    assert pool_value("vllm:prompt_tokens_total") == 100


def test_the_log_line_says_what_the_pool_does(
    loggers: StatLoggerManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    step = IterationStats()
    step.num_generation_tokens = 50
    loggers.record(load_of([engine("a", EngineLoad(3, 2, 50, 0.25))]), step)
    with caplog.at_level(logging.INFO, logger="vllm"):
        loggers.log()
    (line,) = [each for each in caplog.messages if "Running" in each]
    assert line.startswith("Pool: ")
    assert "Running: 3 reqs, Waiting: 2 reqs, Mean KV cache usage: 25.0%" in line
    assert "generation throughput: 0.0" not in line
