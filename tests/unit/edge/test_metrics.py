"""What is counted, with vLLM's own base classes."""

from __future__ import annotations

import functools
import types
import warnings

import prometheus_client
import pytest

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.protocol.export_states import ExportState
from vllm_pd_plugin.transfer.specs import FetchCounts, FetchResult

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.edge.metrics import PdPromMetrics, PdStats


def fetched(
    wire_bytes: int = 1000, stretches: int = 3, seconds: float = 0.5, codec: Codec = Codec.INT4
) -> FetchResult:
    counts = FetchCounts(wire_bytes, 4 * wire_bytes, 7, stretches, packed=2)
    return FetchResult("r", None, counts, codec, seconds, 100)


def one_of_each() -> PdStats:
    stats = PdStats()
    stats.record_fetch(fetched())
    stats.record_failure(Reason.PRODUCER_ENDED)
    stats.record_retry(Reason.READ_FAILED)
    stats.record_ended(ExportState.EXPIRED)
    stats.record_withdrawal()
    stats.record_kept(64)
    stats.record_control(700)
    stats.record_dropped(2)
    stats.record_faults(1)
    stats.record_open({"producer": 1, "consumer": 5})
    return stats


def test_new_stats_are_empty() -> None:
    assert PdStats().is_empty()


@pytest.mark.parametrize("kind", PdStats().data)
def test_whatever_is_counted_makes_them_not_empty(kind: str) -> None:
    stats = PdStats()
    stats.data[kind] = one_of_each().data[kind]
    assert not stats.is_empty()
    stats.reset()
    assert stats.is_empty()


def test_counts_of_ranks_and_steps_add_up() -> None:
    stats = one_of_each().aggregate(one_of_each())
    assert stats.data == {
        "fetches": [[1000, 4000, 7, 3, 2, 0.5]] * 2,
        "codecs": {"int4": 2},
        "failures": {"producer_ended": 2},
        "retries": {"read_failed": 2},
        "ended": {"expired": 2},
        "withdrawals": 2,
        "kept_tokens": 128,
        "control_bytes": 1400,
        "dropped_messages": 4,
        "faults": 2,
        "open": {"producer": 1, "consumer": 5},
    }


def test_open_handoffs_are_those_of_the_newer() -> None:
    older, newer = one_of_each(), PdStats()
    assert one_of_each().aggregate(newer).data["open"] == {"producer": 1, "consumer": 5}
    newer.record_open({"producer": 0, "consumer": 2})
    assert older.aggregate(newer).data["open"] == {"producer": 0, "consumer": 2}


def test_the_log_line_sums_up_the_fetches() -> None:
    stats = PdStats()
    stats.record_fetch(fetched(wire_bytes=2**20, stretches=3, seconds=0.5))
    stats.record_fetch(fetched(wire_bytes=2**19, stretches=1, seconds=1.5))
    assert stats.reduce() == {
        "fetches": 2, "MiB": 1.5, "KV_MiB": 6.0, "descriptors": 14, "stretches": 4, "packed": 4,
        "mean_ms": 1000.0,
    }  # fmt: skip


def test_the_log_line_names_what_failed_and_how_the_producer_s_handoffs_ended() -> None:
    summary = one_of_each().reduce()
    assert summary["failed_producer_ended"] == 1
    assert summary["ended_expired"] == 1
    assert PdStats().reduce() == {"fetches": 0}


class Prometheus:
    """The series of a server with one engine, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = prometheus_client.CollectorRegistry()
        kinds = (
            prometheus_client.Counter,
            prometheus_client.Gauge,
            prometheus_client.Histogram,
        )
        own = {kind: functools.partial(kind, registry=self._registry) for kind in kinds}
        config = types.SimpleNamespace(kv_transfer_config=None)
        self.metrics = PdPromMetrics(config, own, ["engine"], {0: ["0"]})

    def value(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(name, {"engine": "0", **labels})


@pytest.mark.parametrize(
    "name",
    [
        "pd_fetch_bytes_total",
        "pd_fetch_kv_bytes_total",
        "pd_fetch_packed_stretches_total",
        "pd_withdrawals_total",
        "pd_kept_tokens_total",
        "pd_control_bytes_total",
        "pd_leases_expired_total",
        "pd_dropped_messages_total",
        "pd_faults_total",
    ],
)
def test_a_series_without_a_reason_is_there_from_the_start(name: str) -> None:
    assert Prometheus().value(name) == 0


def test_every_count_reaches_its_series() -> None:
    prometheus = Prometheus()
    for _ in range(2):
        prometheus.metrics.observe(one_of_each().data)
    expected = {
        "pd_fetch_bytes_total": 2000,
        "pd_fetch_kv_bytes_total": 8000,
        "pd_fetch_descriptors_total": 14,
        "pd_fetch_stretches_total": 6,
        "pd_fetch_packed_stretches_total": 4,
        "pd_fetch_seconds_count": 2,
        "pd_withdrawals_total": 2,
        "pd_kept_tokens_total": 128,
        "pd_control_bytes_total": 1400,
        "pd_leases_expired_total": 2,
        "pd_dropped_messages_total": 4,
        "pd_faults_total": 2,
    }
    assert {name: prometheus.value(name) for name in expected} == expected
    assert prometheus.value("pd_fetch_seconds_sum") == 1.0
    assert prometheus.value("pd_fetches_total", codec="int4") == 2
    assert prometheus.value("pd_handoff_failures_total", reason="producer_ended") == 2
    assert prometheus.value("pd_producer_handoffs_total", state="expired") == 2
    assert prometheus.value("pd_handoff_retries_total", reason="read_failed") == 2
    assert prometheus.value("pd_handoffs_open", side="producer") == 1
    assert prometheus.value("pd_handoffs_open", side="consumer") == 5


def test_fetches_are_counted_by_codec() -> None:
    prometheus, stats = Prometheus(), PdStats()
    for codec in (Codec.RAW, Codec.INT8, Codec.RAW):
        stats.record_fetch(fetched(codec=codec))
    assert stats.data["codecs"] == {"raw": 2, "int8": 1}
    prometheus.metrics.observe(stats.data)
    assert prometheus.value("pd_fetches_total", codec="raw") == 2
    assert prometheus.value("pd_fetches_total", codec="int8") == 1
    assert prometheus.value("pd_fetches_total", codec="int2") is None


def test_open_handoffs_that_were_not_counted_leave_the_gauge_as_it_is() -> None:
    prometheus = Prometheus()
    prometheus.metrics.observe(one_of_each().data)
    prometheus.metrics.observe(PdStats().data)
    assert prometheus.value("pd_handoffs_open", side="consumer") == 5
