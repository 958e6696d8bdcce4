"""What the requests of frontends add to an engine's own metrics.

vLLM counts tokens, latencies and requests that have ended in its API server, where all outputs come
through. Those for frontends do not. They are counted here, beside the engine core, by the code that
vLLM has for it, and told to the API server a few times a second, whose loggers take them as if they
were its own. A request has come through the API server or from a frontend, and never both ways, so
none is counted twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.stats import (
    FinishedRequestStats,
    IterationStats,
    LoRARequestStates,
    PromptTokenStats,
    RequestStateStats,
    SchedulerStats,
)

from vllm_pd_plugin.ids import RequestId

_EVERY_S = 0.25
_SAME_STEP_S = 0.001
"""A step gives out for each frontend by itself, at almost the same moment."""
_KEY = "pd_frontend_requests"


@dataclasses.dataclass(slots=True, eq=False)
class _Open:
    """A request, until its last output. stats: what vLLM keeps of it."""

    num_prompt_tokens: int
    max_tokens: int | None
    stats: RequestStateStats
    is_prefilling: bool = True
    num_cached_tokens: int = 0


class RequestStatistics:
    """Owned by the control thread.

    tell: takes what is for the API server. clock: in seconds, of any origin.
    """

    def __init__(self, tell: Callable[[SchedulerStats], None], clock: Callable[[], float]) -> None:
        self._tell = tell
        self._clock = clock
        self._open: dict[RequestId, _Open] = {}
        self._steps: list[IterationStats] = []
        self._step_at = 0.0
        self._due_at = 0.0
        self._loras = LoRARequestStates()

    def __len__(self) -> int:
        return len(self._open)

    def began(
        self,
        request_id: RequestId,
        arrived_at: float,
        prompt: Sequence[int],
        params: SamplingParams,
    ) -> None:
        """A request goes to the engine. arrived_at: when it came, as ``time.time`` tells it."""
        stats = RequestStateStats(arrival_time=arrived_at)
        self._open[request_id] = _Open(len(prompt), params.max_tokens, stats)

    def dropped(self, request_ids: Iterable[RequestId]) -> None:
        """Nobody wants these any more: what still comes of them is not counted."""
        for request_id in request_ids:
            self._open.pop(request_id, None)

    def gave_out(self, outputs: EngineCoreOutputs) -> None:
        """A step gave something out for a frontend."""
        for output in outputs.outputs:
            if (request := self._open.get(output.request_id)) is not None:
                self._take(request, output, outputs.timestamp)

    def turn(self) -> float | None:
        """Tell what is to be told; return when to look again."""
        if not self._steps:
            return None
        now = self._clock()
        if now < self._due_at:
            return self._due_at
        steps, self._steps = self._steps, []
        self._due_at = now + _EVERY_S
        self._tell(_carry(steps))
        return None

    def _take(self, request: _Open, output: EngineCoreOutput, at: float) -> None:
        """Do what vLLM's ``OutputProcessor`` does for its own requests."""
        step = self._step(at)
        step.update_from_output(output, at, request.is_prefilling, request.stats, self._loras, None)
        if request.is_prefilling and output.prefill_stats is not None:
            request.num_cached_tokens = output.prefill_stats.num_cached_tokens
        request.is_prefilling = False
        if output.finish_reason is None:
            return
        del self._open[output.request_id]
        step.update_from_finished_request(
            output.finish_reason,
            output.request_id,
            request.num_prompt_tokens,
            request.max_tokens,
            request.stats,
            request.num_cached_tokens,
        )
        ParentRequest.observe_finished_request(None, step, request.stats.num_generation_tokens)

    def _step(self, at: float) -> IterationStats:
        if not self._steps or at - self._step_at > _SAME_STEP_S:
            self._steps.append(IterationStats())
            self._step_at = at
        return self._steps[-1]


def _carry(steps: Sequence[IterationStats]) -> SchedulerStats:
    """Write steps down in what an engine core tells its API server, which takes them out of it
    again: see ``carried``."""
    return SchedulerStats(kv_connector_stats={_KEY: [vars(step) for step in steps]})


def carried(stats: SchedulerStats | None) -> list[IterationStats] | None:
    """Return the steps of frontends' requests in it; None if it is what a scheduler has told."""
    told = None if stats is None else (stats.kv_connector_stats or {}).get(_KEY)
    return None if told is None else [_restored(each) for each in told]


def _restored(told: dict[str, Any]) -> IterationStats:
    """Undo what the way between two processes does to types."""
    step = IterationStats()
    prompts = told.pop("prompt_token_stats")
    prompts.pop("ALL_SOURCES", None)  # vLLM has declared it as a field
    finished = told.pop("finished_requests")
    vars(step).update(
        told,
        prompt_token_stats=PromptTokenStats(**prompts),
        finished_requests=[
            FinishedRequestStats(**{**each, "finish_reason": FinishReason(each["finish_reason"])})
            for each in finished
        ],
    )
    return step
