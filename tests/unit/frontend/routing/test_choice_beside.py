"""Where the parts of one request of a client go: its choices, and the steps of beam search."""

from __future__ import annotations

import dataclasses
import warnings
from random import Random

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.routing.choice import (
        Chance,
        Engine,
        Policy,
        Prompt,
        Reason,
        Role,
        Route,
        Strategy,
        Unroutable,
    )
    from vllm_pd_plugin.frontend.routing.choosing import choose

HANDED_OFF = Policy(local_below=0)
LONG = Prompt(4000, 100)
P1, P2 = Engine("p1", Role.PREFILL), Engine("p2", Role.PREFILL)
D1, D2 = Engine("d1", Role.DECODE), Engine("d2", Role.DECODE)
THERE = Route("p2", "d2", Reason.DISAGGREGATED)
BESIDE = dataclasses.replace(LONG, beside=THERE)


def but(engine: Engine, **changes: object) -> Engine:
    return dataclasses.replace(engine, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", Strategy)
def test_a_choice_goes_where_another_of_its_request_has_gone(strategy: Strategy) -> None:
    policy = Policy(strategy, strategy, local_below=0)
    busy = (P1, but(P2, prefill_tokens=9000), D1, but(D2, running=100))
    random = Random(0)
    for turn in range(8):
        chance = Chance(turn, random.random(), random.random())
        assert choose(busy, BESIDE, policy, chance=chance) == THERE
    assert choose(busy, LONG, HANDED_OFF) == Route("p1", "d1", Reason.DISAGGREGATED)


def test_a_queue_of_prompts_does_not_count_where_its_prompt_is_computed_already() -> None:
    full = but(P2, prefill_tokens=9000, max_prefill_tokens=5000)
    assert choose([P1, full, D1, D2], BESIDE, HANDED_OFF) == THERE
    local = dataclasses.replace(LONG, beside=Route(None, "d2", Reason.SHORT))
    full = but(D2, prefill_tokens=9000, max_prefill_tokens=5000)
    assert choose([P1, D1, full], local, HANDED_OFF) == Route(None, "d2", Reason.SHORT)


@pytest.mark.parametrize(
    "engines",
    [
        (P1, P2, D1),
        (P1, P2, D1, but(D2, running=400)),
        (P1, P2, D1, but(D2, running=200)),
        (P1, P2, D1, but(D2, kv_free=0.0)),
    ],
)
def test_where_it_has_no_room_there_it_goes_elsewhere(engines: tuple[Engine, ...]) -> None:
    chosen = choose(engines, BESIDE, HANDED_OFF)
    assert isinstance(chosen, Route)
    assert chosen.decode == "d1"


def test_one_token_too_is_computed_beside_another_while_there_is_room() -> None:
    there = Route(None, "p1", Reason.ONE_TOKEN)
    one = Prompt(4000, 1, beside=there)
    busy = but(P1, running=100, prefill_tokens=9000)
    assert choose([busy, P2, D1], one, HANDED_OFF) == there
    full = but(P1, running=400)
    assert choose([full, P2, D1], one, HANDED_OFF) == Route(None, "p2", Reason.ONE_TOKEN)


def test_what_wants_one_token_and_what_wants_many_do_not_follow_each_other() -> None:
    one = Route(None, "p1", Reason.ONE_TOKEN)
    many = choose([P1, P2, D1], Prompt(4000, 100, beside=one), HANDED_OFF)
    assert isinstance(many, Route)
    assert (many.decode, many.reason) == ("d1", Reason.DISAGGREGATED)
    handed_off = Route("p2", "d2", Reason.DISAGGREGATED)
    last = choose([P1, P2, D1, D2], Prompt(4000, 1, beside=handed_off), HANDED_OFF)
    assert isinstance(last, Route)
    assert last.reason is Reason.ONE_TOKEN


@pytest.mark.parametrize(
    ("engines", "blocked"),
    [
        ((P1, D1, D2), ()),
        ((P1, but(P2, is_broken=True), D1, D2), ()),
        ((P1, but(P2, kind="new"), D1, D2), ()),
        ((P1, P2, D1, D2), [("p2", "d2")]),
    ],
)
def test_where_no_kv_comes_from_it_is_computed_elsewhere(
    engines: tuple[Engine, ...], blocked: list[tuple[str, str]]
) -> None:
    chosen = choose(engines, BESIDE, HANDED_OFF, blocked=blocked)
    assert isinstance(chosen, Route)
    assert chosen.prefill != "p2"


def test_one_whose_handoff_has_failed_is_not_handed_off_again() -> None:
    failed = dataclasses.replace(BESIDE, handoff_failed=True)
    chosen = choose([P1, P2, D1, D2], failed, HANDED_OFF)
    assert isinstance(chosen, Route)
    assert chosen.reason is Reason.HANDOFF_FAILED


STEP = Prompt(4000, 1, is_beam=True)


def test_a_step_of_beam_search_is_computed_by_an_engine_that_decodes() -> None:
    first = choose([P1, P2, but(D1, running=1), D2], STEP, HANDED_OFF)
    assert first == Route(None, "d2", Reason.BEAM_SEARCH)
    assert choose([P1, P2], STEP, HANDED_OFF) is Unroutable.NO_DECODE


def test_a_step_of_beam_search_goes_on_where_the_last_one_was() -> None:
    first = Route(None, "d1", Reason.BEAM_SEARCH)
    then = dataclasses.replace(STEP, beside=first)
    busy = but(D1, running=100)
    assert choose([P1, P2, busy, D2], then, HANDED_OFF) == first
    assert choose([P1, P2, busy, D2], STEP, HANDED_OFF) != first
    gone = choose([P1, P2, D2], then, HANDED_OFF)
    assert gone == Route(None, "d2", Reason.BEAM_SEARCH)
