"""The dashboard and the alert rules, and the series that they may ask for."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import types
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import prometheus_client
import yaml
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.registry import Collector

from tests.fakes.series import newly_registered
from tests.promql import Aggregation, Node, Selector, parse

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    from tests.fakes.stat_loggers import make_config
    from tests.unit.edge.test_metrics import one_of_each
    from vllm_pd_plugin.edge.metrics import PdPromMetrics
    from vllm_pd_plugin.frontend.telemetry.metrics import FrontendMetrics

GRAFANA = Path(__file__).parents[1] / "docs" / "grafana"
DASHBOARD, ALERTS = GRAFANA / "vllm-pd.json", GRAFANA / "alerts.yml"
METRICS_PAGE = GRAFANA.parent / "metrics.md"
OF_PROMETHEUS = {"le", "job", "instance"}
"""Labels that Prometheus gives to series."""

Known = dict[str, set[str]]
"""The labels of each series."""


@dataclasses.dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression, and where it stands."""

    place: str
    expression: str

    @property
    def node(self) -> Node:
        """The expression without what Grafana fills in."""
        text = self.expression.replace("$__rate_interval", "5m")
        return parse(re.sub(r"=~\"\$\w+\"", '=~".*"', text))

    @property
    def series(self) -> set[str]:
        """The names of the series that it asks for."""
        return {part.name for part in self.node.parts() if isinstance(part, Selector)}

    @property
    def labels(self) -> set[str]:
        """The labels that it groups or selects by."""
        found: set[str] = set()
        for part in self.node.parts():
            if isinstance(part, Aggregation):
                found.update(part.by)
            if isinstance(part, Selector):
                found.update(matcher.label for matcher in part.matchers)
        return found


def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return content


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def variables() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = dashboard()["templating"]["list"]
    return found


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard_queries() -> list[Query]:
    asked = [
        Query(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]
    ]
    for variable in variables():
        if variable["type"] == "query":
            wanted = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
            assert wanted is not None
            asked.append(Query(variable["name"], f"sum by ({wanted[2]}) ({wanted[1]})"))
    return asked


def alert_queries() -> list[Query]:
    return [Query(rule["alert"], rule["expr"]) for rule in alerts()]


def page_queries() -> list[Query]:
    blocks = re.findall(r"```promql\n(.*?)```", METRICS_PAGE.read_text(), re.S)
    return [Query("docs/metrics.md", line) for block in blocks for line in block.splitlines()]


def labels_of(collectors: Iterable[Collector]) -> Known:
    labels: Known = {}
    for collector in collectors:
        for family in collector.collect():
            for sample in family.samples:
                labels.setdefault(sample.name, set()).update(sample.labels)
    return {name: found for name, found in labels.items() if not name.endswith("_created")}


def of_frontends() -> Known:
    """What a frontend adds to vLLM's series; all of it is there from the start."""
    with newly_registered():
        before = set(prometheus_client.REGISTRY._collector_to_names)
        FrontendMetrics({})
        return labels_of(set(prometheus_client.REGISTRY._collector_to_names) - before)


def of_engines() -> Known:
    """What the connector adds to an engine's series when everything has happened once."""
    registry = prometheus_client.CollectorRegistry()
    own = {kind: functools.partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    config: Any = types.SimpleNamespace(kv_transfer_config=None)
    PdPromMetrics(config, own, ["engine"], {0: ["0"]}).observe(one_of_each().data)
    return labels_of([registry])


def of_vllm() -> Known:
    """What vLLM has of its own."""
    with newly_registered():
        PrometheusStatLogger(make_config())
        return {
            name: labels
            for name, labels in labels_of([prometheus_client.REGISTRY]).items()
            if name.startswith("vllm:")
        }
