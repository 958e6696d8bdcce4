"""What the engine client of a frontend counts of the requests that vLLM's API server brings."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

import pytest

from tests.fakes import dispatching
from tests.fakes.courses import make_request
from tests.fakes.dispatching import World
from tests.fakes.series import counting, values

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.exceptions import GracefulHTTPError
    from vllm.v1.engine import FinishReason
    from vllm.v1.engine.async_llm import AsyncLLM

    from tests.fakes.links import output_of
    from vllm_pd_plugin.engine_port.messages import EngineLoad, State
    from vllm_pd_plugin.frontend.api.client import PoolLLM
    from vllm_pd_plugin.frontend.routing.choice import Role


def client_of(world: World) -> PoolLLM:
    """One without a model, over a dispatch."""
    client = PoolLLM.__new__(PoolLLM)
    client.dispatch = world.dispatch
    client._is_draining = False
    return client


def outcomes() -> dict[str, float]:
    return values("pd_frontend_requests_total", "outcome")


def test_the_choices_of_one_call_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def add_choices(client: Any, request_id: str, *args: Any, **kwargs: Any) -> None:
        for choice in range(3):
            client.dispatch.add(make_request(f"{choice}_{request_id}"))
            await asyncio.sleep(0)

    async def story(world: World) -> None:
        d = world.engine("d", Role.DECODE)
        monkeypatch.setattr(AsyncLLM, "add_request", add_choices)
        client = client_of(world)
        await asyncio.gather(*(client.add_request(name, "prompt", None) for name in ("r", "s")))
        for leg in list(d.sent):
            world.give(d, output_of(leg, 50, finish=FinishReason.STOP))
        assert len(world.tokens) == 6
        assert outcomes() == {"answered": 2}

    with counting({}) as metrics:
        dispatching.run(story, metrics=metrics)


def test_a_request_that_is_turned_away_is_counted() -> None:
    async def story(world: World) -> None:
        client = client_of(world)
        client._is_draining = True
        with pytest.raises(GracefulHTTPError):
            client.check_admission()
        assert outcomes() == {"refused": 1}

    with counting({}) as metrics:
        dispatching.run(story, metrics=metrics)


def test_the_pool_s_load_goes_to_vllm_s_loggers_again_and_again() -> None:
    told: list[int] = []

    class Loggers:
        def record(self, scheduler_stats: Any, iteration_stats: Any) -> None:
            told.append(scheduler_stats.num_running_reqs)
            if len(told) == 2:
                raise RuntimeError("a logger's fault ends nothing")

    async def story(world: World) -> None:
        d: Any = world.engine("d", Role.DECODE)
        client: Any = client_of(world)
        client.logger_manager = Loggers()
        teller = asyncio.get_running_loop().create_task(client._tell_load())
        for running in (1, 2, 3):
            world.dispatch.loaded(d, State(EngineLoad(running), 0))
            await asyncio.sleep(0.6)
        teller.cancel()
        assert told[-1] == 3
        assert len(told) >= 3

    dispatching.run(story)
