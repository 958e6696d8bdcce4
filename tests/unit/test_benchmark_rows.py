"""What the benchmarks make of what they measured: without engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks import memory
from benchmarks.report import latency_tables
from benchmarks.rows import Key, Row, Sample, control_budget_bytes, latency_row, with_hidden_shares


def make_row(*counts: Mapping[str, float], arm: str = "pdplugin") -> Row:
    samples = [Sample.of(1.0, [1.5, 1.75, 2.0], 1000, taken, {"client": 0.1}) for taken in counts]
    return latency_row(Key(arm, "serial", "raw", 512, 0), [*samples, None])


def told(control_bytes: float, stretches: float, packed: float = 0) -> dict[str, float]:
    return {
        "descriptors": 8.0,
        "control_bytes": control_bytes,
        "stretches": stretches,
        "packed": packed,
    }


def test_a_row_has_the_median_control_traffic_of_a_handoff() -> None:
    row = make_row(told(700, 1), told(900, 3), told(800, 2))
    assert (row["control_bytes"], row["stretches"], row["descriptors"]) == (800, 2, 8)
    assert (row["n"], row["failed"], row["over_control_budget"]) == (3, 1, 0)
    assert (row["ttft_ms"], row["ttst_ms"], row["wire_bytes"]) == (500, 250, 1000)


def test_what_an_arm_does_not_count_is_unknown() -> None:
    row = make_row({}, arm="alone")
    assert row["control_bytes"] is row["stretches"] is row["descriptors"] is None
    assert row["over_control_budget"] == 0


def test_a_handoff_may_take_2_kib_and_128_bytes_a_stretch() -> None:
    assert control_budget_bytes(1, 0) == 2176
    assert make_row(told(2176, 1), told(2177, 1), told(2177, 2))["over_control_budget"] == 1


def test_a_packed_stretch_may_take_512_bytes_more() -> None:
    assert control_budget_bytes(2, 1) == 2048 + 256 + 512
    samples = told(2688, 1, packed=1), told(2689, 1, packed=1), told(2688, 1)
    assert make_row(*samples)["over_control_budget"] == 2


def test_the_tables_say_bytes_stretches_and_budget() -> None:
    rows = with_hidden_shares(
        [make_row({}, {}, arm="alone"), make_row(told(700, 1), told(4000, 1))]
    )
    tables = dict(latency_tables(rows))
    text = tables["Control messages of a handoff, median, and what they may take"]
    assert "| 512 | unlimited | pdplugin, serial | 2350 | 1 | 2176 | 1 of 2 |" in text
    assert "alone" not in text


def memory_rows(**samples: list[float]) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in memory.rows_of([0, 1000, 2000], samples)}


def test_added_memory_is_what_is_beyond_the_plain_engine() -> None:
    rows = memory_rows(plain=[900, 901, 902], consumer=[950, 951, 952], producer=[950, 955, 960])
    assert rows["plain"]["added_mib"] is None
    assert (rows["consumer"]["added_mib"], rows["producer"]["added_mib"]) == (50, 58)
    assert rows["consumer"]["growth_mib"] == 2
    assert rows["consumer"]["added_growth_mib"] == pytest.approx(0)
    assert rows["producer"]["added_growth_mib"] == 8
    assert rows["producer"]["staging_mib"] == 0


def test_growth_is_of_the_whole_run_and_not_of_its_last_sample() -> None:
    assert memory.growth([0, 10, 20, 30], [5, 5, 5, 5]) == pytest.approx(0)
    assert memory.growth([0, 10, 20, 30], [0, 1, 2, 3]) == pytest.approx(3)
    assert memory.growth([0, 10, 20, 30], [0, 0, 0, 3]) < 3


def test_the_memory_table_has_a_line_for_each_engine() -> None:
    text = memory.table(memory.rows_of([0, 2000], {"plain": [900, 901], "consumer": [950, 952]}))
    assert "| plain | 2000 | 900.0 | 901.0 | 1.00 | 0 |  |  |" in text
    assert "| consumer | 2000 | 950.0 | 952.0 | 2.00 | 0 | 51.0 | 1.0 |" in text
