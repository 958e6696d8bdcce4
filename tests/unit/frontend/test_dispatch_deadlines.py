"""A frontend's dispatch: how long a request waits for engines, and for its answer."""

from __future__ import annotations

import asyncio
import warnings

from tests.fakes.courses import PROMPT
from tests.fakes.dispatching import BACKOFF_S, LIMITS, SWEEP_S, World, run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import FinishReason

    from tests.fakes.links import output_of
    from vllm_pd_plugin.frontend.requests.endings import Ending
    from vllm_pd_plugin.frontend.routing.choice import NoPrefill, Policy, Role

LENGTH = FinishReason.LENGTH


# --- waiting for engines ---------------------------------------------------------------------


def test_a_request_waits_until_an_engine_comes() -> None:
    async def story(world: World) -> None:
        world.add("r")
        assert (world.dispatch.num_waiting, world.failed) == (1, [])
        await asyncio.sleep(LIMITS.queue_s - 1)
        p, d = world.pair()
        await asyncio.sleep(SWEEP_S)
        assert world.dispatch.num_waiting == 0
        assert d.sent
        assert len(p.sent) <= 1

    run(story)


def test_a_request_does_not_wait_for_ever() -> None:
    async def story(world: World) -> None:
        world.add("r")
        await asyncio.sleep(LIMITS.queue_s - 1)
        assert world.failed == []
        world.engine("p", Role.PREFILL)  # of no help, and no reason to wait longer
        await asyncio.sleep(1 + 2 * SWEEP_S)
        assert world.failed == [("r", Ending.NO_ENGINE)]
        assert (world.dispatch.num_waiting, len(world.dispatch)) == (0, 0)

    run(story)


def test_without_prefill_engines_a_request_fails_at_once_if_that_is_the_policy() -> None:
    async def story(world: World) -> None:
        world.engine("d", Role.DECODE)
        world.add("r")
        assert world.failed == [("r", Ending.NO_ENGINE)]

    run(story, Policy(no_prefill=NoPrefill.FAIL))


def test_without_prefill_engines_a_request_waits_if_that_is_the_policy() -> None:
    async def story(world: World) -> None:
        d = world.engine("d", Role.DECODE)
        world.add("r")
        assert (d.sent, world.failed) == ([], [])
        assert world.dispatch.serves() == "queue_for_prefill"
        p = world.engine("p", Role.PREFILL)
        await asyncio.sleep(0)
        assert (p.sent, d.sent) == (["r-1p"], ["r-1d"])

    run(story, Policy(no_prefill=NoPrefill.QUEUE, local_below=0))


def test_choices_of_one_request_that_wait_may_all_be_given_up_at_once() -> None:
    """The first to fail ends its siblings, while the others are still being looked at."""

    async def story(world: World) -> None:
        world.on_failed = lambda course, ending: world.dispatch.abort(["0_r", "1_r", "2_r"])
        for number in range(3):
            world.add(f"{number}_r")
        assert world.dispatch.num_waiting == 3
        world.engine("d", Role.DECODE)
        await asyncio.sleep(0)
        assert world.failed == [("0_r", Ending.NO_ENGINE)]
        assert (world.dispatch.num_waiting, len(world.dispatch)) == (0, 0)

    run(story, Policy(no_prefill=NoPrefill.FAIL))


# --- what takes too long ---------------------------------------------------------------------


def test_a_request_that_takes_too_long_is_ended() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("r")
        world.give(p, output_of("r-1p", 50, finish=LENGTH))
        token = 51
        while not world.failed:
            world.give(d, output_of("r-1d", token))
            token += 1
            await asyncio.sleep(1.0)
        assert world.failed == [("r", Ending.DEADLINE)]
        assert d.aborted == ["r-1d"]
        assert LIMITS.request_s <= world.dispatch.now() - 1000.0 <= LIMITS.request_s + 2

    run(story)


def test_an_attempt_without_a_first_token_is_given_up() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("r")
        await asyncio.sleep(LIMITS.first_token_s - 1)
        assert (p.aborted, d.aborted) == ([], [])
        await asyncio.sleep(1 + SWEEP_S + BACKOFF_S + 0.1)
        assert (p.aborted, d.aborted) == (["r-1p"], ["r-1d"])
        assert (p.sent, d.sent) == (["r-1p"], ["r-1d", "r-2w"])

    run(story)


def test_an_answer_that_stands_still_is_continued_elsewhere() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("r")
        world.give(p, output_of("r-1p", 50, finish=LENGTH))
        world.give(d, output_of("r-1d", 51))
        await asyncio.sleep(LIMITS.stall_s - 1)
        assert d.aborted == []
        await asyncio.sleep(1 + SWEEP_S + BACKOFF_S + 0.1)
        assert d.aborted == ["r-1d"]
        assert d.requests["r-2d"].prompt_token_ids == [*PROMPT, 50, 51]
        assert world.tokens == [50, 51]

    run(story)
