"""A frontend's dispatch: what becomes of requests when engines are lost, fail or stop."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

import pytest

from tests.fakes.dispatching import BACKOFF_S, World, run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import FinishReason

    from tests.fakes.engine_core import describe
    from tests.fakes.links import output_of
    from vllm_pd_plugin.engine_port.messages import EngineLoad, State
    from vllm_pd_plugin.engine_port.refusals import refusal
    from vllm_pd_plugin.frontend.pool.members import MemberState
    from vllm_pd_plugin.frontend.pool.membership import Wanted
    from vllm_pd_plugin.frontend.requests.endings import Ending
    from vllm_pd_plugin.frontend.routing.choice import Role

ERROR, ABORT = FinishReason.ERROR, FinishReason.ABORT


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_what_was_on_a_lost_engine_goes_on_elsewhere(role: Role) -> None:
    async def story(world: World) -> None:
        links = {
            Role.PREFILL: [world.engine(url, Role.PREFILL) for url in "pq"],
            Role.DECODE: [world.engine(url, Role.DECODE) for url in "de"],
        }
        world.add("r")
        lost, spare = sorted(links[role], key=lambda link: not link.sent)
        world.lose(lost)
        world.come_back(lost)
        await asyncio.sleep(BACKOFF_S + 0.1)
        assert (len(lost.sent), lost.aborted) == (1, [])
        assert spare.sent == [f"r-2{role[0]}"]
        assert len(world.dispatch) == 1

    run(story)


def test_retries_do_not_come_all_at_once() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        d.description = describe(role="decode", max_num_seqs=1000)
        for number in range(100):
            world.add(f"r{number}")
        world.lose(d)
        world.come_back(d)
        assert len(p.sent) == 100
        await asyncio.sleep(0.02)
        soon = len(p.sent)
        await asyncio.sleep(0.06)
        later = len(p.sent)
        await asyncio.sleep(0.03)
        assert 100 + 5 < soon < 100 + 40, "in a fifth of the time"
        assert soon + 35 < later < 200
        assert len(p.sent) == 200

    run(story)


def test_a_request_that_is_aborted_while_it_waits_to_be_tried_again_is_not() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("r")
        world.give(p, output_of("r-1p", finish=ERROR))
        world.dispatch.abort(["r"])
        await asyncio.sleep(BACKOFF_S + 0.1)
        assert (p.sent, d.sent) == (["r-1p"], ["r-1d"])
        assert len(world.dispatch) == 0

    run(story)


def test_an_engine_that_fails_three_requests_is_spared() -> None:
    async def story(world: World) -> None:
        p, _ = world.pair()
        q = world.engine("q", Role.PREFILL)
        for number in range(3):
            name = f"r{number}"
            q.is_attached = False
            world.add(name)
            q.is_attached = True
            world.give(p, output_of(f"{name}-1p", finish=ERROR))
        assert not world.dispatch.pool["p"].breaker.admits(world.dispatch.now())
        world.add("s")
        assert "s-1p" in q.sent

    run(story)


def test_an_engine_keeps_its_breaker_until_it_is_lost_whatever_it_says_of_itself() -> None:
    async def story(world: World) -> None:
        p, _ = world.pair()
        breaker = world.dispatch.pool["p"].breaker
        for number in range(3):
            world.add(f"r{number}")
            world.give(p, output_of(f"r{number}-1p", finish=ERROR))
        p.description = describe(role="prefill", has_lora=True)
        there: Any = p
        world.dispatch.attached(there, EngineLoad())
        assert not breaker.admits(world.dispatch.now())
        world.lose(p)
        world.come_back(p)
        assert breaker.admits(world.dispatch.now())

    run(story)


def test_engines_that_stop_are_not_counted_as_broken() -> None:
    async def story(world: World) -> None:
        p, _ = world.pair()
        for number in range(3):
            world.add(f"r{number}")
            world.give(p, output_of(f"r{number}-1p", finish=ABORT))
        assert world.dispatch.pool["p"].breaker.admits(world.dispatch.now())

    run(story)


# --- requests that engines are lost to, and others beside them -------------------------------


def test_a_request_that_two_engines_were_lost_to_is_not_tried_on_a_third() -> None:
    async def story(world: World) -> None:
        engines = [world.engine(url, Role.BOTH) for url in "abc"]
        world.add("poison", prompt_logprobs=0)
        for _ in range(2):
            (victim,) = (link for link in engines if link.is_attached and link.sent)
            world.lose(victim)
            await asyncio.sleep(BACKOFF_S)
        assert world.failed == [("poison", Ending.SUSPECT)]
        assert sorted(len(link.sent) for link in engines) == [0, 1, 1]
        assert sum(link.is_attached for link in engines) == 1

    run(story)


def test_the_only_request_of_an_engine_that_is_lost_is_answered_by_the_other_one_of_two() -> None:
    """One loss is no proof: an engine that was killed has taken nothing down."""

    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("r")
        world.lose(p)
        await asyncio.sleep(BACKOFF_S)
        world.give(d, output_of("r-2w", 50, finish=FinishReason.STOP))
        assert (world.tokens, world.failed) == ([50], [])

    run(story)


def test_what_has_taken_both_engines_of_a_pool_down_spares_them_when_they_come_back() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("poison")
        world.lose(p)
        await asyncio.sleep(BACKOFF_S)
        assert d.sent == ["poison-1d", "poison-2w"]
        world.lose(d)
        assert world.failed == [("poison", Ending.SUSPECT)]
        for link in (p, d):
            world.come_back(link)
        world.add("good")
        await asyncio.sleep(BACKOFF_S)
        assert (p.sent, d.sent[2:]) == (["poison-1p", "good-1p"], ["good-1d"])

    run(story)


def test_what_waits_or_decodes_on_engines_that_are_lost_is_above_suspicion() -> None:
    async def story(world: World) -> None:
        a = world.engine("a", Role.DECODE)
        for name in ("decodes", "first", "waits"):
            world.add(name)
            await asyncio.sleep(0.01)
        world.give(a, output_of("decodes-1w", 50))
        b = world.engine("b", Role.DECODE)
        world.lose(a)
        await asyncio.sleep(BACKOFF_S)
        assert sorted(b.sent) == ["decodes-2w", "first-2w", "waits-2w"]
        there: Any = b
        world.dispatch.loaded(there, State(EngineLoad(), 0, begun=("first-2w",)))
        c = world.engine("c", Role.DECODE)
        world.lose(b)
        await asyncio.sleep(BACKOFF_S)
        assert world.failed == [("first", Ending.SUSPECT)]
        assert sorted(c.sent) == ["decodes-3w", "waits-3w"]

    run(story)


def test_an_engine_that_is_taken_out_is_not_lost_to_what_it_works_on() -> None:
    async def story(world: World) -> None:
        nobody: Any = None
        engines = {url: world.engine(url, Role.BOTH) for url in "abc"}
        world.add("r", prompt_logprobs=0)
        for _ in range(2):
            (gone,) = (url for url, link in engines.items() if link.sent)
            del engines[gone]
            world.dispatch.use({url: Wanted(Role.BOTH) for url in engines}, nobody)
            await asyncio.sleep(BACKOFF_S)
        assert world.failed == []
        assert [link.sent for link in engines.values()] == [["r-3w"]]

    run(story)


def test_a_defect_with_one_output_ends_one_request() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("bad")
        world.add("good")
        bad: Any = output_of("bad-1p", 50, finish=FinishReason.LENGTH)
        bad.new_token_ids = None
        world.give(p, bad, output_of("good-1p", 51, finish=FinishReason.LENGTH))
        assert world.failed == [("bad", Ending.INTERNAL)]
        assert world.tokens == [51]
        assert (p.is_attached, d.aborted) == (True, ["bad-1d"])

    run(story)


def test_a_request_that_an_engine_refuses_is_nobody_s_fault() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        for number in range(4):
            world.add(f"r{number}")
            world.give(p, refusal(f"r{number}-1p", "a token that the model does not know"))
        assert {ending for _, ending in world.failed} == {Ending.REFUSED}
        assert (len(p.sent), len(d.sent), len(world.dispatch)) == (4, 4, 0)
        assert d.aborted == [f"r{number}-1d" for number in range(4)]
        states = {member.state(world.dispatch.now()) for member in world.dispatch.pool}
        assert (states, world.dispatch.pairs.num_open) == ({MemberState.UP}, 0)
        assert "retried" not in world.metrics.calls

    run(story)
