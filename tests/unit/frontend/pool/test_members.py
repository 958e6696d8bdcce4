"""What a frontend knows of its engines."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.clock import FakeClock
from vllm_pd_plugin.engine_port.messages import EngineLoad, State

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.fakes.links import link_of, make_member
    from vllm_pd_plugin.frontend.pool.members import Member, MemberState, Pool
    from vllm_pd_plugin.frontend.requests.legs import Leg, LegKind
    from vllm_pd_plugin.frontend.routing.choice import Role

PREFILL, DECODE, WHOLE = LegKind.PREFILL, LegKind.DECODE, LegKind.WHOLE
COOL_DOWN_S = 5.0
NOW = 1000.0


@pytest.fixture
def member() -> Member:
    return make_member("m", Role.BOTH)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(NOW)


def leg(kind: LegKind, num_tokens: int = 100, has_output: bool = False) -> Leg:
    return Leg("leg", "m", kind, num_tokens, 0.0, has_output)


def give(member: Member, *kinds: LegKind) -> None:
    """An engine gets legs of these kinds."""
    for kind in kinds:
        member.legs.add(leg(kind))


def busy(member: Member) -> tuple[int, int]:
    """Prompt tokens that it has to compute for this frontend, and requests that it decodes."""
    share = member.legs.share
    return share.waiting_tokens, share.running


# --- how busy an engine is -------------------------------------------------------------------


def test_an_engine_of_which_nothing_is_known_is_idle(member: Member) -> None:
    engine = member.snapshot()
    assert (engine.key, engine.role) == ("m", Role.BOTH)
    assert (engine.prefill_tokens, engine.prefill_rate) == (0, None)
    assert (engine.running, engine.kv_free) == (0, 1.0)


def test_an_engine_is_as_busy_as_it_says(member: Member) -> None:
    member.set_load(EngineLoad(running=3, waiting=2, waiting_tokens=700, kv_usage=0.25))
    engine = member.snapshot()
    assert (engine.prefill_tokens, engine.running, engine.kv_free) == (700, 5, 0.75)


def test_what_this_frontend_sends_counts_at_once(member: Member) -> None:
    member.set_load(EngineLoad(running=3, waiting_tokens=700))
    give(member, PREFILL, DECODE, WHOLE)
    engine = member.snapshot()
    assert (engine.prefill_tokens, engine.running) == (700 + 200, 3 + 2)


def test_the_memory_that_this_frontend_s_prompts_will_take_counts_at_once(member: Member) -> None:
    kv_tokens = member.link.description.kv_tokens
    member.legs.add(leg(DECODE, kv_tokens // 4))
    member.set_load(EngineLoad(running=1, kv_usage=0.5))
    assert member.snapshot().kv_free == 0.5
    member.legs.add(leg(WHOLE, kv_tokens // 4))
    assert member.snapshot().kv_free == pytest.approx(0.25)
    member.legs.clear()
    assert member.snapshot().kv_free == pytest.approx(0.75)


def test_what_this_frontend_has_under_way_is_not_counted_twice(member: Member) -> None:
    give(member, WHOLE, DECODE)
    member.set_load(EngineLoad(running=3, waiting_tokens=700))
    engine = member.snapshot()
    assert (engine.prefill_tokens, engine.running) == (700, 3)


def test_what_has_ended_here_is_gone_at_once_and_others_stay(member: Member) -> None:
    give(member, WHOLE, DECODE)
    member.set_load(EngineLoad(running=3, waiting_tokens=700))
    member.legs.clear()
    engine = member.snapshot()
    assert (engine.prefill_tokens, engine.running) == (600, 1)


def send(member: Member, *kinds: LegKind) -> None:
    """An engine is sent legs; they are numbered from 1."""
    for number, kind in enumerate(kinds):
        member.send(Leg(f"leg-{number}", "m", kind, 100, 0.0), [f"leg-{number}".encode()])


def test_what_is_on_its_way_is_not_taken_for_what_others_have(member: Member) -> None:
    """The engine has counted the first of three, and three of others."""
    send(member, WHOLE, WHOLE, DECODE)
    load = EngineLoad(running=4, waiting_tokens=100 + 700, kv_usage=0.25)
    member.told(State(load, 0, last_add=1), NOW)
    engine = member.snapshot()
    assert (engine.running, engine.prefill_tokens) == (3 + 3, 700 + 200)
    assert engine.kv_free == pytest.approx(0.75 - 200 / member.link.description.kv_tokens)
    member.told(State(load, 0, last_add=3), NOW)
    engine = member.snapshot()
    assert (engine.running, engine.prefill_tokens) == (1 + 3, 600 + 200)


def test_an_engine_that_does_not_say_is_taken_to_have_counted_everything(member: Member) -> None:
    send(member, WHOLE, WHOLE)
    member.told(State(EngineLoad(running=5), 0), NOW)
    assert member.snapshot().running == 5


def test_what_was_on_its_way_to_an_engine_that_was_lost_is_forgotten(member: Member) -> None:
    send(member, WHOLE, WHOLE)
    member.legs.clear()
    link_of(member).sent.clear()
    member.set_load(EngineLoad())
    send(member, DECODE)
    member.told(State(EngineLoad(running=1), 0, last_add=1), NOW)
    assert member.snapshot().running == 1


def test_an_engine_says_how_many_other_frontends_there_are(member: Member) -> None:
    assert member.snapshot().other_frontends == 0
    for told, others in ((4, 3), (1, 0), (0, 0)):
        member.told(State(EngineLoad(), 0, num_frontends=told), NOW)
        assert member.snapshot().other_frontends == others


def test_a_prompt_that_has_given_a_token_is_computed(member: Member) -> None:
    whole = leg(WHOLE)
    member.legs.add(whole)
    assert busy(member) == (100, 1)
    whole.has_output = True
    member.legs.computed(whole)
    assert busy(member) == (0, 1)


def test_an_engine_decodes_no_prompts_that_it_hands_off(member: Member) -> None:
    member.legs.add(leg(PREFILL))
    assert busy(member) == (100, 0)


def test_an_engine_computes_no_prompts_that_are_handed_to_it(member: Member) -> None:
    member.legs.add(leg(DECODE))
    assert busy(member) == (0, 1)


@given(
    before=st.lists(st.sampled_from(LegKind)),
    after=st.lists(st.sampled_from(LegKind)),
    load=st.builds(EngineLoad, *[st.integers(0, 1000)] * 3, st.floats(0, 1)),
)
def test_an_engine_is_never_less_busy_than_this_frontend_makes_it(
    before: list[LegKind], after: list[LegKind], load: EngineLoad
) -> None:
    member = make_member("m", Role.BOTH)
    member.legs.clear()
    give(member, *before)
    member.set_load(load)
    member.legs.clear()
    give(member, *after)
    engine = member.snapshot()
    assert engine.prefill_tokens >= busy(member)[0]
    assert engine.running >= busy(member)[1]
    assert 0 <= engine.kv_free <= 1


def test_an_engine_that_decodes_none_has_room_for_none() -> None:
    engine = make_member("m", Role.PREFILL, max_num_seqs=0).snapshot()
    assert engine.max_running == 1


# --- how fast it is --------------------------------------------------------------------------


def test_the_first_rate_counts_in_full_and_later_ones_in_part(member: Member) -> None:
    member.computed(1000, 0.5)
    assert member.prefill_rate == 2000.0
    member.computed(1000, 1.0)
    assert member.prefill_rate == pytest.approx(2000 - 0.2 * 1000)


@pytest.mark.parametrize(("num_tokens", "seconds"), [(15, 0.1), (0, 0.1), (100, 0.0), (100, -1.0)])
def test_a_measurement_that_says_nothing_is_left_out(
    member: Member, num_tokens: int, seconds: float
) -> None:
    member.computed(num_tokens, seconds)
    assert member.prefill_rate is None
    member.computed(1000, 0.5)
    member.computed(num_tokens, seconds)
    assert member.prefill_rate == 2000.0


def test_an_engine_says_how_it_is(member: Member) -> None:
    assert member.state(NOW) is MemberState.UP
    for _ in range(3):
        member.breaker.failed(NOW)
    assert member.state(NOW) is MemberState.BROKEN
    assert member.state(NOW + COOL_DOWN_S) is MemberState.UP
    member.drain_until = 0.0
    assert member.state(NOW) is MemberState.DRAINING
    member.mismatch = "another model"
    assert (member.state(NOW), member.problem) == (MemberState.DOWN, "another model")
    member.mismatch = ""
    link = link_of(member)
    link.is_attached, link.problem = False, "silent"
    assert (member.state(NOW), member.problem) == (MemberState.DOWN, "silent")


# --- which engines take requests -------------------------------------------------------------


def usable(pool: Pool, *excluded: str) -> list[str]:
    keys = [engine.key for engine in pool.usable(set(excluded))]
    assert len(set(keys)) == len(keys), "an engine is there twice"
    return sorted(keys)


def make_pool(clock: FakeClock, **roles: Role) -> Pool:
    pool = Pool(clock)
    for key, role in roles.items():
        pool.add(make_member(key, role))
    return pool


def test_engines_that_are_not_there_take_no_requests(clock: FakeClock) -> None:
    pool = make_pool(clock, p=Role.PREFILL, d=Role.DECODE, e=Role.DECODE)
    link_of(pool["d"]).is_attached = False
    assert usable(pool) == ["e", "p"]


@pytest.mark.parametrize("why", ["draining", "another model"])
def test_engines_that_must_not_be_used_are_not_even_if_there_is_no_other(
    clock: FakeClock, why: str
) -> None:
    pool = make_pool(clock, p=Role.PREFILL, d=Role.DECODE)
    if why == "draining":
        pool["d"].drain_until = 0.0
    else:
        pool["d"].mismatch = why
    assert usable(pool) == ["p"]
    assert usable(pool, "d") == ["p"]


def test_engines_that_have_failed_a_request_are_spared_it_where_there_are_others(
    clock: FakeClock,
) -> None:
    pool = make_pool(clock, p=Role.PREFILL, q=Role.PREFILL, d=Role.DECODE)
    assert usable(pool, "p") == ["d", "q"]
    assert usable(pool, "p", "d") == ["d", "q"]
    assert usable(pool, "p", "q") == ["d", "p", "q"]


def test_engines_with_an_open_breaker_are_spared_where_there_are_others(clock: FakeClock) -> None:
    pool = make_pool(clock, p=Role.PREFILL, q=Role.PREFILL, d=Role.DECODE)
    for member in (pool["p"], pool["d"]):
        for _ in range(3):
            member.breaker.failed(clock.now)
    assert usable(pool) == ["d", "q"]
    clock.advance(COOL_DOWN_S)
    assert usable(pool) == ["d", "p", "q"]


def test_an_engine_for_both_fills_in_for_either(clock: FakeClock) -> None:
    pool = make_pool(clock, p=Role.PREFILL, d=Role.DECODE, b=Role.BOTH)
    assert usable(pool, "p", "d") == ["b"]
    assert usable(pool, "b") == ["d", "p"]
    assert usable(pool, "b", "p", "d") == ["b", "d", "p"]


def test_a_pool_knows_who_is_in_it(clock: FakeClock) -> None:
    pool = make_pool(clock, p=Role.PREFILL, d=Role.DECODE)
    member = pool["d"]
    assert (len(pool), pool.get("d"), pool.get("x")) == (2, member, None)
    assert pool.remove("d") is member
    assert [each.key for each in pool] == ["p"]


@given(
    roles=st.lists(st.sampled_from(Role), min_size=1, max_size=6),
    data=st.data(),
)
def test_a_role_that_somebody_can_fill_is_filled(roles: list[Role], data: st.DataObject) -> None:
    clock = FakeClock(NOW)
    pool = make_pool(clock, **{f"e{i}": role for i, role in enumerate(roles)})
    for member in pool:
        link_of(member).is_attached = data.draw(st.booleans())
        member.drain_until = NOW if data.draw(st.booleans()) else None
        for _ in range(data.draw(st.integers(0, 3))):
            member.breaker.failed(clock.now)
    excluded = {member.key for member in pool if data.draw(st.booleans())}
    able = [member for member in pool if member.is_up and not member.is_draining]
    chosen = pool.usable(excluded)
    assert {engine.key for engine in chosen} <= {member.key for member in able}
    for can in ("prefills", "decodes"):
        somebody = any(getattr(member.role, can) for member in able)
        assert any(getattr(engine.role, can) for engine in chosen) == somebody
    good = [m for m in able if m.key not in excluded and m.breaker.admits(clock.now)]
    assert {member.key for member in good} <= {engine.key for engine in chosen}
