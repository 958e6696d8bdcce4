"""Classes of requests and their objectives, and what counts for goodput."""

from __future__ import annotations

from collections.abc import Iterator

import prometheus_client
import pytest

from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.telemetry.metrics import (
    FrontendMetrics,
    Objectives,
    Timeline,
    parse_slo,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500/50", ("default", Objectives(0.5, 0.05))),
        ("batch=10000/200", ("batch", Objectives(10.0, 0.2))),
    ],
)
def test_objectives_are_read(text: str, expected: tuple[str, Objectives]) -> None:
    assert parse_slo(text) == expected


@pytest.mark.parametrize("text", ["", "500", "a=b/c", "=500/50", "x=0/50", "x=500/-1", "500/50/5"])
def test_what_is_no_objective_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="NAME=TTFT_MS/TPOT_MS"):
        parse_slo(text)


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "are_met"),
    [(0.5, 0.05, True), (0.51, 0.05, False), (0.5, 0.051, False), (0.1, None, True)],
)
def test_both_objectives_must_be_met(ttft_s: float, tpot_s: float | None, are_met: bool) -> None:
    assert Objectives(0.5, 0.05).are_met(ttft_s, tpot_s) is are_met


@pytest.fixture
def metrics() -> Iterator[FrontendMetrics]:
    before = set(prometheus_client.REGISTRY._collector_to_names)
    yield FrontendMetrics({"fast": Objectives(0.5, 0.1)})
    for collector in set(prometheus_client.REGISTRY._collector_to_names) - before:
        prometheus_client.REGISTRY.unregister(collector)


def value(name: str, **labels: str) -> float:
    found = prometheus_client.REGISTRY.get_sample_value(name, labels)
    assert found is not None
    return found


def answer(metrics: FrontendMetrics, slo_class: str, times: list[float]) -> Timeline:
    timeline = Timeline(0.0, metrics.slo_class(slo_class))
    for at in times:
        metrics.gave(timeline, at, 1)
    metrics.finished(timeline)
    return timeline


def test_times_are_measured_from_arrival_and_between_tokens(metrics: FrontendMetrics) -> None:
    timeline = answer(metrics, "fast", [0.4, 0.5, 0.8])
    assert timeline.ttft_s == 0.4
    assert timeline.tpot_s == pytest.approx(0.2)
    assert value("pd_frontend_ttft_seconds_sum", slo_class="fast") == 0.4
    assert value("pd_frontend_ttst_seconds_sum", slo_class="fast") == pytest.approx(0.1)
    assert value("pd_frontend_tpot_seconds_sum", slo_class="fast") == pytest.approx(0.2)
    assert value("pd_frontend_itl_seconds_sum") == pytest.approx(0.4)


def test_goodput_counts_what_met_the_objectives_of_its_class(metrics: FrontendMetrics) -> None:
    answer(metrics, "fast", [0.4, 0.45, 0.5])
    answer(metrics, "fast", [0.6, 0.65])  # the first token too late
    answer(metrics, "fast", [0.4, 0.9])  # the second
    answer(metrics, "fast", [])  # none at all
    assert value("pd_frontend_requests_total", slo_class="fast") == 4
    assert value("pd_frontend_goodput_requests_total", slo_class="fast") == 1


def test_a_class_that_nobody_has_promised_anything_is_the_default(metrics: FrontendMetrics) -> None:
    answer(metrics, "invented by a client", [9.0])
    assert value("pd_frontend_requests_total", slo_class="default") == 1
    assert value("pd_frontend_goodput_requests_total", slo_class="default") == 1
