"""Which engines work on a request."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import pytest

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

LONG = Prompt(4000, 100)
FIRST = Chance()
HANDED_OFF = Policy(local_below=0)
"""Every prompt that can be."""


def prefill(key: str = "p", **known: float | str | None) -> Engine:
    return Engine(key, Role.PREFILL, **known)  # type: ignore[arg-type]


def decode(key: str = "d", **known: float | str | None) -> Engine:
    return Engine(key, Role.DECODE, **known)  # type: ignore[arg-type]


def both(key: str = "b", **known: float | str | None) -> Engine:
    return Engine(key, Role.BOTH, **known)  # type: ignore[arg-type]


def route(
    engines: Sequence[Engine],
    prompt: Prompt = LONG,
    policy: Policy = HANDED_OFF,
    handoff_s: float = 0.0,
    chance: Chance = FIRST,
) -> Route:
    """Where a request goes; it must go somewhere."""
    chosen = choose(engines, prompt, policy, handoff_s, chance)
    assert isinstance(chosen, Route)
    return chosen


# --- whether it is handed off ----------------------------------------------------------------


def test_a_long_prompt_is_handed_off() -> None:
    assert route([prefill(), decode()]) == Route("p", "d", Reason.DISAGGREGATED)


@pytest.mark.parametrize(
    ("uncached", "expected"), [(99, Reason.SHORT), (100, Reason.DISAGGREGATED)]
)
def test_a_prompt_shorter_than_the_operator_says_is_not(uncached: int, expected: Reason) -> None:
    prompt = Prompt(500, 100, cached={"d": 500 - uncached})
    chosen = route([prefill(), decode()], prompt, Policy(local_below=100))
    assert chosen == Route("p" if expected is Reason.DISAGGREGATED else None, "d", expected)


def test_of_a_prompt_that_is_all_there_one_token_is_computed() -> None:
    prompt = Prompt(500, 100, cached={"d": 500})
    assert route([prefill(), decode()], prompt, Policy(local_below=1)).prefill == "p"
    assert route([prefill(), decode()], prompt, Policy(local_below=2)).reason is Reason.SHORT


def test_one_token_is_not_worth_a_handoff() -> None:
    chosen = route([prefill(), decode()], Prompt(4000, 1))
    assert chosen == Route(None, "p", Reason.ONE_TOKEN)


def test_one_token_comes_from_a_decode_engine_if_there_is_no_other() -> None:
    assert route([decode()], Prompt(4000, 1)) == Route(None, "d", Reason.NO_PREFILL)


def test_a_prompt_of_which_more_is_wanted_is_computed_by_one_engine() -> None:
    prompt = Prompt(4000, 100, needs_whole_prompt=True)
    assert route([prefill(), decode()], prompt) == Route(None, "d", Reason.WHOLE_PROMPT)


def test_nothing_is_decided_by_prediction_before_anything_was_measured() -> None:
    engines = [prefill(), decode()]
    assert route(engines, Prompt(1, 100), Policy()).reason is Reason.DISAGGREGATED


@pytest.mark.parametrize("who", ["p", "d"])
def test_a_short_prompt_is_computed_where_it_is_decoded(who: str) -> None:
    """0.01 s here and there, and the handoff on top; one engine's rate tells of the other's."""
    rates = {"prefill_rate": 1000.0}
    engines = [prefill(**rates if who == "p" else {}), decode(**rates if who == "d" else {})]
    assert route(engines, Prompt(10, 100), Policy(), handoff_s=0.005) == Route(
        None, "d", Reason.SHORT
    )


@pytest.mark.parametrize(
    ("running", "stall_s", "expected"),
    [
        (0, 0.05, Reason.SHORT),
        (1, 0.05, Reason.DISAGGREGATED),
        (1, 0.2, Reason.SHORT),
    ],
)
def test_a_prompt_that_holds_up_decodes_for_too_long_is_handed_off(
    running: int, stall_s: float, expected: Reason
) -> None:
    """0.1 s of computing."""
    engines = [prefill(prefill_rate=1000.0), decode(prefill_rate=1000.0, running=running)]
    policy = Policy(max_stall_s=stall_s)
    assert route(engines, Prompt(100, 100), policy, handoff_s=0.01).reason is expected


@pytest.mark.parametrize(
    ("running", "waiting", "expected"), [(4, 0, "no_gain"), (2, 500, "prefill_busy")]
)
def test_a_prompt_does_not_hold_up_decodes_elsewhere_instead(
    running: int, waiting: int, expected: str
) -> None:
    """The other engine decodes, too: more requests, or fewer while it computes a prompt."""
    here = both("here", prefill_rate=1000.0, running=3)
    other = both("other", prefill_rate=1000.0, running=running, prefill_tokens=waiting)
    chosen = route([here, other], Prompt(100, 100), Policy(), handoff_s=0.01)
    assert chosen == Route(None, "here", Reason(expected))


def test_prompts_that_come_together_are_computed_side_by_side() -> None:
    pool = {
        "a": both("a", prefill_rate=3000.0, running=4, prefill_tokens=512),
        "b": both("b", prefill_rate=3000.0, running=5),
    }
    for _ in range(7):
        chosen = route(list(pool.values()), Prompt(512, 64), Policy(), handoff_s=0.01)
        computes = pool[chosen.prefill or chosen.decode]
        more = computes.prefill_tokens + 512
        pool[computes.key] = dataclasses.replace(computes, prefill_tokens=more)
        decodes = pool[chosen.decode]
        pool[decodes.key] = dataclasses.replace(decodes, running=decodes.running + 1)
    assert [engine.prefill_tokens for engine in pool.values()] == [2048, 2048]


@pytest.mark.parametrize(
    ("rate", "expected"), [(1100.0, Reason.SHORT), (4000.0, Reason.DISAGGREGATED)]
)
def test_an_engine_that_decodes_too_must_be_clearly_sooner(rate: float, expected: Reason) -> None:
    engines = [both("a", prefill_rate=1000.0), both("b", prefill_rate=rate)]
    assert route(engines, Prompt(100, 100), Policy()).reason is expected


@pytest.mark.parametrize(("waiting", "chosen"), [(0, "p"), (40, "p"), (60, "b")])
def test_a_prefill_engine_goes_before_one_that_decodes_too(waiting: int, chosen: str) -> None:
    """Unless that is sooner by 50 ms: so many tokens take so many milliseconds."""
    engines = [
        prefill(prefill_rate=1000.0, prefill_tokens=waiting),
        both("b", prefill_rate=1000.0, kv_free=0.5),
        decode(),
    ]
    assert route(engines) == Route(chosen, "d", Reason.DISAGGREGATED)


def test_a_prompt_is_computed_where_the_queue_is_shorter() -> None:
    busy = prefill(prefill_rate=1000.0, prefill_tokens=10_000)
    chosen = route([busy, decode(prefill_rate=1000.0)], Prompt(2000, 100), Policy())
    assert chosen == Route(None, "d", Reason.PREFILL_BUSY)


def test_where_all_prefill_engines_have_enough_to_do_a_busy_decode_engine_helps() -> None:
    full = prefill(prefill_rate=1000.0, prefill_tokens=10_000, max_prefill_tokens=4000)
    busy = decode(prefill_rate=1000.0, running=1)
    chosen = route([full, busy], Prompt(2000, 100), Policy())
    assert chosen == Route(None, "d", Reason.PREFILL_BUSY)
    spared = route(
        [dataclasses.replace(full, prefill_tokens=3000), busy], Prompt(2000, 100), Policy()
    )
    assert spared == Route("p", "d", Reason.DISAGGREGATED)
    late = decode(prefill_rate=1000.0, running=1, prefill_tokens=12_000)
    assert choose([full, late], Prompt(2000, 100), Policy()) is Unroutable.FULL


def test_a_decode_engine_that_is_slower_at_prompts_is_left_alone() -> None:
    engines = [prefill(prefill_rate=8000.0), decode(prefill_rate=1000.0)]
    assert route(engines, LONG, Policy()).reason is Reason.DISAGGREGATED


def test_a_handoff_that_takes_longer_than_computing_is_not_worth_it() -> None:
    engines = [prefill(prefill_rate=8000.0), decode(prefill_rate=1000.0)]
    assert route(engines, Prompt(1000, 100), Policy(), handoff_s=2.0).reason is Reason.SHORT


def test_what_is_cached_on_the_decode_engine_is_not_computed_there() -> None:
    engines = [prefill(prefill_rate=1000.0), decode(prefill_rate=1000.0, running=4)]
    assert route(engines, LONG, Policy()).reason is Reason.DISAGGREGATED
    cached = dataclasses.replace(LONG, cached={"d": LONG.num_tokens - 10})
    assert route(engines, cached, Policy()).reason is Reason.SHORT


# --- when engines are missing ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (NoPrefill.LOCAL, Route(None, "d", Reason.NO_PREFILL)),
        (NoPrefill.FAIL, Unroutable.NO_PREFILL),
        (NoPrefill.QUEUE, Unroutable.QUEUE_FOR_PREFILL),
    ],
)
def test_without_a_prefill_engine_the_operator_s_policy_counts(
    policy: NoPrefill, expected: Route | Unroutable
) -> None:
    assert choose([decode()], LONG, Policy(no_prefill=policy)) == expected


@pytest.mark.parametrize("policy", NoPrefill)
def test_one_engine_of_role_both_is_enough_whatever_the_policy(policy: NoPrefill) -> None:
    chosen = choose([both()], LONG, Policy(no_prefill=policy))
    assert chosen == Route(None, "b", Reason.NO_PREFILL)


@pytest.mark.parametrize("engines", [[], [prefill()], [prefill("p"), prefill("q")]])
def test_without_a_decode_engine_nothing_can_be_done(engines: list[Engine]) -> None:
    assert choose(engines, LONG, Policy()) is Unroutable.NO_DECODE


def test_kv_goes_only_between_engines_of_a_kind() -> None:
    old, new = {"kind": "old"}, {"kind": "new"}
    engines = [prefill("p1", **old), decode("d1", **old), prefill("p2", **new), decode("d2", **new)]
    engines[1] = dataclasses.replace(engines[1], running=200)
    assert route(engines) == Route("p2", "d2", Reason.DISAGGREGATED)
    engines[3] = dataclasses.replace(engines[3], running=250)
    assert route(engines) == Route("p1", "d1", Reason.DISAGGREGATED)


def test_a_decode_engine_whose_kind_no_one_prefills_waits_for_one_that_does() -> None:
    full = decode("d1", kind="old", running=250)
    engines = [prefill("p1", kind="old"), full, decode("d2", kind="new")]
    assert route(engines) == Route("p1", "d1", Reason.DISAGGREGATED)
    assert route([engines[0], engines[2]]) == Route(None, "d2", Reason.NO_PREFILL)


def test_two_engines_of_role_both_share_the_work() -> None:
    chosen = route([both("a"), both("b", running=3)])
    assert chosen == Route("b", "a", Reason.DISAGGREGATED)


# --- which engine it is ----------------------------------------------------------------------


def test_the_prefill_engine_is_the_one_with_the_first_token_first() -> None:
    engines = [
        prefill("busy", prefill_tokens=5000, prefill_rate=1000.0),
        prefill("fast", prefill_tokens=5000, prefill_rate=4000.0),
        prefill("slow", prefill_tokens=0, prefill_rate=1000.0),
        decode(),
    ]
    assert route(engines).prefill == "fast"  # 2.25 s, and not 9 or 4
    cached = dataclasses.replace(LONG, cached={"slow": 3000})
    assert route(engines, cached).prefill == "slow"  # 1 s


def test_the_decode_engine_is_the_one_with_most_room() -> None:
    engines = [
        prefill(),
        decode("full of requests", running=200),
        decode("full of kv", kv_free=0.1),
        decode("roomy", running=64, kv_free=0.3),
    ]
    assert route(engines).decode == "roomy"
    small = decode("small", running=8, max_running=10)
    assert route([prefill(), small, decode("large", running=100)]).decode == "large"


def test_requests_weigh_alike_while_there_is_kv_enough() -> None:
    engines = [
        prefill(),
        decode("short ones", running=3),
        decode("long ones", running=2, kv_free=0.3),
    ]
    assert route(engines).decode == "long ones"


@pytest.mark.parametrize(
    ("cached", "chosen"), [(0, "idle"), (200, "idle"), (3000, "cached"), (4000, "cached")]
)
def test_a_cached_prefix_is_worth_as_much_as_it_saves(cached: int, chosen: str) -> None:
    engines = [
        prefill(),
        decode("idle", running=2, prefill_rate=4000.0),
        decode("cached", running=8, prefill_rate=4000.0),  # 6 decodes: 0.6 s of computing
    ]
    assert route(engines, dataclasses.replace(LONG, cached={"cached": cached})).decode == chosen


@pytest.mark.parametrize(("waiting", "chosen"), [(2000, "queue"), (3000, "decodes")])
def test_prompts_that_wait_count_as_requests(waiting: int, chosen: str) -> None:
    engines = [
        both("decodes", running=6, prefill_rate=4000.0),
        both("queue", prefill_tokens=waiting, prefill_rate=4000.0),
    ]
    assert route(engines).decode == chosen


def test_a_session_stays_where_it_was_while_there_is_room() -> None:
    session = dataclasses.replace(LONG, session="b")
    engines = [prefill(), decode("a"), decode("b", kv_free=0.15)]
    assert route(engines, session).decode == "b"
    for full in (decode("b", kv_free=0.0), decode("b", running=256), decode("b", running=129)):
        assert route([prefill(), decode("a"), full], session).decode == "a"
    busy = [prefill(), decode("a", running=120), decode("b", running=240)]
    assert route(busy, session).decode == "b"
    assert route([prefill(), decode("a")], session).decode == "a"


def test_a_session_does_not_hold_up_those_who_take_turns() -> None:
    engines = [prefill(), decode("a"), decode("b")]
    policy = Policy(decode=Strategy.ROUND_ROBIN, local_below=0)
    session = dataclasses.replace(LONG, session="b")
    assert route(engines, session, policy, chance=Chance(0)).decode == "a"


def test_taking_turns_goes_round() -> None:
    engines = [decode("d2"), prefill("p1"), decode("d0"), prefill("p0"), decode("d1")]
    policy = Policy(Strategy.ROUND_ROBIN, Strategy.ROUND_ROBIN, local_below=0)
    routes = [route(engines, policy=policy, chance=Chance(turn)) for turn in range(6)]
    assert [each.decode for each in routes] == ["d0", "d1", "d2"] * 2
    assert [each.prefill for each in routes] == ["p0", "p1"] * 3


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(0.0, 0.0, "d0"), (0.4, 0.9, "d1"), (0.99, 0.0, "d0"), (0.99, 0.99, "d1")],
)
def test_of_two_at_random_the_better_one_is_taken(
    first: float, second: float, expected: str
) -> None:
    """Of those, the one with the lower number has more room; which two is the chance's."""
    engines = [prefill(), *[decode(f"d{i}", running=10 * i) for i in range(3)]]
    policy = Policy(decode=Strategy.POWER_OF_TWO, local_below=0)
    assert route(engines, policy=policy, chance=Chance(0, first, second)).decode == expected
