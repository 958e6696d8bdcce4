"""What an engine tells a frontend of its requests: which wait, and whether anything is done."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import msgspec

from tests.fakes.courses import make_request
from vllm_pd_plugin.engine_port import messages

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine import EngineCoreOutputs, UtilityOutput
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.request import RequestStatus

    from tests.fakes.engine_core import FakeFrontend, Scheduled, ServingEngine


def told(frontend: FakeFrontend) -> messages.State:
    frontend.say(messages.Ping())
    state = frontend.received[-1]
    assert isinstance(state, messages.State)
    return state


def test_a_frontend_is_told_which_of_its_requests_wait_no_longer(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    requests = {
        "waits": Scheduled(100, 0, RequestStatus.WAITING),
        "waits for its grammar": Scheduled(
            100, 0, RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        ),
        "is computed": Scheduled(100, 30),
        "reads": Scheduled(100, 0, RequestStatus.WAITING_FOR_REMOTE_KVS),
        "decodes": Scheduled(100, 105, num_output_tokens=6),
        "was put back early": Scheduled(100, 0, RequestStatus.PREEMPTED),
        "was put back": Scheduled(100, 0, RequestStatus.PREEMPTED, num_output_tokens=6),
    }
    for request_id in requests:
        frontend.add(request_id)
    engine.core.scheduler.requests = {**requests, "somebody else's": Scheduled(100, 30)}
    state = told(frontend)
    assert set(state.begun) == {"is computed", "reads"}
    assert state.preempted == ("was put back",)


def test_a_frontend_is_told_that_steps_go_on_whoever_they_are_for(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    assert told(frontend).load.num_steps == 0
    frontend.add("r")
    engine.give(frontend, 50)
    running = SchedulerStats(num_running_reqs=1)
    engine.core.output_queue.put_nowait((0, EngineCoreOutputs(scheduler_stats=running)))
    assert told(frontend).load.num_steps == 2


def test_a_step_that_computes_nothing_is_none(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    frontend.add("r")
    for nothing in (
        (0, EngineCoreOutputs()),
        (0, EngineCoreOutputs(scheduler_stats=SchedulerStats(num_waiting_reqs=3))),
        (0, EngineCoreOutputs(utility_output=UtilityOutput(1))),
        b"dead",
    ):
        engine.core.output_queue.put_nowait(nothing)
    assert told(frontend).load.num_steps == 0


def test_a_frontend_is_told_which_of_its_requests_are_counted(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    assert told(frontend).last_add == 0
    for number in (1, 2, 3, 4):
        frontend.add(f"r{number}", number=number)
    assert told(frontend).last_add == 0
    engine.core.scheduler.requests = {"r1": Scheduled(100, 0), "r2": Scheduled(100, 0)}
    assert told(frontend).last_add == 2
    engine.core.scheduler.requests["r4"] = Scheduled(100, 0)
    assert told(frontend).last_add == 2, "one before it is missing"
    frontend.abort("r3")
    assert told(frontend).last_add == 4


def test_a_frontend_is_told_how_many_there_are(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    assert told(frontend).num_frontends == 1
    engine.frontend("another").attach()
    assert told(frontend).num_frontends == 2


class LoadBefore(msgspec.Struct, frozen=True, array_like=True):
    running: int
    waiting: int
    waiting_tokens: int
    kv_usage: float


class AddBefore(msgspec.Struct, frozen=True, array_like=True, tag="add"):
    request_id: str


class StateBefore(msgspec.Struct, frozen=True, array_like=True, tag="state"):
    load: LoadBefore
    last_outputs: int


def test_a_frontend_of_before_understands_what_an_engine_says_of_its_load() -> None:
    said = messages.State(messages.EngineLoad(1, 2, 3, 0.5, 4), 5, ("begun",), ("preempted",), 7, 2)
    understood = msgspec.msgpack.decode(msgspec.msgpack.encode(said), type=StateBefore)
    assert understood == StateBefore(LoadBefore(1, 2, 3, 0.5), 5)
    before = msgspec.msgpack.encode(understood)
    expected = messages.State(messages.EngineLoad(1, 2, 3, 0.5), 5)
    assert msgspec.msgpack.decode(before, type=messages.State) == expected
    assert (expected.last_add, expected.num_frontends) == (None, 0), "it does not say"


def test_an_engine_of_before_understands_a_request_that_has_a_number() -> None:
    said = msgspec.msgpack.encode(messages.Add("r", 7))
    understood = msgspec.msgpack.decode(said, type=AddBefore)
    assert understood == AddBefore("r")
    before = msgspec.msgpack.encode(understood)
    assert msgspec.msgpack.decode(before, type=messages.Add) == messages.Add("r", 0)


def test_who_waits_for_an_adapter_keeps_no_later_one_from_being_counted() -> None:
    engine = ServingEngine(lora_config=SimpleNamespace(max_cpu_loras=2, max_loras=1))
    frontend = engine.frontend()
    frontend.attach()
    request = make_request("r1")
    request.lora_request = LoRARequest("french", 2_000_001, "/adapters/french")
    frontend.add("r1", request, number=1)
    frontend.add("r2", number=2)
    engine.core.scheduler.requests = {"r2": Scheduled(100, 0)}
    assert told(frontend).last_add == 2
