"""Engines without a model: vLLM's own scheduler, and both halves of our connector."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest

from vllm_pd_plugin.simulation.clock import Clock
from vllm_pd_plugin.simulation.links import Network
from vllm_pd_plugin.simulation.memory import Contents
from vllm_pd_plugin.simulation.transport import Fabric, ReadFate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.simulation.engine import Output, SimulatedEngine, StaleKv, World
    from vllm_pd_plugin.simulation.shape import Shape

PROMPT = list(range(10, 31))
OPTIONS: dict[str, Any] = {"staging_bytes": 0}


class Two:
    """A prefill and a decode engine where nothing goes wrong."""

    def __init__(self, **shape: Any) -> None:
        self.clock = Clock()
        network = Network(self.clock, lambda address, frames: (0.0005,))
        fabric = Fabric(lambda reader, peer: ReadFate(0.001))
        world = World(self.clock, network, fabric, Contents(), random.Random(1))
        self.outputs: list[Output] = []
        self.prefill, self.decode = (
            SimulatedEngine(
                role,
                ("127.0.0.1", 7000 + number),
                Shape(role, 40, options=OPTIONS, **shape),
                world,
                1,
                lambda engine, output: self.outputs.append(output),
            )
            for number, role in enumerate(("prefill", "decode"))
        )

    def answer(self, name: str) -> list[int]:
        self.clock.run(self.clock.now + 3.0)
        return [t for output in self.outputs if output.request_id == name for t in output.tokens]

    def hand_off(self) -> dict[str, Any]:
        self.prefill.add("p", PROMPT, {"do_remote_decode": True})
        self.answer("p")
        (params,) = (output.params for output in self.outputs if output.params)
        return params

    def free_blocks(self) -> list[int]:
        engines = (self.prefill, self.decode)
        return [e.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() for e in engines]


@pytest.mark.parametrize("shape", [{}, {"ranks": 2}, {"window": 6}], ids=str)
def test_what_is_handed_off_is_answered_as_one_engine_answers_it(shape: dict[str, Any]) -> None:
    two = Two(**shape)
    two.decode.add("alone", PROMPT, max_tokens=5)
    alone = two.answer("alone")
    two.decode.scheduler.reset_prefix_cache()
    params = two.hand_off()
    steps = two.decode.num_steps
    two.decode.add("d", PROMPT, params, max_tokens=5)
    assert two.answer("d") == alone
    assert len(alone) == 5
    assert two.decode.num_steps > steps
    assert two.free_blocks() == [39, 39]
    assert not two.prefill.connector.side.what_is_open()
    assert not two.decode.connector.side.what_is_open()


def test_kv_that_is_overwritten_behind_a_requests_back_is_found_when_it_is_used() -> None:
    two = Two()
    two.decode.add("r", PROMPT, max_tokens=50)
    two.clock.run(0.05)
    (blocks,) = two.decode.scheduler.kv_cache_manager.get_block_ids("r")
    two.decode.workers[0].table.caches["layers.2"][blocks[1]] = 7
    with pytest.raises(StaleKv, match="layers.2.*position=4"):
        two.clock.run(3.0)


def test_a_request_that_is_ended_in_the_very_step_that_is_computed_with_such_kv_has_used_none() -> (
    None
):
    two = Two()
    two.decode.add("r", PROMPT, max_tokens=50)
    two.clock.run(0.05)
    (blocks,) = two.decode.scheduler.kv_cache_manager.get_block_ids("r")
    two.decode.workers[0].table.caches["layers.2"][blocks[1]] = 7
    two.decode.connector.side._consuming._hopeless.append("r")
    before = len(two.outputs)
    two.clock.run(3.0)
    (end,) = two.outputs[before:]
    assert (list(end.tokens), end.finish_reason) == ([], "error")


def test_what_was_computed_with_such_kv_is_nobodys() -> None:
    two = Two()
    two.decode.add("r", PROMPT, max_tokens=50)
    two.clock.run(0.05)
    (blocks,) = two.decode.scheduler.kv_cache_manager.get_block_ids("r")
    cells = two.decode.workers[0].table.caches["layers.2"]
    cells[blocks[1]] = 7
    with pytest.raises(StaleKv):
        two.clock.run(3.0)
    (blocks,) = two.decode.scheduler.kv_cache_manager.get_block_ids("r")
    length = two.decode.scheduler.requests["r"].num_computed_tokens
    last = cells[blocks[(length - 1) // 4]][(length - 1) % 4].numpy().view("<i8")
    assert last // (2**20 * 16 * 4) == 0


def test_an_engine_that_was_killed_says_nothing_more() -> None:
    two = Two()
    two.decode.add("r", PROMPT, max_tokens=50)
    two.clock.run(0.05)
    two.decode.kill()
    before = len(two.outputs)
    two.clock.run(3.0)
    assert len(two.outputs) == before
    assert not two.decode.is_at_rest


def test_with_other_weights_the_same_prompt_has_another_answer() -> None:
    two = Two()
    two.decode.add("before", PROMPT, max_tokens=5)
    before = two.answer("before")
    two.decode.change_weights(2)
    two.decode.add("after", PROMPT, max_tokens=5)
    assert two.answer("after") != before


def test_a_handoff_goes_on_when_its_producer_has_read_all_of_its_weights_meanwhile() -> None:
    two = Two(hash_s=0.05)
    handoff = "0123456789abcdef0123456789abcdef"
    host, port = two.prefill.address
    params = {"do_remote_prefill": True, "remote_handoff_id": handoff, "remote_host": host}
    two.decode.add("d", PROMPT, params | {"remote_port": port}, max_tokens=5)
    two.clock.run(0.1)
    assert two.prefill._identity.kv.weights.full == "all of weights 1"
    two.prefill.add("p", PROMPT, {"do_remote_decode": True, "handoff_id": handoff})
    answer = two.answer("d")
    two.decode.add("alone", PROMPT, max_tokens=5)
    assert answer == two.answer("alone")
    assert two.decode.workers[0].transport._num_posted > 0


def test_a_handoff_between_engines_of_other_weights_fails() -> None:
    two = Two()
    params = two.hand_off()
    two.decode.change_weights(2)
    two.decode.add("d", PROMPT, params, max_tokens=5)
    assert two.answer("d") == []
    assert [o.finish_reason for o in two.outputs if o.request_id == "d"] == ["error"]
