"""How busy an engine core is, and with what; read from vLLM's scheduler by another thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from vllm_pd_plugin.engine_port.messages import EngineLoad, State
from vllm_pd_plugin.ids import RequestId

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

_BEGUN = (RequestStatus.RUNNING, RequestStatus.WAITING_FOR_REMOTE_KVS)
_MOST_NAMED = 1024
"""Of requests in one message; more are never computed at once."""


def load_of(scheduler: Scheduler, num_steps: int) -> EngineLoad:
    """Return how busy an engine is. num_steps: that have given something out so far."""
    running, waiting = scheduler.get_request_counts()
    requests: list[Any] = list(scheduler.requests.values())
    return EngineLoad(
        running,
        waiting,
        sum(_tokens_to_compute(request) for request in requests),
        scheduler.get_kv_cache_usage(),
        num_steps,
    )


def state_of(
    scheduler: Scheduler,
    num_steps: int,
    last_outputs: int,
    open_requests: Mapping[RequestId, int],
    last_add: int = 0,
    num_frontends: int = 0,
) -> State:
    """Return what a frontend is told that has these requests under way.

    open_requests: by the number of each Add. last_add: the number of the last that has come.
    """
    begun: list[RequestId] = []
    preempted: list[RequestId] = []
    for request_id, number in open_requests.items():
        request: Any = scheduler.requests.get(request_id)
        if request is None:
            # It is prepared yet, or waits for the next step; or it has just ended.
            last_add = min(last_add, max(0, number - 1))
            continue
        if request.num_output_tokens == 0 and request.status in _BEGUN:
            begun.append(request_id)
        elif request.num_output_tokens and request.status == RequestStatus.PREEMPTED:
            preempted.append(request_id)
    return State(
        load_of(scheduler, num_steps),
        last_outputs,
        tuple(begun[:_MOST_NAMED]),
        tuple(preempted[:_MOST_NAMED]),
        last_add,
        num_frontends,
    )


def _tokens_to_compute(request: Any) -> int:
    """Return how much of its prompt a request has yet to compute on this engine."""
    params = request.kv_transfer_params
    fetches = request.status == RequestStatus.WAITING_FOR_REMOTE_KVS or (
        isinstance(params, dict)
        and params.get("do_remote_prefill")
        and request.num_computed_tokens == 0
    )
    return 0 if fetches else max(0, request.num_prompt_tokens - request.num_computed_tokens)
