"""Classes of requests and their objectives, and what counts for goodput."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.series import counting, reasons, value, values
from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.admission import Refusal
from vllm_pd_plugin.frontend.requests.endings import Ending
from vllm_pd_plugin.frontend.telemetry.metrics import FrontendMetrics
from vllm_pd_plugin.frontend.telemetry.outcomes import Objectives, Outcome, Timeline, parse_slo


def test_only_reasons_that_can_occur_have_a_series() -> None:
    with counting({}):
        assert reasons("pd_frontend_retries_total") == {
            "engine_lost", "engine_stopped", "request_failed", "timeout",
        }  # fmt: skip
        assert reasons("pd_frontend_pair_breakers_opened_total") == {
            "request_failed", "timeout", "recomputed",
        }  # fmt: skip


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
    with counting({"fast": Objectives(0.5, 0.1)}) as metrics:
        yield metrics


def answer(metrics: FrontendMetrics, slo_class: str, times: list[float]) -> Timeline:
    """A choice arrives at 0, and gets a token at each of these times."""
    timeline = metrics.begin(0.0, slo_class)
    for at in times:
        metrics.gave(timeline, at, 1)
    metrics.finished(timeline)
    metrics.ended(timeline, None)
    return timeline


def outcomes(slo_class: str) -> dict[str, float]:
    """How the requests of a class have ended."""
    counts = {
        outcome.value: value(
            "pd_frontend_requests_total", slo_class=slo_class, outcome=outcome.value
        )
        for outcome in Outcome
    }
    return {outcome: count for outcome, count in counts.items() if count}


def good(slo_class: str) -> float:
    return value("pd_frontend_goodput_requests_total", slo_class=slo_class)


def test_times_are_measured_from_arrival_and_between_tokens(metrics: FrontendMetrics) -> None:
    timeline = answer(metrics, "fast", [0.4, 0.5, 0.8])
    assert timeline.ttft_s == 0.4
    assert timeline.tpot_s == pytest.approx(0.2)
    assert value("pd_frontend_ttft_seconds_sum", slo_class="fast") == 0.4
    assert value("pd_frontend_ttst_seconds_sum", slo_class="fast") == pytest.approx(0.1)
    assert value("pd_frontend_tpot_seconds_sum", slo_class="fast") == pytest.approx(0.2)
    assert value("pd_frontend_itl_seconds_sum", slo_class="fast") == pytest.approx(0.4)


def test_goodput_counts_what_met_the_objectives_of_its_class(metrics: FrontendMetrics) -> None:
    answer(metrics, "fast", [0.4, 0.45, 0.5])
    answer(metrics, "fast", [0.6, 0.65])  # the first token too late
    answer(metrics, "fast", [0.4, 0.9])  # the second
    answer(metrics, "fast", [])  # none at all
    assert outcomes("fast") == {"answered": 4}
    assert good("fast") == 1


def test_a_class_that_nobody_has_promised_anything_is_the_default(metrics: FrontendMetrics) -> None:
    answer(metrics, "invented by a client", [9.0])
    assert outcomes("default") == {"answered": 1}
    assert good("default") == 1


def test_every_request_of_a_class_is_counted_however_it_ended(metrics: FrontendMetrics) -> None:
    answer(metrics, "fast", [0.1])
    for ending in (Ending.DEADLINE, Ending.NO_ENGINE):
        metrics.ended(metrics.begin(0.0, "fast"), ending)
    waited = metrics.begin(0.0, "fast")
    metrics.ended(waited, None)
    had_enough = metrics.begin(0.0, "fast")
    metrics.gave(had_enough, 0.1, 1)
    metrics.ended(had_enough, None)
    metrics.refused("fast", Refusal.OVERLOADED)
    assert outcomes("fast") == {"answered": 1, "failed": 2, "gone": 2, "refused": 1}
    assert good("fast") == 1
    assert outcomes("default") == {}
    assert values("pd_frontend_failures_total", "reason") == {"deadline": 1, "no_engine": 1}
    assert values("pd_frontend_failures_total", "slo_class") == {"fast": 2}


@pytest.mark.parametrize(("slowest", "expected"), [(0.4, 1), (0.6, 0)])
def test_several_choices_are_one_request_and_good_only_if_each_is(
    metrics: FrontendMetrics, slowest: float, expected: int
) -> None:
    with metrics.one_request():
        timelines = [metrics.begin(0.0, "fast") for _ in range(3)]
    for timeline, at in zip(timelines, (0.1, slowest, 0.2), strict=True):
        assert outcomes("fast") == {}
        metrics.gave(timeline, at, 1)
        metrics.finished(timeline)
        metrics.ended(timeline, None)
    assert outcomes("fast") == {"answered": 1}
    assert good("fast") == expected
    assert metrics.totals.answers == 3  # work for engines all the same


def test_a_choice_that_fails_makes_the_request_fail_whatever_became_of_the_others(
    metrics: FrontendMetrics,
) -> None:
    with metrics.one_request():
        answered, fails, taken_along = (metrics.begin(0.0, "fast") for _ in range(3))
    metrics.gave(answered, 0.1, 1)
    metrics.finished(answered)
    metrics.ended(answered, None)
    metrics.ended(taken_along, None)
    metrics.ended(fails, Ending.DEADLINE)
    assert outcomes("fast") == {"failed": 1}
    assert values("pd_frontend_failures_total", "reason") == {"deadline": 1}
    assert good("fast") == 0


def test_choices_that_end_at_once_are_one_request_with_those_that_come(
    metrics: FrontendMetrics,
) -> None:
    with metrics.one_request():
        for _ in range(2):
            metrics.ended(metrics.begin(0.0, None), Ending.NO_ENGINE)
        assert outcomes("default") == {}
    assert outcomes("default") == {"failed": 1}


def test_a_request_that_is_not_valid_is_none(metrics: FrontendMetrics) -> None:
    with pytest.raises(ValueError, match="no prompt"), metrics.one_request():
        raise ValueError("no prompt")
    answer(metrics, "default", [0.1])
    assert outcomes("default") == {"answered": 1}


def test_all_series_with_a_class_are_there_before_anything_has_happened(
    metrics: FrontendMetrics,
) -> None:
    for name in ("default", "fast"):
        assert good(name) == 0
        assert value("pd_frontend_ttft_seconds_count", slo_class=name) == 0
        for ending in Ending:
            labels = {"slo_class": name, "reason": ending.value}
            assert value("pd_frontend_failures_total", **labels) == 0
