"""vLLM's own series and log line, where the engine is a pool of engines.

Of what vLLM's loggers tell, an API server counts a part itself, from the outputs that it gives to
clients: that is as true here as on one engine. The rest an engine core would tell. Here engines say
how busy they are, which is told as the core's would be; what no engine tells a frontend is left
out, as a series that stays at 0 would be taken for the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import LoggingStatLogger, PrometheusStatLogger, StatLoggerManager
from vllm.v1.metrics.perf import PerfMetricsProm
from vllm.v1.metrics.stats import SchedulerStats

from vllm_pd_plugin.frontend.pool.members import Member
from vllm_pd_plugin.frontend.telemetry.metrics import MetricKinds

OF_ENGINES = frozenset(
    {
        "vllm:cache_config_info", "vllm:engine_sleep_state", "vllm:estimated_flops_per_gpu",
        "vllm:estimated_read_bytes_per_gpu", "vllm:estimated_write_bytes_per_gpu",
        "vllm:external_prefix_cache_hits", "vllm:external_prefix_cache_queries",
        "vllm:iteration_tokens_total", "vllm:kv_block_idle_before_evict_seconds",
        "vllm:kv_block_lifetime_seconds", "vllm:kv_block_reuse_gap_seconds",
        "vllm:lora_requests_info", "vllm:mm_cache_hits",
        "vllm:mm_cache_queries", "vllm:num_preemptions", "vllm:num_requests_kv_fetch_by_stage",
        "vllm:num_requests_waiting_by_reason", "vllm:prefix_cache_hits",
        "vllm:prefix_cache_queries", "vllm:prompt_tokens_cached_by_source",
        "vllm:request_num_preemptions",
    }
)  # fmt: skip
"""Families of vLLM's series that only an engine can fill."""


class _Absent:
    """A series that nobody sees."""

    def labels(self, *values: Any, **named: Any) -> _Absent:
        return self

    def ignore(self, value: float = 1.0) -> None:
        """Take a value, and do nothing with it."""

    inc = set = observe = ignore


def make_loggers(config: VllmConfig, kinds: MetricKinds) -> StatLoggerManager:
    """Return vLLM's own loggers, for a pool: its series, made as ``kinds`` says, and its line."""

    class PoolPerfMetrics(PerfMetricsProm):
        _counter_cls = staticmethod(_without_engines(kinds.counter))

    class PoolStatLogger(PrometheusStatLogger):
        _gauge_cls = staticmethod(_without_engines(kinds.gauge, live=True))
        _counter_cls = staticmethod(_without_engines(kinds.counter))
        _histogram_cls = staticmethod(_without_engines(kinds.histogram))
        _perf_metrics_cls = PoolPerfMetrics

    return StatLoggerManager(
        vllm_config=config,
        engine_idxs=[0],
        custom_stat_loggers=[PoolLogLine, PoolStatLogger],
        enable_default_loggers=False,
    )


class PoolLogLine(LoggingStatLogger):
    """The line every ten seconds: of all engines, and of the tokens that went through here."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        super().__init__(vllm_config, engine_index)
        self.kv_cache_device = "Mean"

    @property
    def log_prefix(self) -> str:
        return "Pool: "


def load_of(members: Iterable[Member]) -> SchedulerStats:
    """Return how busy the engines are that are there, as one engine core would tell it.

    The requests are those of all frontends, and one that is handed off is on two engines; the KV
    usage is a share of all KV memory.
    """
    there = [member for member in members if member.is_up]
    kv_tokens = sum(member.link.description.kv_tokens for member in there)
    used = sum(member.load.kv_usage * member.link.description.kv_tokens for member in there)
    return SchedulerStats(
        num_running_reqs=sum(member.load.running for member in there),
        num_waiting_reqs=sum(member.load.waiting for member in there),
        kv_cache_usage=used / kv_tokens if kv_tokens else 0.0,
    )


def _without_engines(make: Callable[..., Any], live: bool = False) -> Callable[..., Any]:
    """live: of several workers, let those not speak that have ended."""

    def make_or_leave_out(name: str, **more: Any) -> Any:
        if name in OF_ENGINES or name.removesuffix("_total") in OF_ENGINES:
            return _Absent()
        if live and more.get("multiprocess_mode") == "mostrecent":
            more["multiprocess_mode"] = "livemostrecent"
        return make(name=name, **more)

    return make_or_leave_out
