"""How an engine tells a request that is wrong from a fault of its own."""

from __future__ import annotations

import warnings
from typing import Any

import msgspec
import pytest

from tests.fakes.courses import make_request

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    from tests.fakes.engine_core import VOCABULARY, FakeFrontend, Scheduled, ServingEngine, added
    from vllm_pd_plugin.engine_port.refusals import refusal, refusal_of

ERROR = FinishReason.ERROR


def answer(frontend: FakeFrontend) -> EngineCoreOutput:
    (output,) = frontend.outputs()
    assert output.finish_reason is ERROR
    return output


def test_a_refusal_is_told_from_other_errors() -> None:
    assert refusal_of(refusal("r", "too long")) == "too long"
    assert refusal("r", "too long").finish_reason is ERROR
    assert refusal_of(EngineCoreOutput("r", [], finish_reason=ERROR)) is None
    assert refusal_of(EngineCoreOutput("r", [], finish_reason=ERROR, stop_reason=7)) is None
    stopped = EngineCoreOutput("r", [], finish_reason=FinishReason.STOP)
    stopped.stop_reason = refusal("r", "a text that a model wrote").stop_reason
    assert refusal_of(stopped) is None


def test_a_request_that_is_wrong_is_told_why(engine: ServingEngine, frontend: FakeFrontend) -> None:
    frontend.add("r", make_request(prompt=[1, VOCABULARY]))
    assert "tokens that the model does not know" in (refusal_of(answer(frontend)) or "")


def test_what_vllm_says_of_a_request_is_passed_on(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    engine.core.refusal = ValueError("no such backend")
    frontend.add("r")
    assert refusal_of(answer(frontend)) == "no such backend"


@pytest.mark.parametrize("fault", [RuntimeError("out of memory"), KeyError("r"), OSError()])
def test_a_fault_of_the_engine_is_no_refusal(
    engine: ServingEngine, frontend: FakeFrontend, fault: Exception
) -> None:
    engine.core.refusal = fault
    frontend.add("r")
    assert refusal_of(answer(frontend)) is None


def test_an_id_in_use_is_not_the_client_s_fault(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    engine.core.scheduler.requests["r"] = Scheduled(4)
    frontend.add("r")
    assert refusal_of(answer(frontend)) is None


def test_bytes_that_are_no_request_are_not_the_client_s_fault(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    request = msgspec.structs.replace(make_request(), arrival_time="yesterday")
    frontend.add("r", request)
    assert refusal_of(answer(frontend)) is None


@pytest.mark.parametrize("compiles", [True, False])
def test_a_grammar_that_does_not_compile_is_the_request_s_fault(
    engine: ServingEngine, frontend: FakeFrontend, compiles: bool
) -> None:
    """It is found out when the request is in the engine's queue already."""
    grammar: Any = object() if compiles else ValueError("unbalanced brackets")
    engine.core.grammar = grammar
    wanted = make_request(structured_outputs=StructuredOutputsParams(grammar="root ::= ("))
    frontend.add("r", wanted)
    assert added(engine) == ["r"]
    engine.give(frontend, request_id="r", finish=ERROR)
    refused = refusal_of(answer(frontend))
    expected = None if compiles else "the grammar does not compile: unbalanced brackets"
    assert refused == expected
