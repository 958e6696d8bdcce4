"""What the benchmarks make of what they measured: without engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks.common.client import RequestFailed
from benchmarks.common.statistics import Row
from benchmarks.frontend import rows as frontend_rows
from benchmarks.frontend.answer_rows import answers_row
from benchmarks.frontend.load import Reading
from benchmarks.frontend.rows import Run
from benchmarks.handoff import criterion as handoff_criterion
from benchmarks.handoff.report import latency_tables
from benchmarks.handoff.rows import (
    Key,
    Sample,
    control_budget_bytes,
    latency_row,
    with_hidden_shares,
)
from benchmarks.memory import command as memory


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


def first_two_tokens(arm: str, ttft_s: float, ttst_s: float, link: int = 300) -> Row:
    dispatch = "concurrent" if arm == "frontend" else "serial"
    arrivals = [1 + ttft_s, 1 + ttft_s + ttst_s, 2 + ttft_s + ttst_s]
    sample = Sample.of(1.0, arrivals, 1000, {}, {})
    return latency_row(Key(arm, dispatch, "raw", 512, link), [sample])


ALONE, NIXL = first_two_tokens("alone", 0.300, 0.020), first_two_tokens("nixl", 0.450, 0.030)


@pytest.mark.parametrize(
    ("ttft_s", "ttst_s", "missed"),
    [
        (0.324, 0.179, []),
        (0.326, 0.179, ["TTFT"]),
        (0.324, 0.181, ["TTST"]),
        (0.500, 0.500, ["TTFT", "TTST"]),
    ],
)
def test_a_frontend_may_add_25_ms_and_has_its_second_token_when_nixl_has(
    ttft_s: float, ttst_s: float, missed: list[str]
) -> None:
    rows = [ALONE, NIXL, first_two_tokens("frontend", ttft_s, ttst_s)]
    alone, nixl, frontend = handoff_criterion.with_criterion(rows)
    assert (alone["added_ttft_ms"], nixl["added_ttft_ms"]) == (None, 150)
    assert frontend["added_ttft_ms"] == pytest.approx(1e3 * (ttft_s - 0.3))
    assert (frontend["ttst_limit_ms"], frontend["missed"]) == (180, missed)
    _, text = handoff_criterion.table([alone, nixl, frontend])
    verdict = f"missed: {', '.join(missed)}" if missed else "met"
    assert text.splitlines()[-1].endswith(f"| 180.0 | {verdict} |")


def test_a_frontend_is_not_judged_without_the_arms_to_compare_with() -> None:
    rows = [ALONE, first_two_tokens("frontend", 0.31, 0.02), first_two_tokens("nixl", 1, 1, link=0)]
    judged = handoff_criterion.with_criterion(rows)
    assert judged[1]["missed"] is None
    assert judged[1]["added_ttft_ms"] == 10
    assert "| unknown: needs alone and nixl |" in handoff_criterion.table(judged)[1]


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


def make_run(requests: int = 10, cpu_s: float = 0.1, elapsed_s: float = 2.0) -> Run:
    used = {"frontend": cpu_s, "prefill api": cpu_s, "decode core": 1.0, "client": 9.0}
    return Run(requests, 64 * requests, elapsed_s, [5.0] * requests, [50.0] * requests, used, 300.0)


def test_cpu_a_request_is_all_but_engine_cores_and_client() -> None:
    run = make_run()
    assert run.cpu_ms(of_cores=False) == pytest.approx(20)
    assert run.cpu_ms(of_cores=True) == pytest.approx(100)
    canned = Run(10, 640, 2.0, [5.0], [50.0], {"frontend": 0.1, "canned engines": 1.0})
    assert canned.cpu_ms(of_cores=False) == pytest.approx(10)
    assert canned.cpu_ms(of_cores=True) == 0


def test_a_load_row_has_medians_of_the_repetitions_that_did_not_fail() -> None:
    runs = [make_run(cpu_s=0.1), None, make_run(cpu_s=0.2), make_run(20, cpu_s=0.2)]
    row = frontend_rows.load_row("nixl", 1, 8, runs)
    assert (row["n"], row["failed"], row["requests"]) == (3, 1, 40)
    assert (row["requests_per_s"], row["tokens_per_s"]) == (5, 320)
    assert (row["cpu_ms_per_request"], row["cpu_ms_samples"]) == (20, [20, None, 40, 20])
    assert (row["added_p50_ms"], row["request_p99_ms"]) == (5, 50)
    assert (row["resident_mib"], row["cores"]["decode core"]) == (300, 0.5)


def test_the_frontend_tables_are_those_there_are_rows_for() -> None:
    canned = frontend_rows.load_row("canned", 2, 16, [make_run()])
    nixl = frontend_rows.load_row("nixl", 1, 8, [make_run(cpu_s=0.2), make_run(cpu_s=0.2)])
    ours = frontend_rows.load_row("pdplugin", 1, 8, [make_run(cpu_s=0.1), make_run(cpu_s=0.1)])
    found = dict(frontend_rows.tables([canned, nixl, ours]))
    alone, path = found.values()
    assert "| 16 | 2 | 1 | 5.0 (5.0 to 5.0) | 320 | 5.0 | 5.0 | 50.0 | 50.0 | 20.00 (" in alone
    assert "| pdplugin | 2 | 20.00 (20.00 to 20.00) | 0.50 (0.50 to 0.50) | 100.0 |" in path
    assert "| nixl | 2 | 40.00 (40.00 to 40.00) |  | 100.0 |" in path


def test_what_an_answer_costs_is_compared_turn_by_turn() -> None:
    rows = [
        answers_row("ours", [2.0] * 7 + [9.0], 3.0),
        answers_row("before", [4.0] * 8, 2.0),
        answers_row("alone", [1.0] * 7 + [4.5], 1.25),
    ]
    ((_, table),) = frontend_rows.tables(rows)
    ours, before, alone = table.splitlines()[2:]
    assert ours.split("|")[1:4] == [" ours ", " 8 ", " 2.00 (2.00 to 2.00) "]
    assert before.split("|")[4].startswith(" 0.500 (0.500 to")
    assert alone.split("|")[4:6] == [" 2.000 (2.000 to 2.000) ", " 1.2 "]


def test_streams_and_soak_have_tables_of_their_own() -> None:
    resident = {"before": 300.0, "start": 350.0, "end": 360.0, "after": 340.0}
    streams = frontend_rows.streams_row(
        1, 50.0, 20.0, 1.5, [400, 380], [60.0, 250.0], resident, {"frontend": 10.0}
    )
    soak = frontend_rows.soak_row(1, 32, [(0, 300.0), (1000, 300.5), (2000, 301.0)], 1.0)
    open_at_once, memory_table = dict(frontend_rows.tables([streams, soak])).values()
    assert (streams["expected_tokens"], streams["tokens_per_s"]) == (400, 39)
    assert "| 380 to 400 (400) | 250.0 | 155.0 | frontend 0.50 | 300.0 | 360.0 | 340.0 |" in (
        open_at_once
    )
    assert soak["growth_bytes_per_request"] == pytest.approx(524.3)
    assert "| 2000 | 32 | 1 | 300.0 | 301.0 | 1.00 | 524 |" in memory_table


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
WORD = b" castle"


def chunk(text: str, finish: str = "null") -> bytes:
    data = f'data: {{"choices":[{{"text":"{text}","finish_reason":{finish}}}]}}\n\n'.encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


ANSWER = (
    HEAD
    + chunk(" castle")
    + chunk(" castle castle")
    + chunk(" castle", '"length"')
    + b"e\r\ndata: [DONE]\n\n\r\n"
    + b"0\r\n\r\n"
)


@pytest.mark.parametrize("size", [1, 2, 7, 50, 10_000])
def test_a_stream_is_counted_right_however_it_is_cut(size: int) -> None:
    reading = Reading(WORD, sent=1.0)
    for start in range(0, len(ANSWER), size):
        assert not reading.is_over
        reading.feed(ANSWER[start : start + size], 2.0 + start)
    assert reading.has_finished
    assert reading.marks == 4
    assert 2.0 <= reading.first_at <= reading.last_at
    assert (reading.first_at == reading.last_at) is (size == 10_000)


def test_the_longest_gap_is_between_tokens() -> None:
    reading = Reading(WORD, sent=1.0)
    word, empty = chunk(" castle"), chunk("")
    for now, part in ((2.0, HEAD), (3.0, word), (3.5, empty), (5.0, word)):
        reading.feed(part, now)
    assert (reading.first_at, reading.longest_gap_s) == (3.0, 2.0)
    reading.count_anew()
    reading.feed(chunk(" castle"), 5.5)
    assert (reading.marks, reading.longest_gap_s) == (1, 0.5)


def test_a_stream_that_breaks_off_has_not_finished() -> None:
    reading = Reading(WORD, sent=1.0)
    reading.feed(HEAD + chunk(" castle") + b"0\r\n\r\n", 2.0)
    assert reading.is_over
    assert not reading.has_finished


def test_a_refusal_says_what_the_server_said() -> None:
    with pytest.raises(RequestFailed, match="no engine"):
        Reading(WORD, 1.0).feed(b"HTTP/1.1 503 Unavailable\r\n\r\nno engine", 2.0)
