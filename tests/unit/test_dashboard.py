"""The Grafana dashboard asks for series that there are, and shows all that a frontend has."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.registry import Collector

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.unit.edge.test_metrics import one_of_each
    from vllm_pd_plugin.edge.metrics import PdPromMetrics
    from vllm_pd_plugin.frontend.requests.endings import Ending, Failure
    from vllm_pd_plugin.frontend.routing.choice import Reason, Role, Route
    from vllm_pd_plugin.frontend.telemetry.metrics import FrontendMetrics, Timeline

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "vllm-pd.json"

_OF_PROMETHEUS = {"le", "job", "instance"}
_KEYWORDS = {"and", "bool", "by", "offset", "on", "or", "unless"}
_NAME = re.compile(r"[A-Za-z_:][A-Za-z0-9_:]*")
_BY = re.compile(r"\bby\s*\(([^)]*)\)")

Labels = dict[str, set[str]]
"""The labels of each series."""


@dataclasses.dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression, and where it stands."""

    place: str
    expression: str

    @property
    def series(self) -> set[str]:
        """Return the names of the series that it asks for."""
        text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", self.expression)
        text = _BY.sub("", text)
        names = (m for m in _NAME.finditer(text) if not text[m.end() :].lstrip().startswith("("))
        return {m[0] for m in names} - _KEYWORDS

    @property
    def labels(self) -> set[str]:
        """Return the labels that it groups or selects by."""
        grouped = {
            name.strip() for part in _BY.findall(self.expression) for name in part.split(",")
        }
        selected = set(re.findall(r"[{,]\s*(\w+)\s*[=!]", self.expression))
        return grouped | selected


def load() -> dict[str, Any]:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return dashboard


def panels() -> list[dict[str, Any]]:
    return [panel for panel in load()["panels"] if panel["type"] != "row"]


def variables() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = load()["templating"]["list"]
    return found


def queries() -> list[Query]:
    asked = [
        Query(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]
    ]
    for variable in variables():
        if variable["type"] == "query":
            wanted = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
            assert wanted is not None
            asked.append(Query(variable["name"], f"sum by ({wanted[2]}) ({wanted[1]})"))
    return asked


def labels_of(collectors: list[Collector]) -> Labels:
    labels: Labels = {}
    for collector in collectors:
        for family in collector.collect():
            for sample in family.samples:
                labels.setdefault(sample.name, set()).update(sample.labels)
    return {name: found for name, found in labels.items() if not name.endswith("_created")}


@pytest.fixture(scope="module")
def of_frontends() -> Iterator[Labels]:
    """What a frontend has when everything has happened once."""
    metrics = FrontendMetrics({})
    kinds = (Counter, Gauge, Histogram)
    collectors = [each for each in vars(metrics).values() if isinstance(each, kinds)]
    try:
        metrics.routed(Route(None, "d", Reason.SHORT))
        metrics.retried(Failure.TIMEOUT)
        metrics.failed(Ending.DEADLINE)
        metrics.engine_lost()
        metrics.set_engines({Role.DECODE: 1})
        metrics.set_requests(1, 0)
        metrics.queued(0.1)
        metrics.handed_off(0.1)
        timeline = Timeline(0.0, metrics.slo_class(None))
        for now in (1.0, 2.0):
            metrics.gave(timeline, now, 1)
        metrics.finished(timeline)
        yield labels_of(collectors)
    finally:
        for each in collectors:
            prometheus_client.REGISTRY.unregister(each)


@pytest.fixture(scope="module")
def of_engines() -> Labels:
    """What the connector adds to an engine's series when everything has happened once."""
    registry = prometheus_client.CollectorRegistry()
    own = {kind: functools.partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    config = types.SimpleNamespace(kv_transfer_config=None)
    PdPromMetrics(config, own, ["engine"], {0: ["0"]}).observe(one_of_each().data)
    return labels_of([registry])


@pytest.fixture(scope="module")
def of_vllm() -> str:
    """The source in which vLLM names its series."""
    spec = importlib.util.find_spec("vllm.v1.metrics.loggers")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text()


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("up", {"up"}),
        ('sum(rate(a_total{job=~"$job",b="c"}[$__rate_interval]))', {"a_total"}),
        ("sum by (reason, le) (rate(a_total[5m])) / sum(b_total)", {"a_total", "b_total"}),
        ("histogram_quantile(0.95, sum by (le) (rate(a_bucket[5m])))", {"a_bucket"}),
        ("max(vllm:a_perc) or b", {"vllm:a_perc", "b"}),
    ],
)
def test_the_series_of_an_expression_are_found(expression: str, expected: set[str]) -> None:
    assert Query("", expression).series == expected


def test_it_says_how_grafana_is_to_read_it() -> None:
    dashboard = load()
    assert dashboard["schemaVersion"] >= 39
    assert dashboard["id"] is None  # Grafana gives it one
    assert dashboard["title"] == dashboard["uid"] == "vllm-pd"
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_the_data_source_is_for_the_reader_to_choose() -> None:
    assert variables()[0]["type"] == "datasource"
    sources = [part["datasource"]["uid"] for panel in panels() for part in panel["targets"]]
    sources += [panel["datasource"]["uid"] for panel in panels()]
    assert set(sources) == {"${datasource}"}


def test_every_variable_that_is_used_is_there() -> None:
    there = {variable["name"] for variable in variables()} | {"__rate_interval"}
    used = {name for query in queries() for name in re.findall(r"\$(\w+)", query.expression)}
    assert used <= there


def test_panels_do_not_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in load()["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken
        taken |= cells


def test_every_panel_asks_for_something_and_says_what_it_is_and_in_which_unit() -> None:
    for panel in panels():
        assert panel["targets"], panel["title"]
        assert all(target["expr"].strip() for target in panel["targets"])
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]


def test_every_series_that_is_asked_for_is_there(
    of_frontends: Labels, of_engines: Labels, of_vllm: str
) -> None:
    for query in queries():
        assert query.series, query
        for name in query.series:
            if name.startswith("vllm:"):
                assert f'name="{name}"' in of_vllm, query
            else:
                assert name in of_frontends | of_engines, query


def test_every_label_that_is_asked_for_is_there(of_frontends: Labels, of_engines: Labels) -> None:
    labels = of_frontends | of_engines
    for query in queries():
        for name in query.series:
            assert query.labels <= labels.get(name, set()) | _OF_PROMETHEUS, query


def family(name: str) -> str:
    """Return what the series of one histogram have in common."""
    return re.sub(r"_(bucket|count|sum)$", "", name)


def test_all_that_a_frontend_has_is_shown(of_frontends: Labels) -> None:
    shown = {family(name) for query in queries() for name in query.series}
    assert {family(name) for name in of_frontends} <= shown


def test_all_that_the_connector_has_is_shown(of_engines: Labels) -> None:
    shown = {family(name) for query in queries() for name in query.series}
    assert {family(name) for name in of_engines} <= shown
