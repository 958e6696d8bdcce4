"""How many engines a pool needs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_plugin.frontend.routing.choice import Role
from vllm_pd_plugin.ray_serve.demand import (
    Demand,
    EngineSeen,
    Targets,
    decode_need,
    first_duty,
    move,
    prefill_need,
    replicas,
    together,
)

P, D = Role.PREFILL, Role.DECODE
TARGETS = Targets(ttft_s=1.0, tpot_s=0.05)


def engine(role: Role, **seen: Any) -> EngineSeen:
    whole = {
        "waiting_tokens": 0,
        "prefill_rate": 1000.0 if role is P else None,
        "running": 0,
        "max_running": 100,
        "kv_usage": 0.0,
    }
    return EngineSeen(role, **{**whole, **seen})


def demand(*engines: EngineSeen, **seen: Any) -> Demand:
    return Demand(engines={f"http://{i}": each for i, each in enumerate(engines)}, **seen)


def test_nobody_asks_nobody_is_needed() -> None:
    idle = demand(engine(P), engine(D))
    assert prefill_need(idle, TARGETS) == 0
    assert decode_need(idle, TARGETS) == 0


def test_prefill_engines_keep_up_with_what_arrives() -> None:
    assert prefill_need(demand(engine(P), prompt_tokens_per_s=800), TARGETS) == pytest.approx(1)
    assert prefill_need(demand(engine(P), prompt_tokens_per_s=2400), TARGETS) == pytest.approx(3)


def test_a_queue_that_takes_more_than_half_the_objective_needs_one_engine_more() -> None:
    assert replicas(prefill_need(demand(engine(P, waiting_tokens=500)), TARGETS), 1) == 1
    assert replicas(prefill_need(demand(engine(P, waiting_tokens=501)), TARGETS), 1) == 2
    shared = demand(engine(P, waiting_tokens=501), engine(P), prompt_tokens_per_s=900)
    assert replicas(prefill_need(shared, TARGETS), 2) == 2


def test_a_long_queue_is_worked_off_in_half_a_minute() -> None:
    waiting = demand(engine(P, waiting_tokens=60_000), engine(P), prompt_tokens_per_s=800)
    assert prefill_need(waiting, TARGETS) == pytest.approx(1 + 2)
    nowhere = demand(engine(P), waiting_tokens=90_000)
    assert prefill_need(nowhere, TARGETS) == pytest.approx(3)


def test_without_prefill_engines_the_rate_of_others_counts() -> None:
    alone = demand(engine(D, prefill_rate=500.0), prompt_tokens_per_s=800)
    assert prefill_need(alone, TARGETS) == pytest.approx(2)


@pytest.mark.parametrize(
    ("seen", "need"),
    [({"running": 85}, 1.0), ({"running": 2, "kv_usage": 0.85}, 1.0), ({"running": 170}, 2.0)],
)
def test_decode_engines_have_slots_and_memory(seen: dict[str, float], need: float) -> None:
    assert decode_need(demand(engine(D, **seen)), TARGETS) == pytest.approx(need)


def decoding(num_engines: int, **seen: float) -> float:
    """The need for decode engines that have slots and memory enough."""
    engines = [engine(D, running=1) for _ in range(num_engines)]
    return decode_need(demand(*engines, **seen), TARGETS)


@pytest.mark.parametrize(
    ("engines", "itl_s", "need"),
    [(1, 0.0425, 1.0), (1, 0.085, 2.0), (4, 0.02125, 2.0), (4, 0.010625, 1.0)],
)
def test_decode_engines_keep_to_the_objective_with_some_room(
    engines: int, itl_s: float, need: float
) -> None:
    assert decoding(engines, itl_s=itl_s, decoding=20.0) == pytest.approx(need)


def test_more_engines_than_requests_make_no_step_shorter() -> None:
    assert decoding(1, itl_s=1.0, decoding=3.0) == pytest.approx(3.0)
    assert decoding(1, itl_s=1.0, decoding=0.5) < 0.1


def test_decode_engines_are_needed_for_what_has_not_come_through_yet() -> None:
    """A prefill pool that is too small holds requests back from the decode engines."""
    arriving = {"requests_per_s": 20.0, "answer_tokens": 100.0}
    # 20/s x 100 tokens x 21 ms = 42.5 requests, where 10 are decoding.
    seen = {"itl_s": 0.02125, "decoding": 10.0}
    assert decoding(1, **seen, **arriving) == pytest.approx(0.5 * 4.25)
    arriving["requests_per_s"] = 1.0
    assert decoding(1, **seen, **arriving) == pytest.approx(0.5)


def test_requests_that_wait_for_an_engine_need_one() -> None:
    assert decode_need(demand(waiting=3), TARGETS) == 1.0
    assert replicas(decode_need(demand(waiting=3), TARGETS), 0) == 1


@pytest.mark.parametrize(
    ("need", "current", "expected"),
    [
        (0.0, 3, 0),  # nothing to do at all; Serve keeps to the least that is allowed
        (0.5, 0, 1),
        (0.01, 0, 0),
        (0.01, 1, 0),
        (1.0, 1, 1),
        (1.01, 1, 2),
        (4.2, 2, 5),
        (1.9, 3, 3),  # two would be just enough: not given up yet
        (1.8, 3, 2),
        (0.9, 2, 2),
        (0.8, 2, 1),
    ],
)
def test_a_pool_grows_at_once_and_shrinks_when_clearly_fewer_do(
    need: float, current: int, expected: int
) -> None:
    assert replicas(need, current) == expected


@given(st.floats(0, 50), st.integers(0, 50))
def test_a_pool_comes_to_rest(need: float, current: int) -> None:
    first = replicas(need, current)
    assert replicas(need, first) == first


@given(st.floats(0.1, 50), st.integers(0, 50))
def test_a_pool_is_never_made_smaller_than_what_is_needed(need: float, current: int) -> None:
    assert replicas(need, current) >= need - 1e-6


def test_frontends_add_up_and_engines_are_seen_once() -> None:
    shared = engine(P, waiting_tokens=100)
    one = demand(
        shared,
        requests_per_s=1.0,
        prompt_tokens_per_s=10,
        answer_tokens=10,
        itl_s=0.01,
        decoding=1.0,
    )
    other = demand(
        shared,
        requests_per_s=3.0,
        prompt_tokens_per_s=30,
        answer_tokens=50,
        itl_s=0.03,
        decoding=3.0,
    )
    both = together([one, other])
    assert both.requests_per_s == 4
    assert both.prompt_tokens_per_s == 40
    assert both.answer_tokens == pytest.approx(40)
    assert both.itl_s == pytest.approx(0.025)
    assert both.decoding == 4.0
    assert both.engines == {"http://0": shared}
    assert together([]) == Demand()


def test_a_new_engine_works_for_the_smaller_pool() -> None:
    assert first_duty({}) is D
    assert first_duty({D: 1}) is P
    assert first_duty({D: 1, P: 1}) is D


@pytest.mark.parametrize(
    ("flexible", "fixed", "needs", "expected"),
    [
        ({"a": P, "b": D}, {}, {P: 1.0, D: 1.0}, None),
        ({"a": P, "b": P, "c": D}, {}, {P: 0.5, D: 1.5}, ("a", D)),
        ({"a": P, "b": P, "c": D}, {}, {P: 0.95, D: 1.5}, None),  # prefill needs both of its
        ({"a": P, "b": D, "c": D}, {}, {P: 1.5, D: 0.5}, ("b", P)),
        ({"a": P, "b": D}, {D: 1}, {P: 1.5, D: 0.5}, ("b", P)),
        ({"a": P}, {P: 1}, {P: 0.1, D: 0.1}, ("a", D)),  # nobody decodes
        ({"a": D}, {}, {P: 1.5, D: 0.1}, None),  # the last one that decodes
        ({"a": D, "b": D}, {}, {P: 0.5, D: 0.5}, ("a", P)),
        ({"a": P, "b": D}, {}, {P: 0.1, D: 1.5}, None),  # the last one of a pool stays
        ({}, {P: 3, D: 1}, {P: 0.1, D: 3.0}, None),
    ],
)
def test_an_engine_moves_where_one_side_starves_and_the_other_has_one_to_spare(
    flexible: dict[str, Role],
    fixed: dict[Role, int],
    needs: dict[Role, float],
    expected: tuple[str, Role] | None,
) -> None:
    assert move(flexible, fixed, needs) == expected
