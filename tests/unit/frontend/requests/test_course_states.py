"""How far a course is, and what one attempt has seen."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.fakes.courses import DISAGGREGATED, D, FakeDispatcher, P, make_request
    from vllm_pd_plugin.frontend.requests.course import (
        TRANSITIONS,
        Course,
        CourseEvent,
        CourseState,
    )
    from vllm_pd_plugin.frontend.requests.endings import Ending, Failure
    from vllm_pd_plugin.frontend.routing.choice import Unroutable

Transition = tuple[CourseState, CourseEvent]


def waiting() -> Course:
    return Course(make_request(), FakeDispatcher())


def underway() -> Course:
    course = waiting()
    course.start()
    return course


def over() -> Course:
    course = waiting()
    course.cancel()
    return course


AT: dict[CourseState, Callable[[], Course]] = {
    CourseState.WAITING: waiting,
    CourseState.UNDERWAY: underway,
    CourseState.OVER: over,
}
HAPPENINGS: dict[CourseEvent, Callable[[Course], None]] = {
    CourseEvent.BEGUN: Course.start,
    CourseEvent.FAILED: lambda course: course.engine_lost(P),
    CourseEvent.ENDED: lambda course: course.give_up(Ending.DEADLINE),
}


@pytest.mark.parametrize("transition", TRANSITIONS, ids=lambda t: f"{t[0].name}-{t[1].name}")
def test_every_transition_is_made(transition: Transition) -> None:
    state, event = transition
    course = AT[state]()
    assert course.state is state
    HAPPENINGS[event](course)
    assert course.state is TRANSITIONS[transition]


@pytest.mark.parametrize(
    ("state", "event"),
    [(CourseState.WAITING, CourseEvent.FAILED)]
    + [(CourseState.OVER, event) for event in CourseEvent],
)
def test_what_cannot_happen_changes_nothing(state: CourseState, event: CourseEvent) -> None:
    """An engine may be lost while no attempt is under way, and anything come when it is over."""
    course = AT[state]()
    HAPPENINGS[event](course)
    assert course.state is state
    assert (state, event) not in TRANSITIONS


def test_a_course_that_finds_no_engine_waits_on() -> None:
    dispatcher = FakeDispatcher(Unroutable.FULL)
    course = Course(make_request(), dispatcher)
    course.start()
    assert (course.state, course.attempt, course.route) == (CourseState.WAITING, 0, None)


def test_an_attempt_begins_with_nothing_of_the_one_before() -> None:
    dispatcher = FakeDispatcher()
    course = Course(make_request(), dispatcher)
    course.start()
    first = course._latest
    (prefill, decode) = course.legs
    course.leg_failed(prefill, Failure.TIMEOUT)
    assert first is not None
    assert (first.number, first.legs, first.take_held()) == (1, [], [])
    assert course.route == DISAGGREGATED, "that of the latest attempt"
    course.start()
    second = course._latest
    assert second is not first
    assert second is not None
    assert second.number == course.attempt == 2
    assert {leg.id for leg in second.legs}.isdisjoint({prefill.id, decode.id})
    assert {leg.engine for leg in second.legs} == {P, D}
