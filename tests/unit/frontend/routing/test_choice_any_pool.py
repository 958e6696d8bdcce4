"""Which engines work on a request: what holds of every pool."""

from __future__ import annotations

import dataclasses
import warnings
from random import Random

from hypothesis import assume, example, given
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.routing.choice import (
        Chance,
        Engine,
        NoPrefill,
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
"""Every prompt that can be."""

_rates = st.none() | st.floats(1.0, 1e6)
_engines = st.lists(
    st.builds(
        Engine,
        st.sampled_from("abcdefg"),
        st.sampled_from(Role),
        st.integers(0, 100_000),
        _rates,
        st.integers(0, 400),
        st.integers(1, 256),
        st.floats(0, 1),
        st.sampled_from(["old", "new"]),
    ),
    max_size=6,
    unique_by=lambda engine: engine.key,
)
_prompts = st.builds(
    Prompt,
    st.integers(1, 100_000),
    st.integers(1, 1000),
    st.dictionaries(st.sampled_from("abcdefg"), st.integers(0, 100_000)),
    st.none() | st.sampled_from("abcdefgh"),
    st.booleans(),
)
_policies = st.builds(
    Policy,
    st.sampled_from(Strategy),
    st.sampled_from(Strategy),
    st.sampled_from(NoPrefill),
    st.none() | st.integers(0, 10_000),
    st.floats(0, 10),
)
_chances = st.builds(
    Chance,
    st.integers(0, 1000),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
)
_handoffs = st.floats(0, 5)


@given(_engines, _prompts, _policies, _handoffs, _chances)
def test_whoever_is_chosen_is_there_and_of_the_right_role(
    engines: list[Engine], prompt: Prompt, policy: Policy, handoff_s: float, chance: Chance
) -> None:
    roles = {engine.key: engine.role for engine in engines}
    chosen = choose(engines, prompt, policy, handoff_s, chance)
    if isinstance(chosen, Unroutable):
        decodes = [role for role in roles.values() if role.decodes]
        if chosen is Unroutable.FULL:
            assert any(engine.is_full for engine in engines)
        else:
            assert (chosen is Unroutable.NO_DECODE) == (not decodes)
        return
    assert (chosen.prefill is not None) == (chosen.reason is Reason.DISAGGREGATED)
    if chosen.reason is Reason.ONE_TOKEN:
        assert roles[chosen.decode].prefills
        return
    assert roles[chosen.decode].decodes
    if chosen.prefill is not None:
        assert roles[chosen.prefill].prefills
        assert chosen.prefill != chosen.decode
        kinds = {engine.key: engine.kind for engine in engines}
        assert kinds[chosen.prefill] == kinds[chosen.decode]


@given(_engines, _prompts, _policies, _handoffs, _chances, st.randoms(use_true_random=False))
def test_the_same_pool_in_any_order_gives_the_same_route(
    engines: list[Engine],
    prompt: Prompt,
    policy: Policy,
    handoff_s: float,
    chance: Chance,
    random: Random,
) -> None:
    shuffled = list(engines)
    random.shuffle(shuffled)
    chosen = choose(engines, prompt, policy, handoff_s, chance)
    assert choose(shuffled, prompt, policy, handoff_s, chance) == chosen


@given(_engines, _prompts, _policies, _handoffs, _chances, st.data())
def test_more_queue_never_brings_an_engine_a_prompt(
    engines: list[Engine],
    prompt: Prompt,
    policy: Policy,
    handoff_s: float,
    chance: Chance,
    data: st.DataObject,
) -> None:
    assume(engines)
    engine = data.draw(st.sampled_from(engines))
    busier = dataclasses.replace(
        engine, prefill_tokens=engine.prefill_tokens + data.draw(st.integers(1, 50_000))
    )

    pool = [busier if each is engine else each for each in engines]
    before = choose(engines, prompt, policy, handoff_s, chance)
    after = choose(pool, prompt, policy, handoff_s, chance)
    if Unroutable.FULL in (before, after):
        return  # what was to be handed off, or was not, is so no more
    assert isinstance(before, Route) == isinstance(after, Route)
    if isinstance(before, Route) and isinstance(after, Route) and before.decode == after.decode:
        if engine.key != (before.prefill or before.decode):
            assert engine.key != (after.prefill or after.decode)
    elif isinstance(after, Route):  # another engine is free to prefill when one no longer decodes
        assert engine.key != after.decode


@given(_engines, _prompts, _policies, _handoffs, _chances, st.data())
def test_less_room_never_brings_an_engine_an_answer(
    engines: list[Engine],
    prompt: Prompt,
    policy: Policy,
    handoff_s: float,
    chance: Chance,
    data: st.DataObject,
) -> None:
    assume(engines and prompt.max_tokens > 1)
    engine = data.draw(st.sampled_from(engines))
    fuller = dataclasses.replace(
        engine,
        running=engine.running + data.draw(st.integers(0, 100)),
        kv_free=engine.kv_free * data.draw(st.floats(0, 1)),
    )

    def decodes(key: str, pool: list[Engine]) -> bool:
        chosen = choose(pool, prompt, policy, handoff_s, chance)
        return isinstance(chosen, Route) and key == chosen.decode

    if not decodes(engine.key, engines):
        pool = [fuller if each is engine else each for each in engines]
        assert not decodes(engine.key, pool)


@given(_engines, _prompts, _handoffs, _chances)
def test_the_best_prefill_engine_is_predicted_to_be_first(
    engines: list[Engine], prompt: Prompt, handoff_s: float, chance: Chance
) -> None:
    """One that decodes, too, by more than the time that it may hold its decodes up."""
    chosen = choose(engines, prompt, HANDED_OFF, handoff_s, chance)
    if isinstance(chosen, Route) and chosen.prefill is not None:
        kinds = {engine.key: engine.kind for engine in engines}
        times = {
            engine.key: engine.prefill_s(prompt.uncached(engine))
            + (HANDED_OFF.max_stall_s if engine.role is Role.BOTH else 0.0)
            for engine in engines
            if engine.role.prefills
            and not engine.is_full
            and engine.key != chosen.decode
            and engine.kind == kinds[chosen.decode]
        }
        assert times[chosen.prefill] == min(times.values())


@given(_engines, _prompts, _policies, _handoffs, _chances)
@example(
    [Engine("p", Role.PREFILL), Engine("d", Role.DECODE)],
    Prompt(1, 2),
    Policy(local_below=0),
    0.0,
    Chance(),
)
def test_where_every_prompt_is_to_be_handed_off_every_one_is_that_can_be(
    engines: list[Engine], prompt: Prompt, policy: Policy, handoff_s: float, chance: Chance
) -> None:
    policy = dataclasses.replace(policy, local_below=0)
    chosen = choose(engines, prompt, policy, handoff_s, chance)
    if isinstance(chosen, Route):
        assert chosen.reason not in (Reason.SHORT, Reason.PREFILL_BUSY)


@given(_engines, _prompts, _policies, _handoffs, _chances)
def test_waiting_or_failing_for_want_of_a_prefill_engine_is_what_the_policy_says(
    engines: list[Engine], prompt: Prompt, policy: Policy, handoff_s: float, chance: Chance
) -> None:
    chosen = choose(engines, prompt, policy, handoff_s, chance)
    if chosen is Unroutable.NO_PREFILL:
        assert policy.no_prefill is NoPrefill.FAIL
    if chosen is Unroutable.QUEUE_FOR_PREFILL:
        assert policy.no_prefill is NoPrefill.QUEUE
