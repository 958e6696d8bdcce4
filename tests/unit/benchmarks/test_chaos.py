"""What the chaos benchmark plans for two engines, and how it judges: without engines."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from benchmarks.chaos.account import (
    Ending,
    Fate,
    Leg,
    Life,
    Record,
    Side,
    Tally,
    failure_counts,
    is_clean,
    judge,
    num_blocks,
    row,
    table,
    used_blocks,
)
from benchmarks.chaos.plan import (
    KILLS,
    MAX_GAP_S,
    MIN_GAP_S,
    MIN_KILL_GAP_S,
    Disturbance,
    plan_arrivals,
    plan_events,
)
from benchmarks.chaos.requests import error_message
from benchmarks.chaos.run import judge_answer
from tests.engine import Completion

SEEDS = range(20)


def test_a_plan_follows_from_its_seed_alone() -> None:
    assert plan_arrivals(1, 300, 1.5) == plan_arrivals(1, 300, 1.5) != plan_arrivals(2, 300, 1.5)
    assert plan_events(1, 300) == plan_events(1, 300) != plan_events(2, 300)


def test_arrivals_are_poisson_and_one_client_in_ten_leaves() -> None:
    arrivals = plan_arrivals(3, 10_000, 1.5)
    times = [arrival.at_s for arrival in arrivals]
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 1.5, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 1.5, rel=0.05)
    assert all(0 < at_s < 10_000 for at_s in times)
    leaving = [a.abort_after_s for a in arrivals if a.abort_after_s is not None]
    assert len(leaving) / len(arrivals) == pytest.approx(0.1, rel=0.15)
    assert all(0 <= after_s <= 1 for after_s in leaving)
    assert sum(a.concurrent for a in arrivals) / len(arrivals) == pytest.approx(0.5, rel=0.05)


def test_no_two_requests_begin_with_the_same_block() -> None:
    arrivals = plan_arrivals(1, 300, 1.5)
    assert len({tuple(arrival.prompt()[:50]) for arrival in arrivals}) == len(arrivals)
    assert all(50 <= len(arrival.prompt()) <= 1500 for arrival in arrivals)
    assert arrivals[0].prompt() == arrivals[0].prompt()


@pytest.mark.parametrize("seed", SEEDS)
def test_events_do_not_overlap_and_kills_leave_time_to_start(seed: int) -> None:
    events = plan_events(seed, 300)
    assert {event.disturbance for event in events} == set(Disturbance)
    for earlier, later in zip(events, events[1:], strict=False):
        assert MIN_GAP_S <= later.at_s - earlier.at_s <= MAX_GAP_S
        assert earlier.hold_s < MIN_GAP_S
    kills = [event for event in events if event.disturbance in KILLS]
    assert all(kill.hold_s == 0 and kill.at_s <= 240 for kill in kills)
    for earlier, later in zip(kills, kills[1:], strict=False):
        assert later.at_s - earlier.at_s >= MIN_KILL_GAP_S
    assert events[-1].at_s <= 290


def test_a_short_run_has_events_too() -> None:
    assert plan_events(1, 60)
    assert plan_events(1, 5) == []


# Judging. Engine lives: up from 10 s on, unless said otherwise.


def life(**more: Any) -> Life:
    return Life(**{"started_s": 0.0, "ready_s": 10.0, **more})


def asked(
    side: Side = Side.CONSUMER, status: int | None = 200, message: str = "", **more: Any
) -> Leg:
    times = {"life": 0, "begun_s": 20.0, "ended_s": 30.0, **more}
    return Leg(side, status=status, message=message, **times)


def verdict(
    *legs: Leg,
    fate: Fate = Fate.ENDED,
    difference: str | None = None,
    producer: Life | None = None,
    consumer: Life | None = None,
) -> Tally:
    record = Record(0, fate, legs, difference)
    lives = {Side.PRODUCER: [producer or life()], Side.CONSUMER: [consumer or life()]}
    tally = judge([record], lives)
    parts = (tally.answered, tally.wrong, tally.failed, tally.unexplained, tally.hung)
    assert sum(parts) == tally.sent == 1
    return tally


def test_an_equal_answer_is_answered_and_any_other_is_wrong() -> None:
    legs = (asked(Side.PRODUCER), asked())
    assert verdict(*legs).answered == 1
    wrong = verdict(*legs, difference="token 3 is 7, expected 8")
    assert (wrong.wrong, wrong.differences) == (1, ["request 0: token 3 is 7, expected 8"])


def test_the_consumers_answer_counts_even_where_the_producer_failed() -> None:
    assert verdict(asked(Side.PRODUCER, None, "ReadError"), asked()).answered == 1


def test_a_client_that_left_or_waited_too_long_is_told_apart() -> None:
    assert verdict(fate=Fate.LEFT).reasons == {"client left": 1}
    assert verdict(asked(Side.PRODUCER), fate=Fate.HUNG).hung == 1


def test_a_producer_without_params_is_unexplained() -> None:
    tally = verdict(asked(Side.PRODUCER))
    assert tally.mysteries == {"producer gave no kv_transfer_params": 1}


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (life(ended_s=29.0, ending=Ending.KILLED), "consumer was killed"),
        (life(ended_s=33.0, ending=Ending.DIED), "consumer died by itself"),
        (life(ready_s=25.0), "consumer was starting"),
        (life(stops=[(5.0, 21.0)]), "consumer was stopped"),
    ],
)
def test_a_broken_connection_is_excused_by_what_the_engine_went_through(
    engine: Life, reason: str
) -> None:
    assert verdict(asked(status=None, message="ReadError"), consumer=engine).reasons == {reason: 1}


@pytest.mark.parametrize(
    "engine",
    [
        life(),
        life(ended_s=31.0, ending=Ending.KILLED),
        life(ended_s=36.0, ending=Ending.DIED),
        life(stops=[(5.0, 19.0), (31.0, 35.0)]),
    ],
)
def test_a_broken_connection_to_a_healthy_engine_is_unexplained(engine: Life) -> None:
    tally = verdict(asked(status=None, message="ReadError"), consumer=engine)
    assert tally.mysteries == {"consumer: ReadError": 1}


def test_an_error_that_names_its_reason_is_explained() -> None:
    tally = verdict(asked(status=400, message="the prompt is too long"))
    assert tally.reasons == {"consumer, HTTP 400: the prompt is too long": 1}


@pytest.mark.parametrize(
    "message", ["Internal server error", "Internal Server Error", "", "EngineCore encountered an x"]
)
def test_an_untelling_error_needs_a_counted_failure(message: str) -> None:
    error = asked(status=500, message=message)
    counted = verdict(error, consumer=life(failures={"peer_unreachable": 1}))
    assert counted.reasons == {"failure counted by the consumer": 1}
    assert verdict(error).unexplained == 1
    assert verdict(error, consumer=life(failures={"aborted": 3})).unexplained == 1
    assert verdict(error, producer=life(failures={"peer_unreachable": 1})).unexplained == 1
    died = life(ended_s=31.0, ending=Ending.DIED)
    assert verdict(error, consumer=died).reasons == {"consumer died by itself": 1}


def test_each_life_explains_its_own_errors_and_no_more_than_it_counted() -> None:
    error = "Internal server error"
    legs = [asked(status=500, message=error, life=index) for index in (0, 0, 0, 1)]
    records = [Record(index, Fate.ENDED, (leg,)) for index, leg in enumerate(legs)]
    lives = [life(failures={"read_failed": 1, "lease_expired": 1}), life(failures={"internal": 9})]
    tally = judge(records, {Side.PRODUCER: [life()], Side.CONSUMER: lives})
    assert (tally.failed, tally.unexplained) == (3, 1)


def test_a_counted_failure_explains_no_error_where_handoffs_are_recomputed() -> None:
    records = [Record(0, Fate.ENDED, (asked(status=500),))]
    lives = {Side.PRODUCER: [life()], Side.CONSUMER: [life(failures={"read_failed": 1})]}
    assert judge(records, lives).failed == 1
    assert judge(records, lives, recomputes=True).unexplained == 1


# Metrics, rows, table.


def test_failures_are_read_from_either_connectors_metrics() -> None:
    assert failure_counts(
        {
            'pd_handoff_failures_total{reason="read_failed"}': 2.0,
            'pd_handoff_failures_created{reason="read_failed"}': 1.7e9,
            "pd_leases_expired_total": 4.0,
        }
    ) == {"read_failed": 2}
    assert failure_counts(
        {
            "vllm:nixl_num_failed_transfers_total": 3.0,
            "vllm:nixl_num_failed_transfers_created": 1.7e9,
            "vllm:nixl_num_kv_expired_reqs_total": 5.0,
        }
    ) == {"nixl_failed_transfer": 3}
    assert failure_counts({"vllm:nixl_num_failed_transfers_total": 0.0}) == {}


def test_blocks_are_counted_from_usage_and_pool() -> None:
    info = (
        'vllm:cache_config_info{block_size="128",num_gpu_blocks="4096",num_gpu_blocks_override="7"}'
    )
    assert num_blocks({"other": 1.0, info: 1.0}) == 4096
    assert num_blocks({'vllm:cache_config_info{num_gpu_blocks="12"}': 1.0}) == 12
    with pytest.raises(LookupError, match="num_gpu_blocks"):
        num_blocks({'vllm:cache_config_info{num_gpu_blocks_override="7"}': 1.0})
    assert used_blocks(3 / 4095, 4096) == 3
    assert used_blocks(0.0, 4096) == 0


def make_row(**changed: Any) -> dict[str, Any]:
    leaked: dict[Side, int | None] = {Side.PRODUCER: 0, Side.CONSUMER: 0}
    lives = {Side.PRODUCER: [life()], Side.CONSUMER: [life()]}
    tally = judge([Record(0, Fate.ENDED, (asked(),))], lives)
    return row("pdplugin", tally, lives, leaked, True, {"drop link": 1}) | changed


def test_a_row_is_clean_if_requests_only_failed_with_a_reason() -> None:
    assert is_clean(make_row(failed=9))
    for name in ("wrong", "unexplained", "hung", "leaked_blocks", "engine_deaths"):
        assert not is_clean(make_row(**{name: 1}))
    assert not is_clean(make_row(leaked_blocks=None))
    assert not is_clean(make_row(came_to_rest=False))


def test_blocks_of_an_engine_that_does_not_tell_are_unknown() -> None:
    lives = {Side.PRODUCER: [life()], Side.CONSUMER: [life(ending=Ending.DIED)]}
    built = row("nixl", Tally(), lives, {Side.PRODUCER: 2, Side.CONSUMER: None}, False, {})
    assert (built["leaked_blocks"], built["engine_deaths"]) == (None, 1)
    assert "| nixl | 0 | 0 | 0 | 0 | 0 | 0 | unknown | 1 |" in table([built])


def test_the_table_lists_each_arm_and_its_reasons() -> None:
    text = table([make_row(failed_reasons={"client left": 4}), make_row(arm="nixl")])
    assert "| pdplugin | 1 | 1 | 0 | 0 | 0 | 0 | 0 | 0 |" in text
    assert "- failed reasons: client left 4" in text
    assert "- events: drop link 1" in text


# Answers and errors.


def completion(text: str = " a b", logprob: float = -0.5) -> Completion:
    logprobs = tuple({f"token_id:{token}": logprob} for token in (1, 2))
    return Completion(text, (1, 2), (logprob, logprob), logprobs, "length", None)


def test_an_answer_is_compared_in_tokens_log_probabilities_and_text() -> None:
    assert judge_answer(completion(), completion()) == (None, False)
    difference, _ = judge_answer(completion(), completion(logprob=-0.6))
    assert difference is not None
    assert "log-probability" in difference
    assert judge_answer(completion(), completion(text="other"))[0] is not None
    assert judge_answer(completion(), None)[0] == "HTTP 200 without a completion"


def test_an_errors_message_is_found_in_json_and_in_text() -> None:
    assert error_message('{"error": {"message": "no such model", "code": 404}}') == "no such model"
    assert error_message("Internal Server Error\n") == "Internal Server Error"
    assert error_message('["odd"]') == '["odd"]'
