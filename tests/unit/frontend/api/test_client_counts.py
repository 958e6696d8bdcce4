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
    from vllm_pd_plugin.frontend.admission import NO_ENGINES
    from vllm_pd_plugin.frontend.api.client import PoolLLM
    from vllm_pd_plugin.frontend.requests.context import ContextMiddleware
    from vllm_pd_plugin.frontend.routing.choice import Role
    from vllm_pd_plugin.frontend.telemetry.outcomes import DEFAULT_CLASS, one_request


def client_of(world: World) -> PoolLLM:
    """One without a model, over a dispatch."""
    client = PoolLLM.__new__(PoolLLM)
    client.dispatch = world.dispatch
    client._is_draining = False
    return client


async def served(app: Any) -> None:
    """Handle one HTTP request."""
    nothing: Any = None
    await ContextMiddleware(app)({"type": "http", "headers": []}, nothing, nothing)


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


def test_what_was_let_in_is_not_turned_away_after_its_status_was_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many come between vLLM's two questions."""

    async def story(world: World) -> None:
        client, gate = client_of(world), world.dispatch.gate
        monkeypatch.setattr(AsyncLLM, "check_admission", lambda *_: None)
        tenant = gate.tenant(DEFAULT_CLASS, "")

        async def app(scope: Any, receive: Any, send: Any) -> None:
            client.check_admission(2)
            assert gate.queued[tenant] == 2
            for _ in range(NO_ENGINES.max_running):
                gate.joined(tenant)
            client.check_admission(2, "r")
            assert gate.queued[tenant] == NO_ENGINES.max_running
            with pytest.raises(GracefulHTTPError):  # its room is used up
                client.check_admission(1, "s")
            gate.queued.clear()

        await served(app)

    with counting({}) as metrics:
        dispatching.run(story, metrics=metrics)


def test_an_operator_s_bound_counts_what_was_let_in_and_has_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    async def story(world: World) -> None:
        client = client_of(world)
        monkeypatch.setattr(AsyncLLM, "check_admission", lambda _, n, request_id: asked.append(n))

        async def app(scope: Any, receive: Any, send: Any) -> None:
            client.check_admission(2)
            await asyncio.create_task(served(another))  # as every request is
            client.check_admission(2, "r")
            client.check_admission(1, "s")

        async def another(scope: Any, receive: Any, send: Any) -> None:
            client.check_admission(3)

        await served(app)
        assert asked == [2, 5, 1]  # what had room is not asked for again

    dispatching.run(story)


def test_a_request_of_which_nobody_tells_the_end_reserves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(world: World) -> None:
        monkeypatch.setattr(AsyncLLM, "check_admission", lambda *_: None)
        client_of(world).check_admission(2)
        assert not world.dispatch.gate.queued

    dispatching.run(story)


def test_a_beam_search_has_room_for_one_answer_once_it_has_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(world: World) -> None:
        client, gate = client_of(world), world.dispatch.gate
        monkeypatch.setattr(AsyncLLM, "check_admission", lambda *_: None)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            client.check_admission(4)
            with one_request(are_beams=True):
                client.check_admission(1, "first step")
            assert not gate.queued  # it joins next

        await served(app)

    dispatching.run(story)


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
        client.logger_manager, client._end_unread = Loggers(), lambda: None
        teller = asyncio.get_running_loop().create_task(client._look())
        for running in (1, 2, 3):
            world.dispatch.loaded(d, State(EngineLoad(running), 0))
            await asyncio.sleep(0.6)
        teller.cancel()
        assert told[-1] == 3
        assert len(told) >= 3

    dispatching.run(story)
