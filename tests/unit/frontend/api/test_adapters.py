"""LoRA adapters, on the side of a frontend."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

import pytest

from tests.fakes import dispatching
from tests.fakes.courses import make_request
from tests.fakes.dispatching import World

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine import FinishReason

    from tests.fakes.engine_core import describe
    from tests.fakes.links import FakeLink, output_of
    from vllm_pd_plugin.frontend.api.adapters import number_adapter
    from vllm_pd_plugin.frontend.api.client import PoolLLM
    from vllm_pd_plugin.frontend.routing.choice import Role


def numbered(name: str, path: str, count: int = 1, load_inplace: bool = False) -> int:
    """The number of an adapter that vLLM has counted as it has."""
    lora = LoRARequest(name, count, path, load_inplace=load_inplace)
    number_adapter(lora)
    assert not lora.load_inplace  # an engine would load it again in every step
    assert 2**20 <= lora.lora_int_id < 2**31
    return lora.lora_int_id


def test_an_adapter_has_the_same_number_at_every_frontend_whatever_else_they_have() -> None:
    assert numbered("a", "/a", 1) == numbered("a", "/a", 7)


def test_adapters_of_another_name_or_path_have_other_numbers() -> None:
    numbers = {numbered(name, path) for name in "ab" for path in ("/a", "/b", "b/a")}
    assert len(numbers) == 6


def test_an_adapter_that_is_loaded_in_place_is_another_one_to_the_engines() -> None:
    assert (
        len({numbered("a", "/a", 1, load_inplace=True) for _ in range(3)} | {numbered("a", "/a")})
        == 4
    )


def engine_of(world: World, url: str, role: Role, has_lora: bool) -> FakeLink:
    link = world.engine(url, role)
    link.description = describe(role=role.value, has_lora=has_lora)
    world.come_back(link)
    return link


def add(world: World, request_id: str) -> None:
    request = make_request(request_id)
    request.lora_request = LoRARequest("a", 2_000_000, "/a")
    world.dispatch.add(request)


def client_of(world: World) -> PoolLLM:
    client = PoolLLM.__new__(PoolLLM)
    client.dispatch = world.dispatch
    return client


def test_a_request_with_an_adapter_goes_to_engines_that_take_some_with_both_its_legs() -> None:
    async def story(world: World) -> None:
        plain = [
            engine_of(world, f"{role[0]}0", role, False) for role in (Role.PREFILL, Role.DECODE)
        ]
        p, d = (engine_of(world, f"{role[0]}1", role, True) for role in (Role.PREFILL, Role.DECODE))
        for number in range(6):
            add(world, str(number))
        assert [link.sent for link in plain] == [[], []]
        assert len(p.sent) == len(d.sent) == 6
        for leg in (p.requests["0-1p"], d.requests["0-1d"]):
            assert leg.lora_request is not None
            assert (leg.lora_request.name, leg.lora_request.path) == ("a", "/a")

    dispatching.run(story)


def test_where_no_prefill_engine_takes_adapters_the_decode_engine_does_it_all() -> None:
    async def story(world: World) -> None:
        p = engine_of(world, "p", Role.PREFILL, False)
        d = engine_of(world, "d", Role.DECODE, True)
        add(world, "r")
        assert (p.sent, d.sent) == ([], ["r-1w"])

    dispatching.run(story)


def test_after_a_failure_too_it_goes_to_no_engine_that_takes_no_adapters() -> None:
    async def story(world: World) -> None:
        other = engine_of(world, "d0", Role.DECODE, False)
        d = engine_of(world, "d1", Role.DECODE, True)
        add(world, "r")
        world.give(d, output_of("r-1w", finish=FinishReason.ERROR))
        await asyncio.sleep(1.0)
        assert other.sent == []
        assert d.sent == ["r-1w", "r-2w"]

    dispatching.run(story)


@pytest.mark.parametrize("call", ["add_lora", "add_request"])
def test_where_no_engine_takes_adapters_that_is_said_at_once(call: str) -> None:
    async def story(world: World) -> None:
        engine_of(world, "p", Role.PREFILL, True)
        engine_of(world, "d", Role.DECODE, False)
        client, lora = client_of(world), LoRARequest("a", 1, "/a")
        calls: dict[str, Any] = {
            "add_lora": lambda: client.add_lora(lora),
            "add_request": lambda: client.add_request("r", "prompt", None, lora_request=lora),
        }
        with pytest.raises(VLLMValidationError, match="start engines with --enable-lora"):
            await calls[call]()

    dispatching.run(story)


def test_an_adapter_waits_for_an_engine_that_takes_some_and_is_down_now() -> None:
    async def story(world: World) -> None:
        engine_of(world, "d0", Role.DECODE, False)
        d = engine_of(world, "d1", Role.DECODE, True)
        world.lose(d)
        assert await client_of(world).add_lora(LoRARequest("a", 1, "/a"))
        add(world, "r")
        await asyncio.sleep(1.0)
        assert (world.dispatch.num_waiting, world.failed) == (1, [])
        world.come_back(d)
        await asyncio.sleep(0)
        assert d.sent == ["r-1w"]

    dispatching.run(story)


def test_while_no_engine_is_up_nobody_knows_whether_one_takes_adapters() -> None:
    async def story(world: World) -> None:
        world.lose(engine_of(world, "d", Role.DECODE, False))
        lora = LoRARequest("a", 1, "/a")
        assert await client_of(world).add_lora(lora)
        assert lora.lora_int_id == numbered("a", "/a")

    dispatching.run(story)
