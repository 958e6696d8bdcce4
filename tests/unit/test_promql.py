"""The evaluator that dashboards and alerts are tested with."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.promql import Database, PromqlError, parse, query, write_samples


@pytest.fixture
def series(tmp_path: Path) -> Database:
    """Two instances for ten minutes: one counts 1 a second, the other 3, and begins anew at 300."""
    path = tmp_path / "series"
    for at in range(0, 601, 10):
        for instance, rate in (("a", 1), ("b", 3)):
            count = rate * (at if instance == "a" or at < 300 else at - 300)
            text = f'# TYPE n counter\nn_total{{kind="x"}} {count}\nopen {at}'
            write_samples(path, at, text, {"instance": instance})
    buckets = "\n".join(
        f'h_bucket{{le="{bound}"}} {count}' for bound, count in (("1", 5), ("2", 9), ("+Inf", 10))
    )
    write_samples(path, 600, buckets, {"instance": "a"})
    return Database(path)


def labelled(**labels: str) -> frozenset[tuple[str, str]]:
    return frozenset(labels.items())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 + 2 * 3", 7.0),
        ("(1 + 2) * 3", 9.0),
        ("8 / 4 / 2", 1.0),
        ('open{instance="a"}', {labelled(instance="a"): 600.0}),
        ("sum(open)", {labelled(): 1200.0}),
        ('sum(open{instance!~"a|c"})', {labelled(): 600.0}),
        (
            "sum by (instance) (rate(n_total[1m]))",
            {labelled(instance="a"): 1.0, labelled(instance="b"): 3.0},
        ),
        ("sum(increase(n_total[1m]))", {labelled(): 240.0}),
        ("max by (kind) (rate(n_total[1m])) > 2", {labelled(kind="x"): 3.0}),
        ("max(rate(n_total[1m])) > 3", {}),
        (
            "rate(n_total[1m]) > 0 and rate(n_total[1m]) < 2",
            {labelled(kind="x", instance="a"): 1.0},
        ),
        ("sum(rate(n_total[1m])) / sum(open)", {labelled(): 4 / 1200}),
        ("histogram_quantile(0.5, h_bucket)", {labelled(instance="a"): 1.0}),
        ("histogram_quantile(0.7, sum by (le) (h_bucket))", {labelled(): 1.5}),
        ("absent(open)", {}),
        ("absent(closed)", {labelled(): 1.0}),
        ("sum(closed) or sum(open)", {labelled(): 1200.0}),
    ],
)  # fmt: skip
def test_expressions_have_their_value(
    series: Database, text: str, expected: float | dict[frozenset[tuple[str, str]], float]
) -> None:
    assert query(text, series, 600.0) == pytest.approx(expected)


def test_a_counter_that_begins_anew_has_not_fallen(series: Database) -> None:
    found = query('increase(n_total{instance="b"}[2m])', series, 330.0)
    assert isinstance(found, dict)
    (value,) = found.values()
    # From 220 to 290, and again from 300 to 330: of 110 seconds, 10 are lost.
    assert value == pytest.approx(3 * (290 - 220 + 30) * 120 / 110)


def test_what_is_old_is_not_there_any_more(series: Database) -> None:
    assert query("sum(open)", series, 899.0) == {labelled(): 1200.0}
    assert query("sum(open)", series, 901.0) == {}


def test_nothing_of_nothing_is_no_share(series: Database) -> None:
    found = query("sum(open) * 0 / (sum(open) * 0)", series, 600.0)
    assert isinstance(found, dict)
    assert all(math.isnan(value) for value in found.values())
    assert query("sum(open) * 0 / (sum(open) * 0) < 1", series, 600.0) == {}


@pytest.mark.parametrize(
    "text",
    ["", "sum(", "sum(a", "a b", "a{b=1}", "a{b", "rate(a[5m)", "a[5]", "sum by a (b)", "a +",
     "and", "1 $ 2", 'a{b~"c"}'],
)  # fmt: skip
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(PromqlError):
        parse(text)


@pytest.mark.parametrize("text", ["rate(open)", "open[5m]", "deriv(open[5m])", "rate(1)"])
def test_what_has_no_value_is_refused(series: Database, text: str) -> None:
    with pytest.raises(PromqlError):
        query(text, series, 600.0)
