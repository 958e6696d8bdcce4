"""vLLM's own beam search over a pool."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes import dispatching
from tests.fakes.courses import make_request
from tests.fakes.dispatching import World
from tests.fakes.series import counting, values

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm import CompletionOutput, RequestOutput
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.exceptions import GracefulHTTPError
    from vllm.logprobs import Logprob
    from vllm.sampling_params import BeamSearchParams
    from vllm.v1.engine import FinishReason

    from tests.fakes.links import output_of
    from vllm_pd_plugin.frontend.api.beams import keep_beams_together
    from vllm_pd_plugin.frontend.api.client import PoolLLM
    from vllm_pd_plugin.frontend.routing.choice import Role

WIDTH, LENGTH = 2, 4


class Client(PoolLLM):
    """One without a model: each step gives the same two candidates, on whatever engine it is."""

    def __init__(self, world: World) -> None:
        self.dispatch, self._world = world.dispatch, world
        self._is_draining = False
        limits = {"max_num_queued_reqs": None, "max_num_queued_tokens": None}
        self.scheduler_config: Any = SimpleNamespace(**limits)
        self.input_processor: Any = SimpleNamespace(resolve_watermarking=lambda params: False)
        self.places: list[str] = []
        self.on_step = lambda: None

    async def generate(  # type: ignore[override]
        self, prompt: Any, params: Any, request_id: str, **more: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        self.on_step()
        self.check_admission()
        with self.dispatch.metrics.one_request():
            self.dispatch.add(make_request(request_id, prompt["prompt_token_ids"], max_tokens=1))
        await asyncio.sleep(0.1)
        leg = f"{request_id}-1w"
        for member in self.dispatch.pool:
            link: Any = member.link
            if leg in link.sent:
                self.places.append(member.key)
                self._world.give(link, output_of(leg, 50, finish=FinishReason.LENGTH))
        found = {token: Logprob(-token / 10) for token in (5, 6)}
        one = CompletionOutput(0, "", [5], None, [found], "length")
        yield RequestOutput(request_id, None, prompt["prompt_token_ids"], None, [one], True)


class Serving(BeamSearchOnlineMixin):
    def __init__(self, client: PoolLLM) -> None:
        tokenizer = SimpleNamespace(eos_token_id=0, decode=lambda tokens, **how: str(tokens))
        self.renderer: Any = SimpleNamespace(get_tokenizer=lambda: tokenizer)
        self.engine_client = client


@pytest.fixture(autouse=True)
def _together(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = BeamSearchOnlineMixin.beam_search
    monkeypatch.setattr(BeamSearchOnlineMixin, "beam_search", plain)  # and again, at the end
    monkeypatch.setattr(BeamSearchOnlineMixin, "_pd_keeps_beams_together", False, raising=False)
    keep_beams_together()
    keep_beams_together()


async def search(client: Client) -> list[RequestOutput]:
    prompt: Any = {"type": "token", "prompt_token_ids": [1, 2, 3]}
    params = BeamSearchParams(beam_width=WIDTH, max_tokens=LENGTH)
    return [output async for output in Serving(client).beam_search(prompt, "b", params)]


def outcomes() -> dict[str, float]:
    return values("pd_frontend_requests_total", "outcome")


def pool_of(world: World) -> Client:
    for number in range(3):
        world.engine(f"p{number}", Role.PREFILL)
        world.engine(f"d{number}", Role.DECODE)
    return Client(world)


def test_a_search_is_one_request_on_one_decode_engine() -> None:
    async def story(world: World) -> None:
        client = pool_of(world)
        [found] = await search(client)
        assert [len(each.token_ids) for each in found.outputs] == [LENGTH] * WIDTH
        assert len(client.places) == 1 + WIDTH * (LENGTH - 1)
        assert len(set(client.places)) == 1
        assert client.places[0].startswith("d")
        assert outcomes() == {"answered": 1}

    with counting({}) as metrics:
        dispatching.run(story, metrics=metrics)


def test_two_searches_at_once_are_two() -> None:
    async def story(world: World) -> None:
        client = pool_of(world)
        await asyncio.gather(search(client), search(client))
        assert outcomes() == {"answered": 2}
        assert values("pd_frontend_routes_total", "reason") == {"beam_search": 14}

    with counting({}) as metrics:
        dispatching.run(story, metrics=metrics)


def test_a_search_that_has_begun_is_not_turned_away() -> None:
    async def story(world: World) -> None:
        client = pool_of(world)

        def stop_after_one() -> None:
            client._is_draining = bool(client.places)

        client.on_step = stop_after_one
        assert len(await search(client)) == 1
        assert client._is_draining
        with pytest.raises(GracefulHTTPError):
            await search(client)
        assert outcomes() == {"answered": 1, "refused": 1}

    with counting({}) as metrics:
        dispatching.run(story, metrics=metrics)


def test_a_client_that_leaves_ends_every_step() -> None:
    async def story(world: World) -> None:
        client = pool_of(world)
        task = asyncio.create_task(search(client))
        await asyncio.sleep(0.15)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        begun = len(client.places)
        await asyncio.sleep(1.0)
        assert len(client.places) == begun

    with counting({}) as metrics:
        dispatching.run(story, metrics=metrics)
