"""A frontend's dispatch when more is asked for than its engines can do."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

import pytest

from tests.fakes.courses import PROMPT
from tests.fakes.dispatching import BACKOFF_S, LIMITS, SWEEP_S, World, run
from tests.fakes.series import counting, value
from vllm_pd_plugin.engine_port.messages import EngineLoad, State

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import FinishReason

    from tests.fakes.engine_core import describe
    from tests.fakes.links import FakeLink, SkippingLoop, output_of
    from vllm_pd_plugin.frontend.admission import Refusal, TurnedAway
    from vllm_pd_plugin.frontend.pool.members import MemberState
    from vllm_pd_plugin.frontend.requests.endings import Ending
    from vllm_pd_plugin.frontend.routing.choice import Role

LENGTH, STOP = FinishReason.LENGTH, FinishReason.STOP
MOST = 2
"""An engine decodes as many at once, and is given so many more."""


def small(world: World, url: str = "d") -> FakeLink:
    link = world.engine(url, Role.DECODE)
    link.description = describe(role="decode", max_num_seqs=MOST)
    return link


def say(world: World, link: FakeLink, num_steps: int, *begun: str) -> None:
    there: Any = link
    load = EngineLoad(running=len(begun), num_steps=num_steps)
    world.dispatch.loaded(there, State(load, 0, begun))


def states(world: World) -> set[MemberState]:
    return {member.state(world.dispatch.now()) for member in world.dispatch.pool}


def test_what_waits_at_an_engine_that_goes_on_is_left_there_and_blames_nobody() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        for number in range(8):
            world.add(f"r{number}")
        for step in range(int(4 * LIMITS.first_token_s)):
            say(world, p, step)
            say(world, d, step)
            await asyncio.sleep(1.0)
        assert (len(p.sent), p.aborted, d.aborted) == (8, [], [])
        assert (world.failed, states(world)) == ([], {MemberState.UP})
        assert world.dispatch.pairs.num_open == 0

    run(story)


def test_what_an_engine_has_begun_and_does_not_end_is_tried_elsewhere() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("r")
        for step in range(int(LIMITS.first_token_s) + 3):
            say(world, p, step, "r-1p")
            say(world, d, step)
            await asyncio.sleep(1.0)
        assert (p.aborted, d.sent) == (["r-1p"], ["r-1d", "r-2w"])

    run(story)


def test_an_engine_that_stands_still_keeps_nobody_waiting() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("r")
        for _ in range(int(LIMITS.first_token_s) + 3):
            say(world, p, 7)
            say(world, d, 7)
            await asyncio.sleep(1.0)
        assert (p.aborted, d.sent) == (["r-1p"], ["r-1d", "r-2w"])

    run(story)


def test_what_no_engine_has_room_for_waits_here_and_begins_in_the_order_of_arrival() -> None:
    async def story(world: World) -> None:
        d = small(world)
        for number in range(2 * MOST + 3):
            world.add(f"r{number}")
            await asyncio.sleep(0.01)
        assert (len(d.sent), world.dispatch.num_waiting) == (2 * MOST, 3)
        assert world.dispatch.serves() is None
        for number in range(3):
            world.give(d, output_of(f"r{number}-1w", 50, finish=STOP))
            await asyncio.sleep(0)
            assert d.sent[-1] == f"r{2 * MOST + number}-1w"
        assert world.dispatch.num_waiting == 0

    run(story)


def test_an_engine_that_joins_takes_what_waits() -> None:
    async def story(world: World) -> None:
        small(world)
        for number in range(2 * MOST + 3):
            world.add(f"r{number}")
        joined = small(world, "e")
        await asyncio.sleep(0)
        assert len(joined.sent) == 3

    run(story)


def test_one_that_is_tried_again_is_before_those_that_have_come_later() -> None:
    async def story(world: World) -> None:
        d, e = small(world, "d"), small(world, "e")
        for number in range(4 * MOST):
            world.add(f"r{number}")
        await asyncio.sleep(0.01)
        world.add("late")
        world.lose(e)
        await asyncio.sleep(BACKOFF_S)
        assert world.dispatch.num_waiting == 2 * MOST + 1
        done = d.sent[0]
        world.give(d, output_of(done, 50, finish=STOP))
        await asyncio.sleep(0)
        assert d.sent[-1].endswith("-2w")

    run(story)


def test_nobody_waits_longer_than_is_said() -> None:
    async def story(world: World) -> None:
        small(world)
        for number in range(2 * MOST + 1):
            world.add(f"r{number}")
        await asyncio.sleep(LIMITS.queue_s + 0.5)
        assert world.failed == [(f"r{2 * MOST}", Ending.OVERLOADED)]
        assert states(world) == {MemberState.UP}

    run(story)


def test_a_request_is_turned_away_when_too_many_wait_already() -> None:
    async def story(world: World) -> None:
        d = small(world)
        for number in range(16):
            assert world.dispatch.refuse(1) is None
            world.add(f"r{number}")
        assert world.dispatch.refuse(1) == TurnedAway(Refusal.OVERLOADED)
        world.give(d, output_of("r0-1w", 50))
        assert world.dispatch.refuse(1) is None
        assert world.dispatch.refuse(2) == TurnedAway(Refusal.OVERLOADED)
        world.dispatch.abort([f"r{number}" for number in range(16)])
        assert world.dispatch.refuse(16) is None

    run(story)


def test_while_the_loop_is_late_requests_are_turned_away_and_those_under_way_go_on() -> None:
    async def story(world: World) -> None:
        d = small(world)
        assert world.dispatch.refuse(1) is None
        world.add("r")
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SkippingLoop)
        for _ in range(6):
            loop.now += 2.0  # in which nothing else has its turn
            await asyncio.sleep(SWEEP_S)
        assert 1.0 < world.dispatch.lag.seconds < 2.0
        refused = world.dispatch.refuse(1)
        assert refused is not None
        assert refused.why is Refusal.FRONTEND_OVERLOADED
        world.give(d, output_of("r-1w", 50, finish=FinishReason.STOP))
        assert world.tokens == [50]
        await asyncio.sleep(10.0)
        assert world.dispatch.refuse(1) is None, "it has caught up"

    run(story)


def test_requests_are_turned_away_while_messages_of_an_engine_wait_to_be_read() -> None:
    async def story(world: World) -> None:
        small(world)
        world.engine("other", Role.DECODE).behind_s = 3.0
        assert world.dispatch.refuse(1) is None
        await asyncio.sleep(10.0)
        refused = world.dispatch.refuse(1)
        assert refused is not None
        assert refused.why is Refusal.FRONTEND_OVERLOADED

    run(story)


def test_the_tokens_that_are_queued_are_those_of_requests_that_have_got_nothing() -> None:
    async def story(world: World) -> None:
        def queued() -> float:
            return value("pd_frontend_queued_tokens")

        world.add("waits")
        await asyncio.sleep(2 * SWEEP_S)
        assert queued() == len(PROMPT), "for an engine"
        d = world.engine("d", Role.DECODE)
        world.add("other")
        await asyncio.sleep(2 * SWEEP_S)
        assert queued() == 2 * len(PROMPT), "on an engine"
        world.give(d, output_of("other-1w", 50))
        await asyncio.sleep(2 * SWEEP_S)
        assert queued() == len(PROMPT)
        world.dispatch.abort(["waits"])
        await asyncio.sleep(2 * SWEEP_S)
        assert queued() == 0
        assert value("pd_frontend_loop_lag_seconds") == pytest.approx(0.0, abs=1e-3)

    with counting({}) as metrics:
        run(story, metrics=metrics)


def test_while_no_engine_is_there_a_thousand_requests_may_wait_for_one() -> None:
    async def story(world: World) -> None:
        for number in range(1000):
            assert world.dispatch.refuse(1) is None
            world.add(f"r{number}")
        assert world.dispatch.refuse(1) == TurnedAway(Refusal.OVERLOADED)

    run(story)


def test_an_engine_of_a_large_pool_that_is_free_again_is_found_though_nobody_waited() -> None:
    """Engines that were found full are not drawn again before something happens on them."""

    async def story(world: World) -> None:
        world.engine("p", Role.PREFILL)
        engines = [world.engine(f"d{number}", Role.DECODE) for number in range(64)]
        load: Any = world.dispatch.loaded
        for each in engines:
            load(each, State(EngineLoad(running=10_000), 0))
        world.add("in vain")
        world.dispatch.abort(["in vain"])
        assert not world.dispatch.num_waiting
        for free in engines[::16]:
            load(free, State(EngineLoad(), 0))
            world.add(f"for {free.url}")
            assert free.sent == [f"for {free.url}-1d"]
            load(free, State(EngineLoad(running=10_000), 0))

    run(story)
