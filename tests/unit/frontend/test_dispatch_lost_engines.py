"""A frontend's dispatch: what becomes of requests when engines are lost, fail or stop."""

from __future__ import annotations

import asyncio
import warnings

import pytest

from tests.fakes.dispatching import BACKOFF_S, World, run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import FinishReason

    from tests.fakes.links import output_of
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


def test_a_retry_waits_a_little() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("r")
        world.give(p, output_of("r-1p", finish=ERROR))
        assert d.aborted == ["r-1d"]
        await asyncio.sleep(0.04)
        assert p.sent == ["r-1p"]
        await asyncio.sleep(BACKOFF_S)
        assert p.sent == ["r-1p", "r-2p"]

    run(story)


def test_a_request_that_is_aborted_while_it_waits_to_be_tried_again_is_not() -> None:
    async def story(world: World) -> None:
        p, _ = world.pair()
        world.add("r")
        world.give(p, output_of("r-1p", finish=ERROR))
        world.dispatch.abort(["r"])
        await asyncio.sleep(BACKOFF_S + 0.1)
        assert p.sent == ["r-1p"]
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
        assert world.dispatch.pool["p"].is_broken(world.dispatch.now())
        world.add("s")
        assert "s-1p" in q.sent

    run(story)


def test_engines_that_stop_are_not_counted_as_broken() -> None:
    async def story(world: World) -> None:
        p, _ = world.pair()
        for number in range(3):
            world.add(f"r{number}")
            world.give(p, output_of(f"r{number}-1p", finish=ABORT))
        assert not world.dispatch.pool["p"].is_broken(world.dispatch.now())

    run(story)
