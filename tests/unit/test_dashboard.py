"""The Grafana dashboard, the alert rules and the queries of the documentation ask for series that
there are, and the dashboard shows all that we have."""

from __future__ import annotations

import re
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.monitoring import (
        OF_PROMETHEUS,
        Known,
        Query,
        alert_queries,
        dashboard,
        dashboard_queries,
        of_engines,
        of_frontends,
        of_vllm,
        page_queries,
        panels,
        variables,
    )


def test_it_says_how_grafana_is_to_read_it() -> None:
    content = dashboard()
    assert content["schemaVersion"] >= 39
    assert content["id"] is None  # Grafana gives it one
    assert content["title"] == content["uid"] == "vllm-pd"
    numbers = [panel["id"] for panel in content["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_the_data_source_is_for_the_reader_to_choose() -> None:
    assert variables()[0]["type"] == "datasource"
    sources = [part["datasource"]["uid"] for panel in panels() for part in panel["targets"]]
    sources += [panel["datasource"]["uid"] for panel in panels()]
    assert set(sources) == {"${datasource}"}


def test_every_variable_that_is_used_is_there() -> None:
    there = {variable["name"] for variable in variables()} | {"__rate_interval"}
    used = {
        name for query in dashboard_queries() for name in re.findall(r"\$(\w+)", query.expression)
    }
    assert used <= there


def test_panels_do_not_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
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


@pytest.fixture(scope="module")
def known() -> Known:
    """Every series that there is."""
    return of_frontends() | of_engines() | of_vllm()


QUERIES = [*dashboard_queries(), *alert_queries(), *page_queries()]


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.place)
def test_every_expression_asks_for_series_and_labels_that_are_there(
    query: Query, known: Known
) -> None:
    assert query.series
    for name in query.series:
        assert name in known
        assert query.labels <= known[name] | OF_PROMETHEUS


def test_all_that_has_a_class_is_shown_for_the_classes_that_are_chosen(known: Known) -> None:
    for panel in panels():
        for target in panel["targets"]:
            asked = Query(panel["title"], target["expr"])
            if any("slo_class" in known[name] for name in asked.series):
                assert 'slo_class=~"$slo_class"' in asked.expression, panel["title"]


def family(name: str) -> str:
    """Return what the series of one histogram have in common."""
    return re.sub(r"_(bucket|count|sum)$", "", name)


def test_all_that_a_frontend_and_the_connector_have_is_shown() -> None:
    shown = {family(name) for query in dashboard_queries() for name in query.series}
    assert {family(name) for name in of_frontends() | of_engines()} <= shown
