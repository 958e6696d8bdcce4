"""Which engines of a large pool a route looks at."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.clock import FakeClock
from vllm_pd_plugin.engine_port.messages import EngineLoad

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.fakes.links import FakeLink, link_of, make_member
    from vllm_pd_plugin.frontend.pool.members import Member, Pool
    from vllm_pd_plugin.frontend.requests.legs import Leg, LegKind
    from vllm_pd_plugin.frontend.routing.choice import Role

NOW = 1000.0
SLOTS = 4
"""Of an engine; it is full with two more."""


def make_pool(num_prefill: int, num_decode: int) -> Pool:
    pool = Pool(FakeClock(NOW))
    for role, number in ((Role.PREFILL, num_prefill), (Role.DECODE, num_decode)):
        for each in range(number):
            pool.add(make_member(f"{role.value[0]}{each}", role, max_num_seqs=SLOTS))
    return pool


def fill(member: Member, requests: int = SLOTS + 2) -> None:
    member.set_load(EngineLoad(running=requests))


def keys(pool: Pool, *near: str, excluded: tuple[str, ...] = ()) -> set[str]:
    candidates = pool.candidates(set(excluded), near)
    found = {engine.key for engine in candidates}
    assert len(found) == len(candidates), "an engine is there twice"
    return found


def test_a_small_pool_is_looked_at_as_a_whole() -> None:
    pool = make_pool(10, 22)
    assert keys(pool) == {member.key for member in pool}


def test_of_a_large_pool_some_of_each_role_are_and_not_always_the_same() -> None:
    pool = make_pool(100, 900)
    seen: set[str] = set()
    for _ in range(200):
        found = keys(pool)
        assert 0 < sum(key[0] == "p" for key in found) < 50
        assert 0 < sum(key[0] == "d" for key in found) < 50
        seen |= found
    assert len(seen) > 800


def test_an_engine_that_is_near_a_request_is_looked_at_if_it_can_be_used() -> None:
    pool = make_pool(20, 400)
    assert keys(pool, "d7", "never there") >= {"d7"}
    for _ in range(3):
        pool["d7"].breaker.failed(NOW)
    link_of(pool["d8"]).is_attached = False
    pool["d9"].drain_until = NOW
    for _ in range(100):
        assert not keys(pool, "d6", "d7", "d8", "d9", excluded=("d6",)) & {"d6", "d7", "d8", "d9"}


class CountingLink(FakeLink):
    """Counts how often somebody looks whether it is attached."""

    looks = 0

    @property
    def is_attached(self) -> bool:
        CountingLink.looks += 1
        return True

    @is_attached.setter
    def is_attached(self, value: bool) -> None: ...


@pytest.mark.parametrize("is_full", [False, True])
def test_a_route_looks_at_as_many_engines_however_many_there_are(is_full: bool) -> None:
    looks = []
    for number in (100, 1000):
        pool = Pool(FakeClock(NOW))
        for each in range(number):
            role = Role.DECODE if each % 5 else Role.PREFILL
            link: Any = CountingLink(f"e{each}", max_num_seqs=SLOTS)
            pool.add(Member(f"e{each}", role, link))
            if is_full:
                fill(pool[f"e{each}"])
        pool.candidates(())  # what is full is found to be that, once
        CountingLink.looks = 0
        for _ in range(10):
            assert pool.candidates(())
        looks.append(CountingLink.looks / 10)
    assert looks[1] <= 1.2 * looks[0] <= 100


def test_the_one_engine_that_has_room_is_found() -> None:
    pool = make_pool(20, 400)
    for member in pool:
        if member.role is Role.DECODE:
            fill(member)
    assert all(engine.is_full for engine in pool.candidates(()) if engine.role.decodes)
    fill(pool["d77"], 1)
    assert pool.freed(pool["d77"])
    assert [e.key for e in pool.candidates(()) if e.role.decodes] == ["d77"]
    pool["d77"].legs.add(Leg("r", "d77", LegKind.DECODE, 10, 0.0))
    assert [e.key for e in pool.candidates(()) if e.role.decodes] == ["d77"]
    fill(pool["d77"])
    assert not pool.freed(pool["d77"])
    assert all(engine.is_full for engine in pool.candidates(()) if engine.role.decodes)


def test_engines_that_have_failed_are_spared_also_while_the_others_are_full() -> None:
    pool = make_pool(20, 400)
    for member in pool:
        if member.role is Role.DECODE and member.key != "d7":
            fill(member)
    assert [e.key for e in pool.candidates(()) if e.role.decodes] == ["d7"]
    decodes = [e for e in pool.candidates({"d7"}) if e.role.decodes]
    assert decodes
    assert all(engine.is_full and engine.key != "d7" for engine in decodes)


@pytest.mark.parametrize("why", ["excluded", "broken"])
def test_engines_that_have_failed_are_looked_at_where_there_are_no_others(why: str) -> None:
    pool = make_pool(20, 400)
    excluded = {member.key for member in pool if member.role is Role.DECODE}
    for key in excluded if why == "broken" else ():
        for _ in range(3):
            pool[key].breaker.failed(NOW)
    candidates = pool.candidates(excluded if why == "excluded" else ())
    decodes = [engine for engine in candidates if engine.role.decodes]
    assert decodes
    assert all(engine.is_broken is (why == "broken") for engine in decodes)


def test_an_engine_that_has_become_another_s_kind_is_looked_at_as_that() -> None:
    pool = make_pool(40, 1)
    pool.candidates(())
    pool["p3"].kind = pool["d0"].kind = "new"
    pool.changed()
    assert keys(pool) >= {"p3", "d0"}


@given(
    roles=st.lists(st.sampled_from(Role), min_size=33, max_size=60),
    data=st.data(),
)
def test_what_can_be_used_in_a_large_pool_is_what_can_be_used_in_any(
    roles: list[Role], data: st.DataObject
) -> None:
    pool = Pool(FakeClock(NOW))
    some = st.sets(st.integers(0, len(roles) - 1))
    away, full, broken = data.draw(some), data.draw(some), data.draw(some)
    excluded = {f"e{each}" for each in data.draw(some)}
    for number, role in enumerate(roles):
        member = make_member(f"e{number}", role, number not in away, max_num_seqs=SLOTS)
        pool.add(member)
        if number in full:
            fill(member)
        for _ in range(3 * (number in broken)):
            member.breaker.failed(NOW)
    usable = {engine.key: engine for engine in pool.usable(excluded)}
    chosen = pool.candidates(excluded)
    for can in ("prefills", "decodes"):
        there = [engine for engine in usable.values() if getattr(engine.role, can)]
        found = [engine for engine in chosen if getattr(engine.role, can)]
        assert bool(found) == bool(there)
        assert any(not e.is_full for e in found) or all(e.is_full for e in there)
    good = {key for key, engine in usable.items() if key not in excluded and not engine.is_broken}
    for engine in chosen:
        assert engine == usable.get(engine.key, engine)
        if engine.key not in good:  # nobody else can do one of the things that it can
            others = [usable[key].role for key in good]
            lacks_prefill = engine.role.prefills and not any(role.prefills for role in others)
            lacks_decode = engine.role.decodes and not any(role.decodes for role in others)
            assert lacks_prefill or lacks_decode


def test_what_a_large_pool_can_do_is_added_up_a_few_times_a_second() -> None:
    pool = make_pool(20, 400)
    capacity = pool.capacity()
    assert capacity is not None
    assert capacity.max_running == 400 * SLOTS
    for number in range(300):
        pool.remove(f"d{number}")
    assert pool.capacity() is capacity
    clock: Any = pool._clock
    clock.advance(0.25)
    capacity = pool.capacity()
    assert capacity is not None
    assert capacity.max_running == 100 * SLOTS
    assert Pool(clock).capacity() is None
