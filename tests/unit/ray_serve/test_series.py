"""A frontend's series on Ray: in Ray's own metrics, each replica's by itself."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi import FastAPI
from starlette.testclient import TestClient

from tests.fakes.series import newly_registered

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's and Ray's, not ours
    from vllm.v1.metrics import ray_wrappers

    from tests.fakes.stat_loggers import make_config
    from tests.unit.frontend.api.test_pool_series import OF_CLIENTS, OF_THE_POOL
    from vllm_pd_plugin.frontend.api.pool_series import make_loggers
    from vllm_pd_plugin.frontend.requests.endings import Ending
    from vllm_pd_plugin.frontend.routing.choice import Reason, Role, Route
    from vllm_pd_plugin.frontend.telemetry.metrics import FrontendMetrics
    from vllm_pd_plugin.ray_serve.series import RAY_KINDS, point_elsewhere


class RaySeries:
    """One of Ray's metrics; it keeps what was recorded."""

    made: dict[str, RaySeries]

    def __init__(
        self,
        name: str,
        description: str = "",
        tag_keys: tuple[str, ...] = (),
        boundaries: tuple[float, ...] = (),
    ) -> None:
        assert re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name)
        assert all(boundary > 0 for boundary in boundaries)
        self._tag_keys = tag_keys
        self.recorded: list[tuple[float, dict[str, str]]] = []
        self.made[name] = self

    def _record(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self._tag_keys)
        self.recorded.append((value, tags))

    inc = set = observe = _record


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, RaySeries]:
    """What is made of Ray's metrics, in a replica of Ray Serve."""
    made: dict[str, RaySeries] = {}
    RaySeries.made = made
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(ray_wrappers.ray_metrics, kind, RaySeries)
    monkeypatch.setattr(ray_wrappers, "_get_replica_id", lambda: "replica-7")
    return made


def test_what_a_frontend_counts_has_its_replica_s_id(made: dict[str, RaySeries]) -> None:
    metrics = FrontendMetrics({}, RAY_KINDS)
    timeline = metrics.begin(0.0, None)
    metrics.gave(timeline, 0.5, 1)
    metrics.finished(timeline)
    metrics.ended(timeline, None)
    metrics.set_requests(3, {Ending.OVERLOADED: 1}, 100)
    metrics.set_engines({Role.DECODE: 2})
    metrics.routed(Route(None, "d", Reason.SHORT))
    metrics.engine_lost()
    of_replica = {"ReplicaId": "replica-7"}
    of_class = {"slo_class": "default", **of_replica}
    assert made["pd_frontend_requests"].recorded == [(1.0, {"outcome": "answered", **of_class})]
    assert made["pd_frontend_ttft_seconds"].recorded == [(0.5, of_class)]
    assert made["pd_frontend_requests_open"].recorded == [(3, of_replica)]
    waiting = {
        each["reason"]: number for number, each in made["pd_frontend_requests_waiting"].recorded
    }
    assert waiting == {"no_engine": 0, "overloaded": 1}
    assert made["pd_frontend_engines_lost"].recorded == [(1.0, of_replica)]
    assert (2, {"role": "decode", **of_replica}) in made["pd_frontend_engines"].recorded


def test_vllm_s_series_go_the_same_way_and_none_to_prometheus(made: dict[str, RaySeries]) -> None:
    with newly_registered():
        make_loggers(make_config(), RAY_KINDS)
    assert set(made) == {name.replace(":", "_") for name in OF_CLIENTS | OF_THE_POOL}


def test_metrics_at_the_ingress_are_not_those_of_any_one_replica() -> None:
    app = FastAPI()
    app.add_api_route("/metrics", lambda: "pd_frontend_requests_total 7")
    app.add_api_route("/health", lambda: "well")
    app.mount("/metrics", FastAPI())
    point_elsewhere(app)
    answer = TestClient(app).get("/metrics")
    assert answer.status_code == 404
    assert "docs/ray.md" in answer.text
    assert "pd_frontend_requests_total" not in answer.text
    assert TestClient(app).get("/health").status_code == 200


def relabelled(rules: list[dict[str, Any]], name: str) -> str:
    """Do what Prometheus does to a series' name."""
    for rule in rules:
        assert rule["source_labels"] == ["__name__"] == [rule["target_label"]]
        if found := re.fullmatch(rule["regex"], name):
            name = found.expand(rule["replacement"].replace("$1", r"\1"))
    return name


def test_what_the_page_tells_prometheus_gives_the_series_the_names_of_the_dashboard() -> None:
    page = (Path(__file__).parents[3] / "docs" / "ray.md").read_text()
    (text,) = re.findall(r"```yaml\n(scrape_configs:.*?)```", page, re.S)
    (job,) = yaml.safe_load(text)["scrape_configs"]
    rules = job["metric_relabel_configs"]
    names = {
        "ray_pd_frontend_requests_total": "pd_frontend_requests_total",
        "ray_pd_frontend_ttft_seconds_bucket": "pd_frontend_ttft_seconds_bucket",
        "ray_vllm_num_requests_waiting": "vllm:num_requests_waiting",
        "ray_vllm_prompt_tokens_total": "vllm:prompt_tokens_total",
        "ray_serve_num_http_requests": "ray_serve_num_http_requests",
    }
    assert {name: relabelled(rules, name) for name in names} == names
