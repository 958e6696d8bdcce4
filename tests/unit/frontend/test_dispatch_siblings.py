"""The parts of one request of a client: one piece of work, and one in the counts."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Coroutine
from typing import Any

from tests.fakes import dispatching
from tests.fakes.courses import PROMPT
from tests.fakes.dispatching import HANDED_OFF, World
from tests.fakes.series import counting, value, values
from vllm_pd_plugin.engine_port.messages import EngineLoad, State

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import FinishReason

    from tests.fakes.links import output_of
    from vllm_pd_plugin.frontend.routing.choice import Role
    from vllm_pd_plugin.frontend.telemetry.outcomes import Objectives, one_request

ABORT, LENGTH, STOP = FinishReason.ABORT, FinishReason.LENGTH, FinishReason.STOP


def run(story: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    with counting({"default": Objectives(0.5, 0.1)}) as metrics:
        dispatching.run(story, HANDED_OFF, metrics)


def outcomes() -> dict[str, float]:
    return values("pd_frontend_requests_total", "outcome")


def test_the_choices_of_a_request_share_a_prefill_and_a_decode_engine() -> None:
    async def story(world: World) -> None:
        engines = [world.engine(f"p{n}", Role.PREFILL) for n in range(3)]
        engines += [world.engine(f"d{n}", Role.DECODE) for n in range(3)]
        with one_request():
            for choice in range(4):
                world.add(f"{choice}_r")
        assert sorted(len(engine.sent) for engine in engines) == [0, 0, 0, 0, 4, 4]
        world.add("s")  # of another client
        assert sorted(len(engine.sent) for engine in engines) == [0, 0, 1, 1, 4, 4]

    run(story)


def test_a_choice_that_has_failed_begins_anew_where_the_others_are_if_they_do_well() -> None:
    async def story(world: World) -> None:
        first = world.engine("d1", Role.DECODE)
        second = world.engine("d2", Role.DECODE)
        with one_request():
            for choice in range(3):
                world.add(f"{choice}_r")
        there, other = (first, second) if first.sent else (second, first)
        assert len(there.sent) == 3
        world.lose(there)
        await asyncio.sleep(1.0)
        assert len(other.sent) == 3

    run(story)


def test_an_attempt_more_does_not_follow_the_first_one() -> None:
    async def story(world: World) -> None:
        links = {url: world.engine(url, Role.PREFILL) for url in ("p0", "p1")}
        d = world.engine("d", Role.DECODE)
        world.add("r")
        (first,) = (url for url, link in links.items() if link.sent)
        (other,) = set(links) - {first}
        busy: Any = links[first]
        world.dispatch.loaded(busy, State(EngineLoad(waiting_tokens=1000), 0, last_add=1))
        world.give(d, output_of("r-1d", finish=ABORT))
        await asyncio.sleep(1.0)
        assert (links[first].sent, links[other].sent) == (["r-1p"], ["r-2p"])
        prompt_to_compute = world.dispatch.pool[other].snapshot().prefill_tokens
        assert prompt_to_compute == len(PROMPT), "it is not cached where it was not computed"

    run(story)


def answer(world: World, request_id: str) -> str:
    """A step of beam search comes and goes; returns the engine that it was on."""
    world.add(request_id, max_tokens=1)
    for member in world.dispatch.pool:
        link: Any = member.link
        if f"{request_id}-1w" in link.sent:
            world.give(link, output_of(f"{request_id}-1w", 50, finish=LENGTH))
            return member.key
    raise AssertionError("it is on no engine")


def test_all_steps_of_a_beam_search_are_on_one_engine_that_decodes_and_one_request() -> None:
    async def story(world: World) -> None:
        for number in range(3):
            world.engine(f"p{number}", Role.PREFILL)
            world.engine(f"d{number}", Role.DECODE)
        with world.metrics.one_request(are_beams=True):
            places = set()
            for step in range(5):
                for beam in range(3):
                    with world.metrics.one_request():  # so each of them comes
                        places.add(answer(world, f"{step}-{beam}"))
                await asyncio.sleep(1.0)
            assert outcomes() == {}
        assert outcomes() == {"answered": 1}
        assert len(places) == 1
        assert places.pop().startswith("d")
        assert values("pd_frontend_routes_total", "reason") == {"beam_search": 15}

    run(story)


def test_the_steps_of_a_beam_search_leave_others_their_place_in_the_queue() -> None:
    async def story(world: World) -> None:
        world.engine("d", Role.DECODE)
        with world.metrics.one_request(are_beams=True):
            answer(world, "first")
            for beam in range(10):
                world.add(f"beam-{beam}", max_tokens=1)
            assert world.dispatch.gate.queued.total() == 0
        world.add("other")
        assert world.dispatch.gate.queued.total() == 1

    run(story)


def test_a_beam_search_has_one_time_to_first_token() -> None:
    async def story(world: World) -> None:
        world.engine("d", Role.DECODE)
        with world.metrics.one_request(are_beams=True):
            for step in range(4):
                answer(world, str(step))
        assert value("pd_frontend_ttft_seconds_count", slo_class="default") == 1
        assert values("pd_frontend_goodput_requests_total", "slo_class") == {"default": 1}

    run(story)


def test_a_request_that_comes_when_a_beam_search_is_over_is_another() -> None:
    async def story(world: World) -> None:
        world.engine("d", Role.DECODE)

        async def later() -> None:
            await over.wait()
            with world.metrics.one_request():
                answer(world, "later")

        over = asyncio.Event()
        with world.metrics.one_request(are_beams=True):
            answer(world, "step")
            task = asyncio.create_task(later())
        over.set()
        await task
        assert outcomes() == {"answered": 2}

    run(story)
