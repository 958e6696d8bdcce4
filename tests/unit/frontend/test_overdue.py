"""Which parts of requests have taken too long."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.fakes.courses import FakeDispatcher, make_request
    from tests.fakes.links import make_member
    from vllm_pd_plugin.frontend.overdue import OpenLegs, Seen, is_overdue
    from vllm_pd_plugin.frontend.pool.members import Pool
    from vllm_pd_plugin.frontend.requests.course import Course
    from vllm_pd_plugin.frontend.requests.legs import Leg, LegKind
    from vllm_pd_plugin.frontend.routing.choice import Reason, Role, Route
    from vllm_pd_plugin.frontend.telemetry.tracing import Marks
    from vllm_pd_plugin.frontend.underway import Limits, Underway

PREFILL, DECODE, WHOLE = LegKind.PREFILL, LegKind.DECODE, LegKind.WHOLE
LIMITS = Limits(first_token_s=20.0, stall_s=10.0)
START = 1000.0


def leg(kind: LegKind = WHOLE, **known: Any) -> Leg:
    return Leg("r-1", "e", kind, 100, START, **known)


def overdue(leg: Leg, now: float, **seen: Any) -> bool:
    return is_overdue(leg, Seen(**{"last_output_at": 0.0, **seen}), LIMITS, START + now)


@pytest.mark.parametrize("kind", list(LegKind))
def test_to_wait_at_an_engine_that_goes_on_is_no_failure(kind: LegKind) -> None:
    assert not overdue(leg(kind), 3000, engine_moved_at=START + 2990)
    assert overdue(leg(kind), 3000, engine_moved_at=START + 2979)


def test_an_engine_that_was_idle_before_has_its_time() -> None:
    assert not overdue(leg(), 19)
    assert overdue(leg(), 21)
    assert not overdue(leg(), 19, engine_moved_at=START - 500)


def test_once_an_engine_works_on_it_its_own_time_counts() -> None:
    begun = leg(begun_at=START + 100)
    assert not overdue(begun, 119, engine_moved_at=START + 119)
    assert overdue(begun, 121, engine_moved_at=START + 121)


def test_an_answer_that_stands_still_is_overdue_whatever_else_the_engine_does() -> None:
    decodes = leg(has_output=True)
    assert not overdue(decodes, 59, last_output_at=START + 50)
    assert overdue(decodes, 61, last_output_at=START + 50, engine_moved_at=START + 61)


def test_an_answer_that_was_put_back_waits() -> None:
    waits = leg(has_output=True, is_preempted=True)
    assert not overdue(waits, 500, last_output_at=START + 50, engine_moved_at=START + 499)
    assert overdue(waits, 500, last_output_at=START + 50, engine_moved_at=START + 489)


def test_who_is_to_decode_waits_for_the_prompt_as_long_as_that_takes() -> None:
    fetches = leg(DECODE, begun_at=START)
    assert not overdue(fetches, 500, prefills=True)
    assert not overdue(fetches, 519, prefilled_at=START + 500)
    assert overdue(fetches, 521, prefilled_at=START + 500)


def test_a_prompt_whose_answer_has_begun_is_not_waited_for() -> None:
    assert overdue(leg(PREFILL), 21)
    assert not overdue(leg(PREFILL), 21, decodes=True)


class LookedAt(Leg):
    """Counts how often somebody looks at it."""

    looks = 0

    @property
    def is_waiting(self) -> bool:
        LookedAt.looks += 1
        return super().is_waiting


def test_a_leg_is_looked_at_when_it_may_be_overdue_and_not_before() -> None:
    pool = Pool(lambda: START)
    pool.add(make_member("e", Role.BOTH))
    legs = OpenLegs(LIMITS, pool)
    course = Course(make_request(), FakeDispatcher())
    underway: Any = Underway(course, None, Marks(START), START + 500, ("", ""))  # type: ignore[arg-type]
    each = LookedAt("r-1", "e", WHOLE, 100, START)
    legs.put(underway, each)
    for quarter in range(40):
        assert list(legs.overdue(START + quarter / 4)) == []
    assert LookedAt.looks == 0
    each.has_output = True
    legs.hear("r-1", START + 9)
    found = []
    for quarter in range(40, 80):
        found += [(quarter / 4, leg.id) for _, leg in legs.overdue(START + quarter / 4)]
    assert found[0] == (19.25, "r-1"), "10 s after it was heard of"
    legs.remove("r-1")
    assert list(legs.overdue(START + 300)) == []


def test_a_fault_with_one_overdue_leg_forgets_none() -> None:
    pool = Pool(lambda: START)
    pool.add(make_member("e", Role.BOTH))
    legs = OpenLegs(LIMITS, pool)
    course = Course(make_request(), FakeDispatcher())
    underway: Any = Underway(course, None, Marks(START), START + 900, ("", ""))  # type: ignore[arg-type]
    for name in ("a", "b"):
        legs.put(underway, Leg(name, "e", WHOLE, 100, START))
    with contextlib.closing(legs.overdue(START + 500)) as broken_off:
        next(broken_off)  # what is done about it fails
    assert {leg.id for _, leg in legs.overdue(START + 800)} == {"a", "b"}


def test_an_engine_s_requests_are_those_that_it_works_on_or_hands_over() -> None:
    legs, dispatcher = OpenLegs(LIMITS, Pool(lambda: START)), FakeDispatcher()
    there: dict[str, Any] = {}
    for name, route in (
        ("a", Route("p", "d", Reason.DISAGGREGATED)),
        ("b", Route(None, "p", Reason.SHORT)),
    ):
        dispatcher.next_route = route
        course = Course(make_request(name), dispatcher)
        course.start()
        there[name] = Underway(course, None, Marks(START), START, ("", ""))  # type: ignore[arg-type]
    legs.put(there["a"], Leg("a-1p", "p", PREFILL, 100, START))
    legs.put(there["a"], Leg("a-1d", "d", DECODE, 100, START))
    legs.put(there["b"], Leg("b-1w", "p", WHOLE, 100, START))
    assert legs.on("p") == [there["a"], there["b"]]
    assert legs.on("d") == [there["a"]]
    legs.remove("a-1p")
    assert legs.on("p") == [there["a"], there["b"]], "its KV may not be with the other yet"
    legs.remove("a-1d")
    assert (legs.on("p"), legs.on("d")) == ([there["b"]], [])
