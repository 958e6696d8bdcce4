"""What a client says of its request goes to every engine that works on it."""

from __future__ import annotations

import asyncio
import warnings

from tests.fakes import dispatching
from tests.fakes.courses import make_request
from tests.fakes.dispatching import World

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.fakes.links import FakeLink
    from vllm_pd_plugin.frontend.routing.choice import Policy, Role


def add(world: World, request_id: str = "r") -> None:
    request = make_request(request_id)
    request.priority, request.cache_salt = 7, "a tenant's"
    world.dispatch.add(request)


def told(link: FakeLink) -> list[tuple[int, str | None]]:
    return [(request.priority, request.cache_salt) for request in link.requests.values()]


def test_priority_and_salt_go_with_both_legs_and_with_the_next_attempt() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        add(world)
        assert told(p) == told(d) == [(7, "a tenant's")]
        other = world.engine("d2", Role.DECODE)
        world.lose(d)
        await asyncio.sleep(1.0)
        assert told(other) == [(7, "a tenant's")]
        assert told(p) == [(7, "a tenant's")] * 2

    dispatching.run(story)


def test_priority_and_salt_go_with_what_one_engine_does_alone() -> None:
    async def story(world: World) -> None:
        d = world.engine("d", Role.DECODE)
        add(world)
        assert told(d) == [(7, "a tenant's")]

    dispatching.run(story, Policy())
