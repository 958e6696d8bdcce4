"""Which engines work on a request when handoffs fail, or all have enough to do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.routing.choice import (
        Engine,
        NoPrefill,
        Policy,
        Prompt,
        Reason,
        Role,
        Route,
        Unroutable,
    )
    from vllm_pd_plugin.frontend.routing.choosing import choose

LONG = Prompt(4000, 100)
HANDED_OFF = Policy(local_below=0)
HERE = Route(None, "d", Reason.HANDOFF_FAILED)


def prefill(key: str = "p", **known: Any) -> Engine:
    return Engine(key, Role.PREFILL, **known)


def decode(key: str = "d", **known: Any) -> Engine:
    return Engine(key, Role.DECODE, **known)


@pytest.mark.parametrize("no_prefill", list(NoPrefill))
def test_a_request_whose_handoff_has_failed_is_computed_where_it_is_decoded(
    no_prefill: NoPrefill,
) -> None:
    policy = Policy(local_below=0, no_prefill=no_prefill)
    prompt = Prompt(4000, 100, handoff_failed=True)
    assert choose([prefill(), decode()], prompt, policy) == HERE


@pytest.mark.parametrize("no_prefill", list(NoPrefill))
def test_between_a_pair_that_fails_nothing_is_handed_off(no_prefill: NoPrefill) -> None:
    policy = Policy(local_below=0, no_prefill=no_prefill)
    assert choose([prefill(), decode()], LONG, policy, blocked={("p", "d")}) == HERE


def test_the_pair_s_engines_work_with_others() -> None:
    engines = [prefill("p"), prefill("q"), decode("d")]
    chosen = choose(engines, LONG, HANDED_OFF, blocked={("p", "d")})
    assert chosen == Route("q", "d", Reason.DISAGGREGATED)
    chosen = choose([prefill("p"), decode("e")], LONG, HANDED_OFF, blocked={("p", "d")})
    assert chosen == Route("p", "e", Reason.DISAGGREGATED)


def test_a_broken_prefill_engine_does_nothing_where_a_decode_engine_can() -> None:
    engines = [prefill(is_broken=True), decode()]
    assert choose(engines, LONG, HANDED_OFF) == HERE
    assert choose(engines, Prompt(4000, 1), HANDED_OFF) == HERE
    alone = choose(engines[:1], Prompt(4000, 1), HANDED_OFF)
    assert alone == Route(None, "p", Reason.ONE_TOKEN)


def test_a_broken_decode_engine_is_used_if_there_is_no_other() -> None:
    engines = [prefill(), decode(is_broken=True)]
    assert choose(engines, LONG, HANDED_OFF) == Route("p", "d", Reason.DISAGGREGATED)


@pytest.mark.parametrize(("most", "at_least"), [(256, 64), (16, 4), (1, 2)])
def test_an_engine_gets_somewhat_more_than_it_can_decode_at_once(most: int, at_least: int) -> None:
    def chosen(running: int) -> Route | Unroutable:
        return choose([prefill(), decode(running=running, max_running=most)], LONG, HANDED_OFF)

    assert isinstance(chosen(most + at_least - 1), Route)
    assert chosen(most + at_least) is Unroutable.FULL


def test_an_engine_that_has_prompts_for_a_while_gets_no_more() -> None:
    full = prefill(prefill_tokens=100, max_prefill_tokens=100)
    assert choose([full, decode()], LONG, HANDED_OFF) is Unroutable.FULL
    assert choose([full, decode()], Prompt(4000, 1), HANDED_OFF) is Unroutable.FULL
    free = prefill("q", prefill_tokens=99, max_prefill_tokens=100)
    assert choose([full, free, decode()], LONG, HANDED_OFF) == Route("q", "d", Reason.DISAGGREGATED)


def test_what_is_computed_sooner_where_it_is_decoded_does_not_wait_for_a_prefill_engine() -> None:
    rates: dict[str, Any] = {"prefill_rate": 1000.0}
    full = prefill(prefill_tokens=100_000, max_prefill_tokens=100, **rates)
    chosen = choose([full, decode(**rates)], LONG, Policy())
    assert chosen == Route(None, "d", Reason.PREFILL_BUSY)
