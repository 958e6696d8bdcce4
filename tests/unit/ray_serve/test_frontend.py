"""What a frontend on Ray Serve measures and is told."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from tests.fakes.clock import FakeClock
from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.deployment import parse_deployment

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's and Ray's, not ours
    from tests.fakes.links import link_of, make_member
    from vllm_pd_plugin.engine_port.messages import EngineLoad
    from vllm_pd_plugin.frontend.routing.choice import NoPrefill, Role
    from vllm_pd_plugin.frontend.telemetry.metrics import Totals
    from vllm_pd_plugin.ray_serve.demand import EngineSeen, Targets
    from vllm_pd_plugin.ray_serve.registry_frontend import (
        DemandMeter,
        parse_frontend,
        refuse_stores,
        targets_of,
    )


class _Dispatch:
    """A dispatch with some engines, and requests that wait."""

    def __init__(self, *members: Any) -> None:
        self.pool = members
        self.num_waiting = 2
        self.waiting_tokens = 700


def measure(meter: DemandMeter, totals: Totals, *members: Any) -> Any:
    dispatch: Any = _Dispatch(*members)
    return meter.measure(totals, dispatch)


def test_demand_is_what_has_changed_in_the_window() -> None:
    clock, totals = FakeClock(), Totals()
    meter = DemandMeter(clock, window_s=10.0)
    measure(meter, totals)
    for _ in range(40):
        clock.advance(0.5)
        totals.requests += 1
        totals.prompt_tokens += 100
        totals.answers += 1
        totals.answer_tokens += 60
        totals.intervals += 50
        totals.itl_s += 1.0
        demand = measure(meter, totals)
    assert demand.requests_per_s == pytest.approx(2.0)
    assert demand.prompt_tokens_per_s == pytest.approx(200.0)
    assert demand.answer_tokens == 60
    assert demand.itl_s == pytest.approx(0.02)
    assert demand.decoding == pytest.approx(2.0)
    assert (demand.waiting, demand.waiting_tokens) == (2, 700)
    clock.advance(20)
    measure(meter, totals)
    demand = measure(meter, totals)
    assert (demand.requests_per_s, demand.itl_s, demand.decoding) == (0.0, None, 0.0)
    assert demand.answer_tokens == 60  # as long as no others are known


def test_one_request_is_no_storm() -> None:
    clock, totals = FakeClock(), Totals()
    meter = DemandMeter(clock, window_s=10.0)
    measure(meter, totals)
    clock.advance(0.25)
    totals.requests += 1
    assert measure(meter, totals).requests_per_s == pytest.approx(0.1)


def test_engines_are_seen_that_take_requests() -> None:
    busy = make_member("http://d", Role.DECODE, max_num_seqs=64)
    busy.load = EngineLoad(running=3, waiting=0, waiting_tokens=12, kv_usage=0.5)
    busy.prefill_rate = 900.0
    draining = make_member("http://e", Role.DECODE)
    draining.drain_until = 5.0
    gone = make_member("http://f", Role.DECODE)
    link_of(gone).is_attached = False
    demand = measure(DemandMeter(FakeClock()), Totals(), busy, draining, gone)
    assert demand.engines == {"http://d": EngineSeen(Role.DECODE, 12, 900.0, 3, 64, 0.5)}


def test_pools_are_sized_for_the_objectives_of_most_requests() -> None:
    slo = {"ttft_ms": 500, "tpot_ms": 40}
    deployment = parse_deployment({"model": "M", "slo": {"default": slo}}, "this")
    assert targets_of(deployment) == Targets(0.5, 0.04)
    assert targets_of(parse_deployment({"model": "M"}, "this")) == Targets()


def test_a_frontend_is_told_what_a_command_line_would_say() -> None:
    deployment = parse_deployment(
        {
            "model": "M",
            "served_model_name": "name",
            "engine_args": {"max-model-len": 2048, "dtype": "float32"},
            "routing": {"no_prefill": "queue", "local_below": 7},
            "slo": {"default": {"ttft_ms": 500, "tpot_ms": 40}},
            "frontend": {"args": {"queue-timeout": 99}},
        },
        "this",
    )
    args, options = parse_frontend(deployment)
    assert (args.model, args.served_model_name, args.max_model_len) == ("M", ["name"], 2048)
    assert options.policy.no_prefill is NoPrefill.QUEUE
    assert options.policy.local_below == 7
    assert options.limits.queue_s == 99
    assert options.slos["default"].tpot_s == pytest.approx(0.04)


def test_responses_are_stored_where_there_is_one_frontend_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = (parse_deployment({"model": "M", "frontend": n}, "this") for n in (1, 2))
    refuse_stores(two)
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    refuse_stores(one)
    with pytest.raises(ConfigError, match="needs frontend.replicas 1"):
        refuse_stores(two)
