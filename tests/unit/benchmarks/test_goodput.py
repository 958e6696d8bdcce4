"""What the goodput benchmark sends, and what it makes of the answers: without engines."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.common.client import RequestFailed
from benchmarks.common.statistics import Row
from benchmarks.goodput import command as goodput
from benchmarks.goodput import load as goodput_load
from benchmarks.goodput.arms import ARMS
from benchmarks.goodput.command import Bench, Plan, parse_arguments, rising_rates, slo
from benchmarks.goodput.load import Taken, Target, load
from benchmarks.goodput.plan import (
    CHAT,
    LONG_IN,
    SLOS,
    WORKLOADS,
    Phases,
    Request,
    Slo,
    Workload,
    arrivals,
    longest_s,
)
from benchmarks.goodput.rows import (
    NOTES,
    TARGET,
    Answer,
    Step,
    attainment,
    goodput_rows,
    is_hopeless,
    max_rate,
    nearest_rank,
    strain,
    tables,
    to_base,
)

TIGHT, LOOSE = Slo("tight", 100, 10), Slo("loose", 1000, 100)
LATE = Answer(150, 5, (5.0,))
GOOD, SLOW, BAD = Answer(50, 5, (5.0,)), Answer(500, 50, (50.0,)), Answer.failed()
PHASES = Phases(warm_up_s=2, counted_s=5, tail_s=3)


# --- what is sent


def test_arrivals_are_as_many_as_the_rate_says_and_not_even() -> None:
    times = arrivals(5.0, 2000.0, random.Random(1))
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert len(times) == pytest.approx(10_000, rel=0.05)
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] < 2000
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.05)


def test_every_arm_gets_the_same_requests() -> None:
    assert PHASES.plan(LONG_IN, 3.0, 1, 0) == PHASES.plan(LONG_IN, 3.0, 1, 0)


@pytest.mark.parametrize(("rate", "seed", "repetition"), [(2.0, 1, 0), (3.0, 2, 0), (3.0, 1, 1)])
def test_rates_seeds_and_repetitions_have_prompts_of_their_own(
    rate: float, seed: int, repetition: int
) -> None:
    prompts = {request.prompt for request in PHASES.plan(LONG_IN, 3.0, 1, 0)}
    others = PHASES.plan(LONG_IN, rate, seed, repetition)
    assert prompts.isdisjoint(request.prompt for request in others)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_prompts_share_what_the_workload_says_and_no_more(workload: Workload) -> None:
    prompts = [r.prompt for n in range(2) for r in PHASES.plan(workload, 4.0, 1, n)]
    shared = workload.shared_tokens
    assert {len(prompt) for prompt in prompts} == {workload.prompt_tokens}
    assert len({prompt[:shared] for prompt in prompts}) == 1
    assert len({prompt[shared : shared + 8] for prompt in prompts}) == len(prompts)


def test_only_requests_after_the_warm_up_and_before_the_tail_count() -> None:
    requests = PHASES.plan(CHAT, 20.0, 1, 0)
    assert all(request.is_counted is (2 <= request.due_s < 7) for request in requests)
    assert requests[0].due_s < 2
    assert 7 < requests[-1].due_s < 10


def test_the_tail_is_as_long_as_a_request_may_take() -> None:
    assert longest_s(LONG_IN, SLOS) == pytest.approx(1.2 + 63 * 0.08)


# --- what an answer is worth


def test_tpot_is_over_all_tokens_but_the_first() -> None:
    answer = Answer.of(10.0, [10.5, 10.6, 10.8], tokens=5)  # two tokens came with others
    assert answer.ttft_ms == pytest.approx(500)
    assert answer.tpot_ms == pytest.approx(75)
    assert answer.itl_ms == pytest.approx((100, 200))


def test_an_answer_must_keep_to_both_limits() -> None:
    assert Answer(100, 10, ()).meets(TIGHT)
    assert not Answer(101, 1, ()).meets(TIGHT)
    assert not Answer(1, 11, ()).meets(TIGHT)
    assert not BAD.meets(LOOSE)


def test_attainment_is_the_share_of_all_requests_the_failed_ones_too() -> None:
    answers = [GOOD, GOOD, SLOW, BAD]
    assert (attainment(answers, TIGHT), attainment(answers, LOOSE)) == (0.5, 0.75)


def test_the_ladder_ends_where_fewer_than_half_meet_the_loosest() -> None:
    assert not is_hopeless([SLOW, BAD], [TIGHT, LOOSE])
    assert is_hopeless([GOOD, SLOW, BAD, BAD, BAD], [TIGHT, LOOSE])


def test_the_strain_is_what_nine_of_ten_keep_to() -> None:
    answers = [Answer(10.0 * n, 1, ()) for n in range(1, 11)]
    assert strain(answers, TIGHT) == pytest.approx(0.9)
    assert strain([Answer(10, 12, ())], TIGHT) == pytest.approx(1.2)
    assert strain([*answers[:8], BAD, BAD], TIGHT) == math.inf
    assert strain([], TIGHT) == 0


@given(st.lists(st.tuples(st.floats(1, 300), st.floats(1, 30)), min_size=1))
def test_nine_of_ten_meet_an_slo_if_the_strain_is_one_at_the_most(
    times: list[tuple[float, float]],
) -> None:
    answers = [Answer(ttft, tpot, ()) for ttft, tpot in times]
    assert (strain(answers, TIGHT) <= 1) == (attainment(answers, TIGHT) >= TARGET)


def test_the_highest_rate_is_on_the_line_between_met_and_missed() -> None:
    assert max_rate([(1, 0.5), (2, 0.9), (3, 1.3), (4, 9.0)]) == pytest.approx(2.25)
    assert max_rate([(1, 1.0), (2, 1.2)]) == pytest.approx(1)
    assert max_rate([(1, 0.5), (2, math.inf)]) == pytest.approx(1)


def test_a_rate_that_is_met_above_one_that_is_missed_does_not_count() -> None:
    assert max_rate([(1, 0.8), (2, 1.2), (3, 0.9), (4, 1.5)]) == pytest.approx(1.5)


def test_the_highest_rate_is_0_below_the_ladder_and_its_end_above() -> None:
    assert max_rate([(0.5, 1.1), (1, 0.2)]) == 0
    assert max_rate([(0.5, 0.2), (1, 0.9)]) == 1


def test_a_percentile_is_one_of_the_values() -> None:
    assert nearest_rank([3, 1, 2, 4, 5, 6, 7, 8, 9, math.inf], 0.9) == 9
    assert nearest_rank([1, math.inf], 0.9) is None
    assert nearest_rank([], 0.9) is None


# --- rows and tables


def ladder(*shares: float, routes: dict[str, float] | None = None) -> list[Step]:
    """Rates 1, 2, 3 and so on, of which these shares of 20 requests meet the tight SLO."""
    return [
        Step(float(rate), [GOOD] * round(20 * s) + [LATE] * round(20 - 20 * s), routes or {})
        for rate, s in enumerate(shares, 1)
    ]


def make_rows() -> list[Row]:
    alone = goodput_rows("alone x2", "long-in", [TIGHT], [ladder(1, 0.8), ladder(1, 0.8), None])
    went = {"disaggregated": 18.0, "short": 2.0}
    ours = goodput_rows(
        "pdplugin", "long-in", [TIGHT], [ladder(1, 1, 0.8, routes=went), ladder(1, 1), ladder(0.5)]
    )
    return [*alone, *ours]


def test_a_row_has_the_median_over_the_repetitions() -> None:
    alone, ours = make_rows()
    assert (ours["n"], ours["max_rates"], ours["max_rate"]) == (3, [2.5, 2.0, 0.0], 2.0)
    assert (ours["max_rate_low"], ours["max_rate_high"]) == (1.0, 2.25)
    assert (alone["n"], alone["max_rates"]) == (2, [1.5, 1.5, None])
    assert (alone["is_bounded"], ours["is_bounded"]) == (True, False)


def test_a_row_has_the_shares_of_all_repetitions_together() -> None:
    _, ours = make_rows()
    assert ours["attainment"] == [[1.0, pytest.approx(2.5 / 3, abs=1e-4)], [2.0, 1.0], [3.0, 0.8]]
    assert ours["requests"] == [[1.0, 60], [2.0, 40], [3.0, 20]]
    assert ours["failed"] == [[1.0, 0], [2.0, 0], [3.0, 0]]


def test_a_row_says_how_many_have_failed() -> None:
    steps = [Step(1.0, [GOOD] * 19 + [BAD], {}), Step(2.0, [BAD] * 3, {})]
    (row,) = goodput_rows("x", "chat", [TIGHT], [steps])
    assert row["failed"] == [[1.0, 1], [2.0, 3]]
    assert row["strains"] == [[[1.0, 0.5], [2.0, None]]]
    assert row["max_rate"] == 1.0


def test_latencies_are_those_at_the_highest_rate_that_was_met() -> None:
    alone, ours = make_rows()
    assert (alone["met_rate"], alone["ttft_p90_ms"], alone["itl_p99_ms"]) == (1.0, 50, 5)
    assert (ours["met_rate"], ours["ttft_p90_ms"], ours["routes"]) == (None, None, {})


def test_the_ratio_is_to_two_engines_alone() -> None:
    rows = make_rows()
    found = to_base(rows, rows[1])
    assert found is not None
    assert found.value == pytest.approx((2.5 / 1.5 + 2 / 1.5) / 2)
    assert to_base(rows, rows[0]) is None


def test_the_tables_have_a_line_for_each_row() -> None:
    rows = [*make_rows(), *goodput_rows("x", "chat", [LOOSE], [ladder(1, routes={"short": 20.0})])]
    found = dict(tables(rows))
    assert list(found) == [
        "Requests a second of which 90 % meet the SLO",
        "Share of requests that meet the SLO, by rate",
        "Where the requests went, at the rate of the latencies",
    ]
    goodput, shares, routes = found.values()
    assert (
        "| long-in | tight (100/10 ms) | alone x2 | 2 | 1.50 (1.50 to 1.50) |  | 1/s | 50.0 | 5.0 "
        "| 5.0 |"
    ) in goodput
    assert "| pdplugin | 3 | >= 2.00 (1.00 to 2.25) | 1.50 (1.42 to 1.58) |" in goodput
    assert "| long-in | tight (100/10 ms) | pdplugin | 83 % | 100 % | 80 % |" in shares
    assert "| chat | loose (1000/100 ms) | x | 1/s | 20 | short |" in routes
    assert json.loads(json.dumps(rows)) == rows


def test_the_notes_can_be_filled_in() -> None:
    shown = {"arms": "a", "first": 0, "second": 1, "warm_up": 8.0, "seconds": 40.0, "drain": 9.0}
    text = "\n".join(note.format(**shown) for note in NOTES)
    assert "core 0" in text
    assert "8 s of arrivals" in text


# --- the client


class FakeStream:
    """Answers requests at once, but those whose prompt begins with a 0 or a 1."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    async def __call__(
        self, opened: object, url: str, model: str, prompt: list[int], tokens: int, got: list[float]
    ) -> float:
        self.asked.append((url, prompt[0]))
        if prompt[0] == 0:
            raise RequestFailed("no")
        if prompt[0] == 1:
            await asyncio.sleep(60)
        got += [2.0, 2.1]
        return 1.0


def loaded(
    requests: list[Request], monkeypatch: pytest.MonkeyPatch, drain_s: float = 0.05
) -> tuple[Taken, FakeStream]:
    server = FakeStream()
    monkeypatch.setattr(goodput_load, "stream", server)
    return load(Target(("a", "b"), "m"), LONG_IN, requests, drain_s), server


def test_engines_are_asked_in_turn_and_only_what_counts_is_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = [Request(0.0, (9,), False), Request(0.001, (8,), True), Request(0.002, (7,), True)]
    taken, server = loaded(requests, monkeypatch)
    assert server.asked == [("a", 9), ("b", 8), ("a", 7)]
    assert (len(taken.answers), taken.cut_off) == (2, 0)


def test_what_fails_or_does_not_end_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(0.0, (prompt,), True) for prompt in (0, 1, 2)]
    taken, _ = loaded(requests, monkeypatch)
    assert [answer.has_failed for answer in taken.answers] == [True, True, False]
    assert taken.cut_off == 1


def test_the_tail_ends_when_all_that_count_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    tail = [Request(0.05 + 0.001 * number, (5,), False) for number in range(50)]
    _, server = loaded([Request(0.0, (9,), True), *tail], monkeypatch)
    assert len(server.asked) == 1


# --- a whole run


class FakeArm:
    """Meets everything up to 1 a second; wakes only in some repetitions."""

    def __init__(self, name: str, wakes: Sequence[bool]) -> None:
        self.name, self.urls, self.model = name, ("u",), "m"
        self.wakes = list(wakes)
        self.calls: list[str] = []

    def wake(self, prompts: object) -> None:
        self.calls.append("wake")
        if not self.wakes.pop(0):
            raise RequestFailed("asleep")

    def pause(self) -> None:
        self.calls.append("pause")

    def routes(self) -> dict[str, float]:
        return {"short": float(len(self.calls))}

    def tails(self) -> str:
        return ""


def test_an_arm_that_fails_in_one_repetition_has_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arms = [FakeArm("alone x2", [True, True]), FakeArm("pdplugin", [False, True])]
    rates: list[float] = []

    def fake_load(target: Target, workload: Workload, requests: list[Request], s: float) -> Taken:
        rate = len(requests) / 100
        rates.append(rate)
        return Taken([GOOD if rate < 1.5 else BAD] * 20, 0, 3.0)

    monkeypatch.setattr(goodput, "load", fake_load)
    plan = Plan([LONG_IN], (TIGHT, LOOSE), [1.0, 2.0, 4.0], 20, 60, 1, 2, 1)
    with (tmp_path / "requests").open("w") as lines:
        bench = Bench(arms, plan, lines)  # type: ignore[arg-type]
        bench.repeat(0)
        bench.repeat(1)
    rows = bench.rows()
    assert [(row["arm"], row["slo"], row["n"]) for row in rows] == [
        ("alone x2", "tight", 2),
        ("pdplugin", "tight", 1),
        ("alone x2", "loose", 2),
        ("pdplugin", "loose", 1),
    ]
    assert rows[1]["max_rates"][0] is None
    assert len(rates) == 6  # the third rate is not tried
    assert bench.latest_ms == 3
    assert all(arm.calls == ["wake", "pause"] * 2 for arm in arms)
    written = [json.loads(line) for line in (tmp_path / "requests").read_text().splitlines()]
    assert len(written) == 6 * 20
    assert {line["ttft_ms"] for line in written} == {50, None}
    assert "| pdplugin | 1 |" in dict(tables(rows))["Requests a second of which 90 % meet the SLO"]


# --- the command line


def test_an_slo_is_a_name_and_two_limits() -> None:
    assert slo("mine:400/35.5") == Slo("mine", 400, 35.5)
    for bad in ("mine", "mine:400", ":400/35", "mine:400/0", "mine:a/b"):
        with pytest.raises(argparse.ArgumentTypeError, match="NAME:TTFT/TPOT"):
            slo(bad)


def test_rates_must_rise() -> None:
    assert rising_rates("0.5,1,2") == [0.5, 1, 2]
    for bad in ("", "a", "0,1", "2,1", "1,1", "1,inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="rising"):
            rising_rates(bad)


def test_quick_is_small_but_for_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["goodput", "--quick", "--repeat", "2"])
    args = parse_arguments()
    assert (args.workloads, args.rates, args.repeat) == (["long-in"], [0.5, 1.0], 2)
    assert args.arms == list(ARMS)
    assert args.slo == SLOS
