"""One request on its way when engines are lost, stop or fail: what is tried again, and where."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from tests.fakes.courses import (
    PROMPT,
    WHOLE,
    D,
    FakeDispatcher,
    P,
    make_request,
    sampling_of,
)
from vllm_pd_plugin.ids import new_handoff_id

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    from vllm_pd_plugin.frontend.requests.course import MAX_ATTEMPTS, Course
    from vllm_pd_plugin.frontend.requests.endings import Ending, Failure
    from vllm_pd_plugin.frontend.requests.legs import LegKind

PREFILL, DECODE, WHOLE_LEG = LegKind.PREFILL, LegKind.DECODE, LegKind.WHOLE
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
ABORT, ERROR = FinishReason.ABORT, FinishReason.ERROR
UNSEEDED: dict[str, Any] = {"presence_penalty": 0.5}
OTHER = "http://another:8000"


@pytest.fixture
def dispatcher() -> FakeDispatcher:
    return FakeDispatcher()


def assert_failed(
    dispatcher: FakeDispatcher, course: Course, failure: Failure, *engines: str
) -> None:
    """The attempt is over on every engine, and another one is due, on others if there are."""
    assert dispatcher.retries == [failure]
    assert dispatcher.open_legs == course.legs == []
    assert dispatcher.blamed == [set(engines)]
    assert course.excluded == set(engines)
    assert dispatcher.endings == []


def assert_goes_on_after(dispatcher: FakeDispatcher, course: Course, *sent: int) -> None:
    """The next attempt takes what the client has got for a part of the prompt, and ends well."""
    course.start()
    for kind in (PREFILL, DECODE):
        assert dispatcher.request(kind).prompt_token_ids == PROMPT + list(sent)
        assert dispatcher.leg(kind).num_tokens == len(PROMPT) + len(sent)
    assert sampling_of(dispatcher.request(DECODE)).max_tokens == 8 - len(sent) - 1
    dispatcher.give_first(course, 60)
    dispatcher.give(course, DECODE, 61, finish=STOP)
    assert dispatcher.tokens == [*sent, 60, 61]
    assert dispatcher.endings == [None]
    assert dispatcher.open_legs == []


# --- engines that are lost -------------------------------------------------------------------


@pytest.mark.parametrize("engine", [P, D])
def test_an_engine_is_lost_before_the_first_token(dispatcher: FakeDispatcher, engine: str) -> None:
    course = dispatcher.begin()
    course.engine_lost(engine)
    assert_failed(dispatcher, course, Failure.ENGINE_LOST, engine)
    assert sorted(dispatcher.aborted) == [DECODE, PREFILL]
    assert_goes_on_after(dispatcher, course)


def test_the_decode_engine_is_lost_after_the_first_token(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin()
    dispatcher.give_first(course, 50)
    course.engine_lost(D)
    assert_failed(dispatcher, course, Failure.ENGINE_LOST, D)
    assert dispatcher.aborted == [DECODE]
    assert_goes_on_after(dispatcher, course, 50)


def test_the_decode_engine_is_lost_in_the_middle_of_the_answer(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin()
    dispatcher.give_first(course, 50)
    dispatcher.give(course, DECODE, 51, 52)
    course.engine_lost(D)
    assert_goes_on_after(dispatcher, course, 50, 51, 52)


def test_the_prefill_engine_is_lost_after_its_token_and_before_the_handoff_is_over(
    dispatcher: FakeDispatcher,
) -> None:
    course = dispatcher.begin()
    dispatcher.give_first(course, 50)
    course.engine_lost(P)
    assert_failed(dispatcher, course, Failure.ENGINE_LOST, P)
    assert dispatcher.aborted == [DECODE]
    assert_goes_on_after(dispatcher, course, 50)


@pytest.mark.parametrize("sampling", [{}, UNSEEDED])
def test_the_prefill_engine_s_loss_is_of_no_account_once_the_decode_engine_works(
    dispatcher: FakeDispatcher, sampling: dict[str, Any]
) -> None:
    course = dispatcher.begin(make_request(**sampling))
    dispatcher.give_first(course, 50)
    dispatcher.give(course, DECODE, 51)
    course.engine_lost(P)
    assert dispatcher.retries == []
    dispatcher.give(course, DECODE, 52, finish=STOP)
    assert dispatcher.endings == [None]


def test_an_unseeded_request_does_without_a_prefill_engine_that_has_handed_off(
    dispatcher: FakeDispatcher,
) -> None:
    course = dispatcher.begin(make_request(**UNSEEDED))
    dispatcher.give(course, DECODE, 50)
    course.engine_lost(P)
    assert (dispatcher.retries, dispatcher.aborted) == ([], [PREFILL])
    assert [leg.kind for leg in dispatcher.open_legs] == [DECODE]


def test_a_seeded_request_needs_the_prefill_engine_s_token_whatever_else_has_come(
    dispatcher: FakeDispatcher,
) -> None:
    course = dispatcher.begin()
    dispatcher.give(course, DECODE, 51)
    course.engine_lost(P)
    assert_failed(dispatcher, course, Failure.ENGINE_LOST, P)
    assert dispatcher.emitted == []
    assert_goes_on_after(dispatcher, course)


def test_what_was_held_does_not_outlive_its_attempt(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin()
    dispatcher.give(course, DECODE, 99, finish=STOP)
    dispatcher.lose(course, P)
    dispatcher.give_first(course, 50)
    assert (dispatcher.tokens, dispatcher.endings) == ([50], [])


@pytest.mark.parametrize("kind", [PREFILL, DECODE])
def test_an_output_of_an_attempt_that_has_failed_goes_nowhere(
    dispatcher: FakeDispatcher, kind: LegKind
) -> None:
    course = dispatcher.begin()
    leg = dispatcher.leg(kind)
    dispatcher.lose(course, P if kind is DECODE else D)
    for finish in (None, STOP, ERROR):
        course.take(leg, EngineCoreOutput(leg.id, [99], finish_reason=finish))
    assert (dispatcher.emitted, dispatcher.endings) == ([], [])
    assert len(dispatcher.retries) == 1
    assert [leg.kind for leg in dispatcher.open_legs] == [PREFILL, DECODE]


def test_an_engine_that_does_everything_is_lost(dispatcher: FakeDispatcher) -> None:
    dispatcher.next_route = WHOLE
    course = dispatcher.begin()
    dispatcher.give(course, WHOLE_LEG, 50)
    course.engine_lost(D)
    assert_failed(dispatcher, course, Failure.ENGINE_LOST, D)
    course.start()
    request = dispatcher.request(WHOLE_LEG)
    assert request.prompt_token_ids == [*PROMPT, 50]
    assert sampling_of(request).max_tokens == 7


def test_an_engine_that_has_no_part_in_it_may_be_lost(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin()
    course.engine_lost(OTHER)
    assert dispatcher.retries == []
    assert len(dispatcher.open_legs) == 2


def test_between_two_attempts_no_loss_matters(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin()
    course.engine_lost(D)
    course.engine_lost(P)
    assert dispatcher.retries == [Failure.ENGINE_LOST]


def test_a_later_attempt_has_a_handoff_and_legs_of_its_own(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin()
    dispatcher.lose(course, P)
    handoffs = {
        (sampling_of(request).extra_args or {})["kv_transfer_params"].get("handoff_id")
        for leg, request in dispatcher.sent
        if leg.kind is PREFILL
    }
    assert len(handoffs) == 2
    assert all(len(handoff) == len(new_handoff_id()) for handoff in handoffs)
    assert len({leg.id for leg, _ in dispatcher.sent}) == 4


# --- engines that stop, and requests that fail on them ---------------------------------------


@pytest.mark.parametrize(("kind", "engine"), [(PREFILL, P), (DECODE, D)])
def test_an_engine_that_stops_is_not_asked_again(
    dispatcher: FakeDispatcher, kind: LegKind, engine: str
) -> None:
    course = dispatcher.begin()
    dispatcher.give(course, kind, finish=ABORT)
    assert_failed(dispatcher, course, Failure.ENGINE_STOPPED, engine)
    assert_goes_on_after(dispatcher, course)


def test_a_handoff_that_fails_may_be_either_engine_s_fault(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin()
    dispatcher.give(course, DECODE, finish=ERROR)
    assert_failed(dispatcher, course, Failure.REQUEST_FAILED, P, D)
    assert dispatcher.aborted == [PREFILL]
    assert_goes_on_after(dispatcher, course)


def test_a_prompt_that_cannot_be_computed_is_the_prefill_engine_s_fault(
    dispatcher: FakeDispatcher,
) -> None:
    course = dispatcher.begin()
    dispatcher.give(course, PREFILL, finish=ERROR)
    assert_failed(dispatcher, course, Failure.REQUEST_FAILED, P)
    assert dispatcher.aborted == [DECODE]
    assert_goes_on_after(dispatcher, course)


def test_an_error_after_the_first_token_does_not_reach_the_client(
    dispatcher: FakeDispatcher,
) -> None:
    course = dispatcher.begin()
    dispatcher.give_first(course, 50)
    dispatcher.give(course, DECODE, finish=ERROR)
    assert_failed(dispatcher, course, Failure.REQUEST_FAILED, P, D)
    assert_goes_on_after(dispatcher, course, 50)


@pytest.mark.parametrize(
    ("finish", "failure"), [(ABORT, Failure.ENGINE_STOPPED), (ERROR, Failure.REQUEST_FAILED)]
)
def test_an_engine_that_does_everything_fails(
    dispatcher: FakeDispatcher, finish: FinishReason, failure: Failure
) -> None:
    dispatcher.next_route = WHOLE
    course = dispatcher.begin()
    dispatcher.give(course, WHOLE_LEG, finish=finish)
    assert_failed(dispatcher, course, failure, D)


def test_a_prefill_engine_that_ends_without_a_token_has_failed(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin()
    dispatcher.give(course, PREFILL, finish=LENGTH)
    assert_failed(dispatcher, course, Failure.REQUEST_FAILED, P)


def test_an_unseeded_prefill_that_stops_before_the_handoff_is_tried_elsewhere(
    dispatcher: FakeDispatcher,
) -> None:
    course = dispatcher.begin(make_request(**UNSEEDED))
    dispatcher.give(course, PREFILL, finish=ABORT)
    assert_failed(dispatcher, course, Failure.ENGINE_STOPPED, P)
    assert dispatcher.aborted == [DECODE]


def test_an_unseeded_prefill_that_is_ended_after_the_handoff_is_no_failure(
    dispatcher: FakeDispatcher,
) -> None:
    course = dispatcher.begin(make_request(**UNSEEDED))
    dispatcher.give(course, DECODE, 50)
    dispatcher.give(course, PREFILL, finish=ABORT)
    assert dispatcher.retries == []
    dispatcher.give(course, DECODE, 51, finish=STOP)
    assert dispatcher.endings == [None]


def test_the_error_of_an_unseeded_prefill_is_the_decode_engine_s_to_deal_with(
    dispatcher: FakeDispatcher,
) -> None:
    course = dispatcher.begin(make_request(**UNSEEDED))
    dispatcher.give(course, PREFILL, finish=ERROR)
    assert (dispatcher.retries, [leg.kind for leg in course.legs]) == ([], [DECODE])
    dispatcher.give(course, DECODE, finish=ERROR)
    assert_failed(dispatcher, course, Failure.REQUEST_FAILED, P)
    assert dispatcher.counted == [P]


def test_a_timeout_ends_the_attempt_on_every_engine(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin()
    dispatcher.give_first(course, 50)
    course.leg_failed(dispatcher.leg(DECODE), Failure.TIMEOUT)
    assert_failed(dispatcher, course, Failure.TIMEOUT, P, D)
    assert dispatcher.aborted == [DECODE]
    assert_goes_on_after(dispatcher, course, 50)


# --- how often -------------------------------------------------------------------------------


def test_the_budget_of_attempts_ends(dispatcher: FakeDispatcher) -> None:
    course = dispatcher.begin()
    for _ in range(MAX_ATTEMPTS - 1):
        dispatcher.lose(course, D)
    assert (course.attempt, dispatcher.endings) == (MAX_ATTEMPTS, [])
    dispatcher.lose(course, D)
    assert dispatcher.endings == [Ending.ATTEMPTS_EXHAUSTED]
    assert len(dispatcher.retries) == MAX_ATTEMPTS - 1
    assert dispatcher.open_legs == []


def test_a_request_is_tried_four_times() -> None:
    assert MAX_ATTEMPTS == 4


def test_every_engine_that_has_failed_the_request_is_remembered(
    dispatcher: FakeDispatcher,
) -> None:
    course = dispatcher.begin()
    dispatcher.lose(course, D)
    dispatcher.lose(course, P)
    assert course.excluded == {D, P}


def test_a_request_that_is_cancelled_between_two_attempts_is_not_started_again(
    dispatcher: FakeDispatcher,
) -> None:
    course = dispatcher.begin()
    course.engine_lost(D)
    course.cancel()
    course.start()
    assert (course.attempt, dispatcher.open_legs, dispatcher.endings) == (1, [], [None])


def test_a_prefill_engine_that_is_lost_while_it_is_asked_costs_no_decode_engine_anything() -> None:
    dispatcher = LosingDispatcher(P)
    course = dispatcher.begin()
    assert [leg.kind for leg, _ in dispatcher.sent] == [PREFILL]
    assert_failed(dispatcher, course, Failure.ENGINE_LOST, P)


def test_a_decode_engine_that_is_lost_while_it_is_asked_ends_the_attempt() -> None:
    dispatcher = LosingDispatcher(D)
    course = dispatcher.begin()
    assert_failed(dispatcher, course, Failure.ENGINE_LOST, D)
    assert sorted(dispatcher.aborted) == [DECODE, PREFILL]


class LosingDispatcher(FakeDispatcher):
    """Finds out that an engine is lost when it sends something to it."""

    def __init__(self, engine: str) -> None:
        super().__init__()
        self._lost = engine

    def send(self, course: Course, leg: Any, request: Any) -> None:
        super().send(course, leg, request)
        if leg.engine == self._lost:
            course.engine_lost(leg.engine)
