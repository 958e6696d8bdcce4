"""Which requests are turned away."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.admission import (
        Bounds,
        Capacity,
        Gate,
        Queue,
        Refusal,
        TurnedAway,
        admit,
        retry_after_s,
    )
    from vllm_pd_plugin.frontend.routing.choice import Engine, Role

BOUNDS = Bounds(100, 30.0)


def test_as_long_as_there_is_room_everybody_is_taken() -> None:
    assert admit(Queue(99, None, 1, 99), BOUNDS) is None
    assert admit(Queue(100, None, 1, 100), BOUNDS) is Refusal.OVERLOADED


def test_each_answer_that_is_wanted_counts() -> None:
    assert admit(Queue(90, None, 1, 90), BOUNDS, 10) is None
    assert admit(Queue(90, None, 1, 90), BOUNDS, 11) is Refusal.OVERLOADED


def test_a_wait_that_is_predicted_to_be_too_long_is_too_long() -> None:
    assert admit(Queue(5, 30.0, 1, 5), BOUNDS) is None
    assert admit(Queue(5, 30.1, 1, 5), BOUNDS) is Refusal.OVERLOADED


def test_a_flood_is_turned_away_and_whoever_asks_for_little_is_not() -> None:
    assert admit(Queue(100, None, 2, 100), BOUNDS) is Refusal.OVER_SHARE
    assert admit(Queue(100, None, 2, 0), BOUNDS) is None
    assert admit(Queue(140, None, 2, 49), BOUNDS) is None
    assert admit(Queue(140, None, 2, 50), BOUNDS) is Refusal.OVER_SHARE


def test_room_is_for_so_many_answers_and_counts_as_queued_until_they_join() -> None:
    gate = Gate(30.0)
    room = gate.reserve(("batch", ""), 3)
    assert gate.queued == {("batch", ""): 3}
    assert not room.take(4)
    assert room.take(2)
    assert gate.queued == {("batch", ""): 1}
    assert not room.take(2)
    room.give_back()
    room.give_back()
    assert not gate.queued


def test_while_the_frontend_itself_is_late_nobody_is_taken() -> None:
    assert admit(Queue(0, None, 1, 0, lag_s=1.0), BOUNDS) is None
    assert admit(Queue(0, None, 1, 0, lag_s=1.1), BOUNDS) is Refusal.FRONTEND_OVERLOADED
    assert admit(Queue(0, None, 9, 0, lag_s=1.1), BOUNDS) is Refusal.FRONTEND_OVERLOADED


def test_whoever_was_refused_for_that_may_come_again_when_it_has_caught_up() -> None:
    assert retry_after_s(Queue(9, 90.0, 1, 9, lag_s=3.2), BOUNDS) == 4
    assert retry_after_s(Queue(9, None, 1, 9, lag_s=100.0), BOUNDS) == 60


def test_a_gate_looks_at_the_lag() -> None:
    gate = Gate(30.0)
    away = gate.refuse(gate.tenant("default", ""), 1, Capacity(max_running=20), 0, lag_s=1.5)
    assert away == TurnedAway(Refusal.FRONTEND_OVERLOADED, 2)


@given(
    tenants=st.integers(1, 8),
    arrivals=st.lists(st.integers(0, 7), min_size=300, max_size=600),
)
def test_however_they_come_there_is_an_end_to_it(tenants: int, arrivals: list[int]) -> None:
    gate = Gate(30.0)
    engines = Capacity(max_running=40)
    for each in arrivals:
        tenant = gate.tenant(str(each % tenants), "")
        if gate.refuse(tenant, 1, engines, 0) is None:
            gate.joined(tenant)
    assert gate.queued.total() <= 2 * 40
    assert all(number <= 40 for number in gate.queued.values())


def test_what_has_its_first_token_makes_room() -> None:
    gate = Gate(30.0)
    engines = Capacity(max_running=20)
    me = gate.tenant("default", "")
    for _ in range(20):
        gate.joined(me)
    refused = gate.refuse(me, 1, engines, 0)
    assert refused is not None
    assert refused.why is Refusal.OVERLOADED
    gate.left(me)
    assert gate.refuse(me, 1, engines, 0) is None
    for _ in range(19):
        gate.left(me)
    assert not gate.queued, "nobody is remembered for nothing"


def test_keys_tell_tenants_apart_only_where_they_were_checked() -> None:
    gate = Gate(30.0)
    assert gate.tenant("batch", "made up") == gate.tenant("batch", "another")
    gate.tells_keys_apart = True
    assert gate.tenant("batch", "mine") != gate.tenant("batch", "yours")
    assert gate.tenant("batch", "mine") != gate.tenant("default", "mine")


def test_a_limit_of_the_operator_s_own_takes_the_place_of_the_number() -> None:
    gate = Gate(30.0, has_limit=True)
    engines = Capacity(max_running=1)
    for _ in range(1000):
        gate.joined(("default", ""))
    assert gate.refuse(("default", ""), 1, engines, 0) is None


def test_as_many_may_wait_as_the_pool_decodes_at_once() -> None:
    engines = [
        Engine("p", Role.PREFILL, max_running=256),
        Engine("d", Role.DECODE, max_running=128),
        Engine("b", Role.BOTH, max_running=64),
    ]
    assert Capacity.of(engines).most_waiting == 192
    assert Capacity.of(engines[:1]).most_waiting == 16


def test_how_long_a_prompt_waits_is_predicted_from_what_is_known() -> None:
    fast = Engine("p", Role.PREFILL, prefill_tokens=6000, prefill_rate=3000.0)
    slow = Engine("q", Role.PREFILL, prefill_tokens=0, prefill_rate=1000.0)
    new = Engine("n", Role.PREFILL, prefill_tokens=0)
    decode = Engine("d", Role.DECODE, prefill_tokens=10**9, prefill_rate=1.0)
    assert Capacity.of([fast, decode]).wait_s(0) == pytest.approx(2.0)
    assert Capacity.of([fast, slow, decode]).wait_s(2000) == pytest.approx(2.0)
    assert Capacity.of([fast, slow, new]).wait_s(6000) == pytest.approx(2.0)
    assert Capacity.of([new, decode]).wait_s(10**9) is None
