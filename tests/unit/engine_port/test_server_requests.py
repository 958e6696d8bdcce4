"""An engine's side of frontends, over a fake engine core: requests and their outputs."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import msgspec
import pytest

from tests.fakes.courses import PROMPT, make_request, sampling_of
from vllm_pd_plugin.engine_port import messages

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, FinishReason
    from vllm.v1.metrics.stats import SchedulerStats

    from tests.fakes.engine_core import (
        ABORT,
        ADD,
        GATE_TIMEOUT_S,
        MAX_MODEL_LEN,
        VOCABULARY,
        FakeFrontend,
        Scheduled,
        ServingEngine,
        aborted,
        added,
    )

STOP, ERROR = FinishReason.STOP, FinishReason.ERROR


# --- requests --------------------------------------------------------------------------------


def test_a_request_goes_into_the_core_as_the_frontend_s_own(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    given = make_request("the client's", stop_token_ids=[3])
    given.priority, given.cache_salt = 7, "a tenant's"
    frontend.add("r-1d", given)
    ((request, wave),) = engine.core.taken(ADD)
    assert (request.priority, request.cache_salt) == (7, "a tenant's")
    assert engine.core.prepared == [request]
    assert (request.request_id, wave) == ("r-1d", -1), "of no wave of steps"
    assert request.prompt_token_ids == PROMPT
    assert sampling_of(request).stop_token_ids == [3]
    assert request.client_index >= 1_000_000


def test_an_abort_reaches_the_core_by_both_of_its_queues(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    for request_id in "abc":
        frontend.add(request_id)
    frontend.abort("a", "c")
    assert aborted(engine) == [["a", "c"]]
    kinds = [kind for kind, _ in engine.core.input_queue.queue]
    assert kinds == [ADD, ADD, ADD, ABORT]


def test_an_abort_waits_for_no_request_that_is_being_prepared(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    frontend.add("decoding")
    gate = engine.core.gates["slow"] = threading.Event()
    frontend.add("slow")
    frontend.abort("decoding")
    assert aborted(engine) == [["decoding"]], "though the other one is not prepared yet"
    gate.set()
    engine.settle()
    assert added(engine) == ["decoding", "slow"]


def test_what_is_given_up_while_it_is_prepared_never_comes_into_the_core(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    gate = engine.core.gates["slow"] = threading.Event()
    for request_id in ("slow", "behind it", "wanted"):
        frontend.add(request_id)
    assert engine.core.at_gate.wait(GATE_TIMEOUT_S)
    frontend.abort("slow", "behind it")
    gate.set()
    engine.settle()
    assert added(engine) == ["wanted"]
    assert [request.request_id for request in engine.core.prepared] == ["slow", "wanted"]
    assert aborted(engine) == [], "there is nothing to end"
    assert frontend.outputs() == []


def test_a_request_may_come_again_while_the_one_that_was_given_up_is_prepared(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    gate = engine.core.gates["r"] = threading.Event()
    frontend.add("r", make_request(prompt=[1, 2]))
    frontend.abort("r")
    frontend.add("r", make_request(prompt=[3, 4]))
    gate.set()
    engine.settle()
    ((request, _),) = engine.core.taken(ADD)
    assert request.prompt_token_ids == [3, 4]


def test_an_abort_of_what_is_not_under_way_is_ignored(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    other = engine.frontend("other")
    other.attach()
    other.add("theirs")
    frontend.add("over")
    engine.give(frontend, 50, request_id="over", finish=STOP)
    frontend.add("again")
    frontend.abort("again")
    for request_id in ("over", "theirs", "never", "again"):
        frontend.abort(request_id)
    assert aborted(engine) == [["again"]]


def test_a_request_that_comes_twice_is_added_once(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    frontend.add("r")
    frontend.add("r")
    assert added(engine) == ["r"]
    assert engine.server.dropped_messages == 1


def bad_requests() -> dict[str, EngineCoreRequest]:
    changes: dict[str, dict[str, Any]] = {
        "no prompt": {"prompt_token_ids": None},
        "an empty prompt": {"prompt_token_ids": []},
        "a negative token": {"prompt_token_ids": [1, -1]},
        "a token beyond the vocabulary": {"prompt_token_ids": [1, VOCABULARY]},
        "a prompt that fills the context": {"prompt_token_ids": [1] * MAX_MODEL_LEN},
        "no sampling": {"sampling_params": None},
        "a session": {"resumable": True},
        "one that is to be ended at once": {"abort_immediately": True},
    }
    return {
        name: msgspec.structs.replace(make_request(), **change) for name, change in changes.items()
    }


@pytest.mark.parametrize("name", bad_requests())
def test_a_request_that_the_engine_would_not_survive_is_answered_with_an_error(
    engine: ServingEngine, frontend: FakeFrontend, name: str
) -> None:
    frontend.add("r", bad_requests()[name])
    assert_refused(engine, frontend)


def test_a_request_with_an_id_in_use_is_answered_with_an_error(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    engine.core.scheduler.requests["r"] = Scheduled(4)
    frontend.add("r")
    assert_refused(engine, frontend)


def test_a_request_that_vllm_refuses_is_answered_with_an_error(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    engine.core.refusal = ValueError("no such grammar")
    frontend.add("r")
    assert_refused(engine, frontend)


@pytest.mark.parametrize("payload", [[], [b""], [b"\xc1"], [b"\x80"], [b"\x93\x01\x02\x03"]])
def test_bytes_that_are_no_request_are_answered_with_an_error(
    engine: ServingEngine, frontend: FakeFrontend, payload: list[bytes]
) -> None:
    frontend.say(messages.Add("r"), payload)
    assert_refused(engine, frontend)


def assert_refused(engine: ServingEngine, frontend: FakeFrontend) -> None:
    """The frontend is told, the core is not; and another request does well."""
    (output,) = frontend.outputs()
    assert (output.request_id, output.finish_reason) == ("r", ERROR)
    assert output.new_token_ids == []
    assert frontend.numbers() == [1]
    frontend.abort("r")
    assert engine.core.input_queue.empty()
    assert engine.core.aborts_queue.empty()
    engine.core.refusal = None
    frontend.add("s")
    assert added(engine) == ["s"]


def test_the_longest_prompt_with_the_highest_token_is_served(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    frontend.add("r", make_request(prompt=[0, VOCABULARY - 1] + [1] * (MAX_MODEL_LEN - 3)))
    assert added(engine) == ["r"]


# --- outputs ---------------------------------------------------------------------------------


def test_outputs_are_numbered_for_each_frontend(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    other = engine.frontend("other")
    other.attach()
    frontend.add("r")
    engine.give(frontend, 50)
    engine.give(frontend, 51)
    other.add("s")
    engine.give(other, 60, request_id="s")
    frontend.add("t")
    engine.give(frontend, 52, finish=STOP)
    assert [output.new_token_ids for output in frontend.outputs()] == [[50], [51], [52]]
    assert frontend.outputs()[-1].finish_reason is STOP
    assert frontend.numbers() == [1, 2, 3]
    assert [output.new_token_ids for output in other.outputs()] == [[60]]
    assert other.numbers() == [1]


def test_outputs_of_a_frontend_that_is_gone_go_nowhere(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    frontend.add("r")
    engine.clock.advance(messages.LEASE_S)
    engine.server.turn()
    engine.settle()
    engine.give(frontend, 50)
    assert frontend.received == []


def test_what_is_for_others_stays_in_the_core_s_own_queue(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    items: list[Any] = [
        (0, EngineCoreOutputs(scheduler_stats=SchedulerStats())),
        (3, EngineCoreOutputs()),
        (-1, EngineCoreOutputs()),
        b"ENGINE_CORE_DEAD",
    ]
    for item in items:
        engine.core.output_queue.put_nowait(item)
    engine.settle()
    assert [engine.core.output_queue.get_nowait() for _ in items] == items
    assert items[0][1].scheduler_stats is not None
    assert frontend.received == []


def test_a_step_s_statistics_go_to_the_api_server_whoever_got_them(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    frontend.add("r")
    stats = SchedulerStats(num_running_reqs=3)
    outputs = EngineCoreOutputs(scheduler_stats=stats)
    engine.core.output_queue.put_nowait((frontend.client_index, outputs))
    engine.settle()
    client_index, for_vllm = engine.core.output_queue.get_nowait()
    assert (client_index, for_vllm.scheduler_stats) == (0, stats)
    assert for_vllm.outputs == []
    assert frontend.numbers() == [1]
    assert outputs.scheduler_stats is None


def test_gauges_do_not_wake_the_api_server_at_every_step(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    frontend.add("r")
    for running in (3, 2):
        outputs = EngineCoreOutputs(scheduler_stats=SchedulerStats(running))
        engine.core.output_queue.put_nowait((frontend.client_index, outputs))
    engine.settle()
    assert engine.core.output_queue.qsize() == 1
    assert frontend.numbers() == [1, 2]


def test_without_statistics_the_api_server_is_not_bothered(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    frontend.add("r")
    engine.give(frontend, 50)
    assert engine.core.output_queue.empty()
