"""One request on its way when nothing goes wrong: what its client gets, and when."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from tests.fakes.courses import (
    DISAGGREGATED,
    PROMPT,
    WHOLE,
    D,
    FakeDispatcher,
    P,
    control_address,
    make_request,
    sampling_of,
    transfer_of,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import (
        EngineCoreEvent,
        EngineCoreEventType,
        EngineCoreOutput,
        FinishReason,
    )
    from vllm.v1.metrics.stats import PrefillStats

    from vllm_pd_plugin.frontend.requests.endings import Ending
    from vllm_pd_plugin.frontend.requests.legs import LegKind
    from vllm_pd_plugin.frontend.routing.choice import Unroutable

PREFILL, DECODE = LegKind.PREFILL, LegKind.DECODE
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
UNSEEDED: dict[str, Any] = {"presence_penalty": 0.5}
"""Sampling that a decode engine cannot go on with after another's token."""


@pytest.fixture
def dispatcher() -> FakeDispatcher:
    return FakeDispatcher()


def kinds(dispatcher: FakeDispatcher) -> list[LegKind]:
    return [leg.kind for leg in dispatcher.open_legs]


# --- the decode engine goes on after the prefill engine's token -------------------------------


def test_both_engines_are_asked_at_once(dispatcher: FakeDispatcher) -> None:
    dispatcher.begin()
    assert [(leg.kind, leg.engine) for leg in dispatcher.open_legs] == [(PREFILL, P), (DECODE, D)]
    produce, consume = (
        transfer_of(dispatcher.request(PREFILL)),
        transfer_of(dispatcher.request(DECODE)),
    )
    assert produce is not None
    assert consume is not None
    assert produce["handoff_id"] == consume["remote_handoff_id"]
    (host, port), incarnation = control_address(P)
    assert (consume["remote_host"], consume["remote_port"]) == (host, port)
    assert consume["remote_incarnation"] == incarnation
    assert consume["seed_first_token"] is True


def test_the_first_token_is_the_prefill_engine_s(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin()
    dispatcher.give_first(course, 50)
    assert dispatcher.tokens == [50]
    assert dispatcher.finish is None
    assert kinds(dispatcher) == [DECODE]


def test_the_answer_goes_on_with_the_decode_engine_s_tokens(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin()
    dispatcher.give_first(course, 50)
    dispatcher.give(course, DECODE, 51)
    dispatcher.give(course, DECODE, 52, 53)
    dispatcher.give(course, DECODE, 54, finish=STOP, stop_reason=54)
    assert [output.new_token_ids for output in dispatcher.emitted] == [[50], [51], [52, 53], [54]]
    assert (dispatcher.finish, dispatcher.emitted[-1].stop_reason) == (STOP, 54)
    assert dispatcher.endings == [None]
    assert dispatcher.open_legs == []
    assert dispatcher.aborted == []
    assert course.sent == [50, 51, 52, 53, 54]


def test_what_the_decode_engine_gives_out_before_the_first_token_is_held(
    dispatcher: FakeDispatcher,
) -> None:
    course = dispatcher.begin()
    dispatcher.give(course, DECODE, 51)
    dispatcher.give(course, DECODE, 52, finish=STOP)
    assert dispatcher.emitted == []
    assert not course.is_over
    assert kinds(dispatcher) == [PREFILL]
    dispatcher.give_first(course, 50)
    assert [output.new_token_ids for output in dispatcher.emitted] == [[50], [51], [52]]
    assert dispatcher.finish is STOP
    assert dispatcher.endings == [None]


def test_what_was_held_is_given_out_once(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin()
    dispatcher.give(course, DECODE, 51)
    dispatcher.give_first(course, 50)
    dispatcher.give(course, DECODE, 52)
    assert dispatcher.tokens == [50, 51, 52]


@pytest.mark.parametrize("finish", [STOP, FinishReason.REPETITION])
def test_an_answer_of_one_token_ends_with_the_prefill_engine(
    dispatcher: FakeDispatcher, finish: FinishReason
) -> None:
    course = dispatcher.begin()
    dispatcher.give(course, PREFILL, 50, finish=finish)
    assert (dispatcher.tokens, dispatcher.finish) == ([50], finish)
    assert dispatcher.endings == [None]
    assert dispatcher.aborted == [DECODE]
    assert course.is_over


def test_what_was_held_behind_the_last_token_is_not_given_out(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin()
    dispatcher.give(course, DECODE, 51)
    dispatcher.give(course, PREFILL, 50, finish=STOP)
    assert dispatcher.tokens == [50]
    assert dispatcher.aborted == [DECODE]


def test_where_one_token_is_wanted_the_prefill_engine_s_length_is_the_answer_s(
    dispatcher: FakeDispatcher,
) -> None:
    course = dispatcher.begin(make_request(max_tokens=1))
    dispatcher.give_first(course, 50)
    assert (dispatcher.tokens, dispatcher.finish) == ([50], LENGTH)
    assert dispatcher.open_legs == []


@pytest.mark.parametrize("max_tokens", [2, 8])
def test_the_decode_engine_owes_one_token_less(dispatcher: FakeDispatcher, max_tokens: int) -> None:
    dispatcher.begin(make_request(max_tokens=max_tokens))
    assert sampling_of(dispatcher.request(PREFILL)).max_tokens == 1
    assert sampling_of(dispatcher.request(DECODE)).max_tokens == max_tokens - 1


# --- the decode engine samples everything ----------------------------------------------------


def test_the_prefill_engine_s_token_is_not_used_where_sampling_carries_state(
    dispatcher: FakeDispatcher,
) -> None:
    course = dispatcher.begin(make_request(**UNSEEDED))
    consume = transfer_of(dispatcher.request(DECODE))
    assert consume is not None
    assert "seed_first_token" not in consume
    assert sampling_of(dispatcher.request(DECODE)).max_tokens == 8
    dispatcher.give_first(course, 99)
    assert dispatcher.emitted == []
    dispatcher.give(course, DECODE, 50)
    dispatcher.give(course, DECODE, 51, finish=STOP)
    assert (dispatcher.tokens, dispatcher.finish) == ([50, 51], STOP)
    assert dispatcher.aborted == []


def test_an_end_of_the_prefill_engine_s_own_token_is_none_of_the_answer(
    dispatcher: FakeDispatcher,
) -> None:
    course = dispatcher.begin(make_request(**UNSEEDED))
    dispatcher.give(course, PREFILL, 99, finish=STOP)
    assert (dispatcher.emitted, dispatcher.endings) == ([], [])
    assert kinds(dispatcher) == [DECODE]


def test_nothing_is_held_where_the_prefill_engine_s_token_is_not_used(
    dispatcher: FakeDispatcher,
) -> None:
    course = dispatcher.begin(make_request(**UNSEEDED))
    dispatcher.give(course, DECODE, 50)
    assert dispatcher.tokens == [50]
    dispatcher.give_first(course, 99)
    assert dispatcher.tokens == [50]


def test_a_prefill_that_goes_on_after_the_answer_s_end_is_ended(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin(make_request(**UNSEEDED))
    dispatcher.give(course, DECODE, 50, finish=STOP)
    assert dispatcher.endings == [None]
    assert dispatcher.aborted == [PREFILL]


# --- one engine does everything --------------------------------------------------------------


def test_one_engine_can_do_everything(dispatcher: FakeDispatcher) -> None:
    dispatcher.next_route = WHOLE
    course = dispatcher.begin()
    assert [(leg.kind, leg.engine) for leg in dispatcher.open_legs] == [(LegKind.WHOLE, D)]
    request = dispatcher.request(LegKind.WHOLE)
    assert transfer_of(request) is None
    assert sampling_of(request).max_tokens == 8
    dispatcher.give(course, LegKind.WHOLE, 50)
    dispatcher.give(course, LegKind.WHOLE, 51, finish=LENGTH)
    assert (dispatcher.tokens, dispatcher.finish) == ([50, 51], LENGTH)
    assert dispatcher.endings == [None]
    assert dispatcher.aborted == []


# --- what the client sees of it --------------------------------------------------------------


def test_an_output_is_the_client_s_request_s_and_says_nothing_of_handoffs(
    dispatcher: FakeDispatcher,
) -> None:
    course = dispatcher.begin()
    handoff = {"do_remote_prefill": True}
    dispatcher.give(course, PREFILL, 50, finish=LENGTH, kv_transfer_params=handoff)
    dispatcher.give(course, DECODE, 51, finish=STOP, kv_transfer_params=handoff)
    assert [output.request_id for output in dispatcher.emitted] == ["r", "r"]
    assert [output.kv_transfer_params for output in dispatcher.emitted] == [None, None]


@pytest.mark.parametrize("sampling", [{}, UNSEEDED])
def test_the_usage_tells_what_was_cached_where_the_prompt_was_computed(
    dispatcher: FakeDispatcher, sampling: dict[str, Any]
) -> None:
    course = dispatcher.begin(make_request(**sampling))
    computed = PrefillStats(num_prompt_tokens=4, num_computed_tokens=3, num_cached_tokens=1)
    fetched = PrefillStats(num_prompt_tokens=5, num_computed_tokens=1, num_cached_tokens=4)
    dispatcher.give(course, PREFILL, 50, finish=LENGTH, prefill_stats=computed)
    dispatcher.give(course, DECODE, 51, prefill_stats=fetched)
    dispatcher.give(course, DECODE, 52)
    stats = [output.prefill_stats for output in dispatcher.emitted]
    assert stats[0] == computed
    assert all(each in (None, computed) for each in stats)
    assert stats[-1] is None


def test_the_usage_of_a_whole_request_is_its_engine_s(dispatcher: FakeDispatcher) -> None:
    dispatcher.next_route = WHOLE
    course = dispatcher.begin()
    stats = PrefillStats(num_prompt_tokens=4, num_computed_tokens=4)
    dispatcher.give(course, LegKind.WHOLE, 50, prefill_stats=stats)
    assert dispatcher.emitted[0].prefill_stats == stats


def test_the_client_s_request_is_not_touched(dispatcher: FakeDispatcher) -> None:
    request = make_request(stop_token_ids=[3], extra_args={"kv_transfer_params": {"codec": "int8"}})
    course = dispatcher.begin(request)
    dispatcher.give_first(course, 50)
    dispatcher.lose(course, D)
    dispatcher.give_first(course, 51)
    assert request.request_id == "r"
    assert request.prompt_token_ids == PROMPT
    params = sampling_of(request)
    assert (params.max_tokens, params.stop_token_ids) == (8, [3])
    assert params.extra_args == {"kv_transfer_params": {"codec": "int8"}}


# --- waiting, and ending early ---------------------------------------------------------------


def test_a_request_waits_for_an_engine_without_spending_an_attempt(
    dispatcher: FakeDispatcher,
) -> None:
    dispatcher.next_route = Unroutable.NO_DECODE
    course = dispatcher.begin()
    assert dispatcher.queued == [Unroutable.NO_DECODE]
    assert (course.attempt, dispatcher.sent) == (0, [])
    dispatcher.next_route = DISAGGREGATED
    course.start()
    assert (course.attempt, kinds(dispatcher)) == (1, [PREFILL, DECODE])


def test_a_request_that_has_waited_in_vain_is_given_up_once(dispatcher: FakeDispatcher) -> None:
    dispatcher.next_route = Unroutable.NO_DECODE
    course = dispatcher.begin()
    course.give_up(Ending.NO_ENGINE)
    course.give_up(Ending.DEADLINE)
    assert dispatcher.endings == [Ending.NO_ENGINE]
    course.start()
    assert dispatcher.sent == []


@pytest.mark.parametrize("has_first", [False, True])
def test_a_cancelled_request_ends_on_every_engine(
    dispatcher: FakeDispatcher, has_first: bool
) -> None:
    course = dispatcher.begin()
    if has_first:
        dispatcher.give_first(course, 50)
    course.cancel()
    course.cancel()
    assert dispatcher.endings == [None]
    assert dispatcher.open_legs == []
    assert dispatcher.aborted == ([DECODE] if has_first else [PREFILL, DECODE])


def test_a_deadline_ends_a_request_on_every_engine(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin()
    course.give_up(Ending.DEADLINE)
    assert dispatcher.endings == [Ending.DEADLINE]
    assert dispatcher.aborted == [PREFILL, DECODE]


def test_what_comes_after_the_end_goes_nowhere(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin()
    legs = dispatcher.open_legs
    course.cancel()
    for leg in legs:
        course.take(leg, EngineCoreOutput(leg.id, [50], finish_reason=STOP))
        course.engine_lost(leg.engine)
    assert (dispatcher.emitted, dispatcher.retries, dispatcher.endings) == ([], [], [None])


def test_a_leg_knows_what_routing_counts(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin()
    prefill, decode = dispatcher.open_legs
    assert prefill.num_tokens == decode.num_tokens == len(PROMPT)
    assert prefill.started_at == dispatcher.clock.now
    dispatcher.give(course, DECODE, 51)
    assert (prefill.has_output, decode.has_output) == (False, True)


def test_when_it_was_queued_and_scheduled_is_told_once(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin()
    times = [EngineCoreEvent(kind, 1.0) for kind in EngineCoreEventType]
    dispatcher.give(course, PREFILL, 50, finish=LENGTH, events=list(times))
    dispatcher.give(course, DECODE, 51, events=list(times))
    first, second = dispatcher.emitted
    assert first.events == times
    assert second.events is not None
    assert [event.type for event in second.events] == [EngineCoreEventType.PREEMPTED]


def test_the_usage_is_that_of_the_attempt_that_succeeds(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin(make_request(**UNSEEDED))
    lost = PrefillStats(num_prompt_tokens=4, num_computed_tokens=3, num_cached_tokens=1)
    dispatcher.give(course, PREFILL, 99, finish=LENGTH, prefill_stats=lost)
    dispatcher.next_route = WHOLE
    dispatcher.lose(course, D)
    stats = PrefillStats(num_prompt_tokens=4, num_computed_tokens=4)
    dispatcher.give(course, LegKind.WHOLE, 50, prefill_stats=stats)
    assert dispatcher.emitted[0].prefill_stats == stats
