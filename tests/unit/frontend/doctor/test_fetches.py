"""What an engine's page of metrics says of its fetches."""

from __future__ import annotations

from collections import Counter

import pytest

from vllm_pd_plugin.frontend.doctor.fetches import Fetches

LABELS = 'engine="0",model_name="M"'


def page(fetches: int, failures: int = 0, num_bytes: int = 4096) -> str:
    """A page of an engine with two cores, one of which has done nothing."""
    return f"""
# HELP pd_fetch_bytes_total Bytes that fetches have moved.
# TYPE pd_fetch_bytes_total counter
pd_fetch_bytes_total{{{LABELS}}} {num_bytes}.0
pd_fetch_bytes_total{{engine="1",model_name="M"}} 0.0
# TYPE pd_fetch_kv_bytes_total counter
pd_fetch_kv_bytes_total{{{LABELS}}} 8192.0
# TYPE pd_fetch_stretches_total counter
pd_fetch_stretches_total{{{LABELS}}} {3 * fetches}.0
# TYPE pd_fetches_total counter
pd_fetches_total{{codec="raw",{LABELS}}} {fetches}.0
# TYPE pd_fetch_seconds histogram
pd_fetch_seconds_bucket{{le="1.0",{LABELS}}} {fetches}.0
pd_fetch_seconds_bucket{{le="+Inf",{LABELS}}} {fetches}.0
pd_fetch_seconds_count{{{LABELS}}} {fetches}.0
pd_fetch_seconds_sum{{{LABELS}}} {0.5 * fetches}
# TYPE pd_handoff_failures_total counter
pd_handoff_failures_total{{reason="read_failed",{LABELS}}} {failures}.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{{LABELS}}} 1.0
"""


def test_all_of_an_engines_cores_are_added_up() -> None:
    read = Fetches.read(page(2, num_bytes=4096) + 'pd_fetch_bytes_total{engine="7"} 4.0\n')
    assert read.num_bytes == 4100
    assert (read.kv_bytes, read.reads, read.seconds, read.fetches) == (8192, 6, 1.0, 2)
    assert read.codecs == Counter(raw=2)


def test_only_what_has_come_to_it_is_left() -> None:
    since = Fetches.read(page(3, 1, 5000)).since(Fetches.read(page(2, 1, 4096)))
    assert (since.num_bytes, since.kv_bytes, since.reads, since.fetches) == (904, 0, 3, 1)
    assert since.seconds == 0.5
    assert since.codecs == Counter(raw=1)
    assert not since.failures


@pytest.mark.parametrize(("fetches", "failures"), [(1, 0), (0, 1)])
def test_a_handoff_has_ended_when_it_was_fetched_and_when_it_has_failed(
    fetches: int, failures: int
) -> None:
    before = Fetches.read(page(0))
    assert not before.has_ended
    assert Fetches.read(page(fetches, failures)).since(before).has_ended


def test_an_engine_that_has_fetched_nothing_yet_says_nothing() -> None:
    assert Fetches.read("# TYPE a gauge\na 1.0\n") == Fetches()


def test_what_is_no_page_of_metrics_is_refused() -> None:
    with pytest.raises(ValueError, match="."):
        Fetches.read("<html>no such page</html>")
