"""Engines that say that they are there, and frontends that look."""

from __future__ import annotations

import pytest

from tests.fakes.clock import FakeClock
from vllm_pd_plugin.frontend.pool.membership import Wanted
from vllm_pd_plugin.frontend.routing.choice import Role
from vllm_pd_plugin.ray_serve.demand import Demand, EngineSeen, Targets
from vllm_pd_plugin.ray_serve.roster import SETTLE_S, SILENT_S, Beat, Roster

A, B, C = "http://a:1", "http://b:1", "http://c:1"
P, D = Role.PREFILL, Role.DECODE


class World:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.roster = Roster(Targets(), self.clock)
        self.beats: dict[str, Beat] = {}

    def come(self, url: str, role: Role = D, replica: str = "1", flexible: bool = False) -> None:
        self.beats[url] = Beat(url, replica, role, flexible)
        self.roster.beat(self.beats[url])

    def settle(self, seconds: float = SETTLE_S + 0.1) -> None:
        """Time passes, and all who are there say so."""
        self.clock.advance(seconds)
        for beat in self.beats.values():
            self.roster.beat(beat)

    @property
    def roles(self) -> dict[str, Role]:
        return {url: wanted.role for url, wanted in self.roster.view().engines.items()}


@pytest.fixture
def world() -> World:
    return World()


def test_a_frontend_learns_who_is_there(world: World) -> None:
    world.come(A, P)
    world.come(B)
    view = world.roster.look("f", Demand())
    assert view.engines == {A: Wanted(P), B: Wanted(D)}


def test_who_is_missing_after_a_restart_may_still_come(world: World) -> None:
    assert not world.roster.view().is_settled
    world.settle()
    assert world.roster.view().is_settled


def test_who_is_silent_is_not_there(world: World) -> None:
    world.come(A)
    world.clock.advance(SILENT_S)
    assert world.roles == {A: D}
    world.clock.advance(0.1)
    assert world.roles == {}


def test_who_is_about_to_end_says_so(world: World) -> None:
    world.roster.beat(Beat(A, "1", D, drain_until=99.0, generation="g"))
    assert world.roster.view().engines == {A: Wanted(D, 99.0, "g")}


def test_an_engine_that_was_replaced_cannot_take_its_successor_away(world: World) -> None:
    world.come(A, replica="old")
    world.come(A, replica="new")
    world.roster.leave(A, "old")
    assert world.roles == {A: D}
    world.roster.leave(A, "new")
    assert world.roles == {}


def test_what_several_frontends_see_is_added_up_while_they_are_there(world: World) -> None:
    world.roster.look("f", Demand(requests_per_s=1.0))
    world.roster.look("g", Demand(requests_per_s=2.0))
    assert world.roster.demand().requests_per_s == 3.0
    world.clock.advance(SILENT_S)
    world.roster.look("g", Demand(requests_per_s=4.0))
    world.clock.advance(0.1)
    assert world.roster.demand().requests_per_s == 4.0


def test_flexible_engines_are_divided_evenly(world: World) -> None:
    for url in (A, B, C):
        world.come(url, Role.BOTH, flexible=True)
        world.roster.view()
    assert world.roles == {A: D, B: P, C: D}


STARVING = Demand(prompt_tokens_per_s=3000.0, engines={B: EngineSeen(P, 0, 1000.0, 0, 100, 0.0)})


def test_a_flexible_engine_moves_where_it_is_needed_and_stays_for_a_while(world: World) -> None:
    for url in (A, B, C):
        world.come(url, Role.BOTH, flexible=True)
        world.roster.view()
    world.roster.look("f", STARVING)
    assert world.roles[A] is D  # not before everybody has said that it is there
    world.settle()
    world.roster.look("f", STARVING)
    assert world.roles == {A: P, B: P, C: D}
    decoding = {C: EngineSeen(D, 0, None, 50, 100, 0.0)}
    idle = Demand(requests_per_s=9, answer_tokens=900, itl_s=0.1, engines=decoding)
    world.roster.look("f", idle)
    assert world.roles == {A: P, B: P, C: D}
    world.settle(SILENT_S)
    world.settle(SILENT_S + 0.1)
    world.roster.look("f", idle)
    assert world.roles == {A: D, B: P, C: D}


def test_an_engine_that_has_gone_has_no_duty_left(world: World) -> None:
    world.come(A, Role.BOTH, flexible=True)
    world.come(B, Role.BOTH, flexible=True)
    assert world.roles == {A: D, B: P}
    world.beats.pop(A)
    world.roster.leave(A, "1")
    world.settle()
    assert world.roles == {B: D}  # the last one decodes


def test_what_engines_did_before_a_restart_they_go_on_doing(world: World) -> None:
    seen = {
        A: EngineSeen(P, 0, None, 0, 100, 0.0),
        B: EngineSeen(P, 0, None, 0, 100, 0.0),
        C: EngineSeen(D, 0, None, 0, 100, 0.0),
    }
    world.roster.look("f", Demand(engines=seen))
    for url in (A, B, C):
        world.come(url, Role.BOTH, flexible=True)
        world.roster.view()
    assert world.roles == {A: P, B: P, C: D}


def test_an_engine_of_one_role_has_it_whatever_a_frontend_has_seen(world: World) -> None:
    world.roster.look("f", Demand(engines={A: EngineSeen(P, 0, None, 0, 100, 0.0)}))
    world.come(A, D)
    world.come(B, Role.BOTH, flexible=True)
    assert world.roles == {A: D, B: P}


def test_a_place_where_nobody_comes_is_deserted(world: World) -> None:
    world.come(A)
    world.clock.advance(6 * SILENT_S)
    assert not world.roster.is_deserted
    world.clock.advance(0.1)
    assert world.roster.is_deserted
    world.roster.look("f", Demand())
    assert not world.roster.is_deserted
