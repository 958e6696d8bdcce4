"""LoRA adapters of frontends' requests, on the side of an engine."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes.courses import make_request

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequestType, UtilityOutput

    from tests.fakes.engine_core import FakeFrontend, ServingEngine, added
    from vllm_pd_plugin.engine_port.refusals import refusal_of

UTILITY = EngineCoreRequestType.UTILITY
FRENCH = LoRARequest("french", 2_000_001, "/adapters/french")
DUTCH = LoRARequest("dutch", 2_000_002, "/adapters/dutch")


@pytest.fixture
def engine() -> ServingEngine:
    """One that keeps two adapters."""
    return ServingEngine(lora_config=SimpleNamespace(max_cpu_loras=2, max_loras=1))


def add(frontend: FakeFrontend, request_id: str, lora: LoRARequest) -> None:
    request = make_request(request_id)
    request.lora_request = lora
    frontend.add(request_id, request)


def loads(engine: ServingEngine) -> list[LoRARequest]:
    """What the core was asked to load."""
    calls = engine.core.taken(UTILITY)
    assert {method for _, _, method, _ in calls} <= {"add_lora"}
    return [lora for _, _, _, (lora,) in calls]


def answer(engine: ServingEngine, place: int = -1, problem: str | None = None) -> None:
    """The core answers one of these calls."""
    client_index, call, _, _ = engine.core.taken(UTILITY)[place]
    output = UtilityOutput(call, problem)
    engine.core.output_queue.put_nowait((client_index, EngineCoreOutputs(utility_output=output)))
    engine.settle()


def test_a_request_begins_when_the_core_has_loaded_its_adapter(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    add(frontend, "r", FRENCH)
    assert [(lora.name, lora.path) for lora in loads(engine)] == [("french", "/adapters/french")]
    assert added(engine) == []
    answer(engine)
    assert added(engine) == ["r"]
    assert engine.core.prepared[0].lora_request == FRENCH
    assert engine.told() == []  # the API server has asked for nothing


def test_an_adapter_is_loaded_once_whoever_asks_for_it(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    other = engine.frontend("other")
    other.attach()
    add(frontend, "a", FRENCH)
    add(other, "b", FRENCH)
    answer(engine)
    add(frontend, "c", FRENCH)
    assert len(loads(engine)) == 1
    assert added(engine) == ["a", "b", "c"]


def test_adapters_do_not_wait_for_each_other(engine: ServingEngine, frontend: FakeFrontend) -> None:
    add(frontend, "f", FRENCH)
    add(frontend, "d", DUTCH)
    frontend.add("plain")
    assert added(engine) == ["plain"]
    answer(engine, 1)
    assert added(engine) == ["plain", "d"]
    answer(engine, 0)
    assert added(engine) == ["plain", "d", "f"]


def test_an_adapter_that_cannot_be_loaded_is_refused_and_tried_again_for_the_next(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    add(frontend, "r", FRENCH)
    answer(engine, problem="No adapter found for /adapters/french")
    [refused] = frontend.outputs()
    assert refusal_of(refused) == (
        "its LoRA adapter cannot be loaded: No adapter found for /adapters/french"
    )
    assert added(engine) == []
    add(frontend, "s", FRENCH)
    answer(engine)
    assert added(engine) == ["s"]


def test_two_adapters_of_one_number_are_not_mixed_up(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    add(frontend, "r", FRENCH)
    answer(engine)
    add(frontend, "s", LoRARequest("else", FRENCH.lora_int_id, "/adapters/else"))
    assert added(engine) == ["r"]
    [refused] = frontend.outputs()
    assert "number is that of the adapter at /adapters/french" in str(refusal_of(refused))


def test_two_adapters_of_one_number_that_come_at_once_are_not_mixed_up(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    add(frontend, "r", FRENCH)
    add(frontend, "s", LoRARequest("else", FRENCH.lora_int_id, "/adapters/else"))
    answer(engine, 0)
    assert added(engine) == ["r"]
    assert [output.request_id for output in frontend.outputs()] == ["s"]


def test_what_is_given_up_meanwhile_does_not_begin(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    add(frontend, "r", FRENCH)
    frontend.abort("r")
    answer(engine)
    assert added(engine) == []
    assert frontend.outputs() == []


def test_a_frontend_that_is_gone_meanwhile_is_no_matter(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    add(frontend, "r", FRENCH)
    engine.clock.advance(1000)
    engine.server.turn()
    answer(engine)
    assert added(engine) == []


def test_an_engine_without_adapters_refuses(frontend: FakeFrontend, engine: ServingEngine) -> None:
    config: Any = engine.core.vllm_config
    config.lora_config = None
    add(frontend, "r", FRENCH)
    [refused] = frontend.outputs()
    assert refusal_of(refused) == "this engine has no LoRA adapters"
    assert loads(engine) == []


def test_an_adapter_that_the_engine_may_have_dropped_is_loaded_again(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    other = LoRARequest("greek", 2_000_003, "/adapters/greek")
    names = []
    for number, lora in enumerate((FRENCH, DUTCH, FRENCH, other, FRENCH, DUTCH)):
        before = len(loads(engine))
        add(frontend, str(number), lora)
        if len(loads(engine)) > before:
            names.append(lora.lora_name)
            answer(engine)
    assert added(engine) == list("012345")
    assert names == ["french", "dutch", "greek", "dutch"]
