"""Requests of frontends for a mixture of experts, whose data parallel ranks step together."""

from __future__ import annotations

import queue
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.engine.core import DPEngineCoreProc
    from vllm.v1.request import Request

    from tests.fakes.engine_core import ADD, ServingEngine


def prepared_request() -> Any:
    """Return what a frontend's request is to the engine's own thread."""
    engine = ServingEngine()
    frontend = engine.frontend()
    frontend.attach()
    frontend.add("r")
    engine.settle()
    ((request, wave),) = engine.core.taken(ADD)
    return Request.from_engine_core_request(request, None), wave


def rank_of(wave: int, is_running: bool) -> Any:
    """Return vLLM's engine core of one rank, in this wave of steps."""
    core: Any = DPEngineCoreProc.__new__(DPEngineCoreProc)
    vars(core).update(
        has_coordinator=True,
        current_wave=wave,
        engines_running=is_running,
        output_queue=queue.Queue(),
        scheduler=SimpleNamespace(
            add_request=lambda request: None,
            pause_state=PauseState.UNPAUSED,
            get_kv_connector=lambda: None,
            get_ec_connector=lambda: None,
        ),
    )
    return core


@pytest.mark.parametrize("wave", [0, 7])
def test_a_request_wakes_the_ranks_that_pause(wave: int) -> None:
    """The first one also: there, vLLM's own client would have told the coordinator."""
    request, of = prepared_request()
    core = rank_of(wave, is_running=False)
    core.add_request(request, of)
    to, outputs = core.output_queue.get_nowait()
    assert (to, outputs.start_wave) == (-1, wave)
    assert core.engines_running
    assert core.current_wave == wave


def test_ranks_that_step_are_not_woken() -> None:
    request, of = prepared_request()
    core = rank_of(3, is_running=True)
    core.add_request(request, of)
    assert core.output_queue.empty()
    assert core.current_wave == 3
