"""What Serve's controller is told of a pool's size."""

from __future__ import annotations

import asyncio
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes.clock import FakeClock
from vllm_pd_plugin.frontend.routing.choice import Role

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's, not ours
    from vllm_pd_plugin.ray_serve.autoscaling import PoolPolicy


class _Registry:
    """Says what is needed, as long as it can."""

    def __init__(self) -> None:
        self.needs_now: dict[Role, float] | None = {Role.PREFILL: 0.5, Role.DECODE: 2.5}
        self.asked = 0

    async def needs(self) -> dict[Role, float]:
        self.asked += 1
        if self.needs_now is None:
            raise TimeoutError
        return self.needs_now


class World:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.registry = _Registry()
        there: Any = self.registry
        self.policy = PoolPolicy("decode", there, self.clock)

    async def decide(self, current: int, running: int = 1) -> int:
        """Serve asks; whatever that begins comes to its end."""
        there = SimpleNamespace(target_num_replicas=current, running_replicas=["r"] * running)
        decision, _ = self.policy(there)
        for _ in range(5):
            await asyncio.sleep(0)
        return decision


@pytest.fixture
def world() -> World:
    return World()


def test_a_pool_stays_as_it_is_until_the_need_is_known(world: World) -> None:
    async def story() -> list[int]:
        return [await world.decide(1), await world.decide(1)]

    assert asyncio.run(story()) == [1, 3]


def test_a_pool_does_not_grow_while_its_first_engine_starts(world: World) -> None:
    async def story() -> list[int]:
        await world.decide(0, running=0)
        return [await world.decide(0, running=0), await world.decide(1, running=0)]

    assert asyncio.run(story()) == [1, 1]


def test_the_registry_is_asked_once_a_second(world: World) -> None:
    async def story() -> None:
        for _ in range(25):
            await world.decide(1)
            world.clock.advance(0.1)

    asyncio.run(story())
    assert world.registry.asked == 3


def test_a_pool_stays_as_it_is_when_the_need_is_not_known_any_more(world: World) -> None:
    async def story() -> list[int]:
        await world.decide(1)
        world.registry.needs_now = None
        decisions = [await world.decide(1)]
        world.clock.advance(14.9)
        decisions.append(await world.decide(1))
        world.clock.advance(0.2)
        decisions.append(await world.decide(5))
        return decisions

    assert asyncio.run(story()) == [3, 3, 5]
