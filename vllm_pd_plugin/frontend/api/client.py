"""vLLM's own engine client, over a pool of engines in the place of an engine core.

Everything that vLLM's API server does with a request (rendering, checks, detokenising, stop
strings, log-probabilities, ``n``) stays vLLM's own code; only the engine core is replaced.
"""

from __future__ import annotations

import asyncio
import logging
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm.exceptions import (
    MaxQueuedTokensError,
    QueueOverflowError,
    VLLMValidationError,
)
from vllm.renderers import renderer_from_config
from vllm.tracing import init_tracer
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from vllm_pd_plugin.frontend.admission import Refusal, TurnedAway
from vllm_pd_plugin.frontend.api.adapters import number_adapter, refuse_without_lora
from vllm_pd_plugin.frontend.api.patience import MOST_UNREAD, unread
from vllm_pd_plugin.frontend.api.pool_series import load_of, make_loggers
from vllm_pd_plugin.frontend.api.refusals import PoolError, refusal, refuse_transfer_params
from vllm_pd_plugin.frontend.api.served import note
from vllm_pd_plugin.frontend.dispatch import Dispatch
from vllm_pd_plugin.frontend.requests.context import current
from vllm_pd_plugin.frontend.requests.course import Course
from vllm_pd_plugin.frontend.requests.endings import Ending
from vllm_pd_plugin.frontend.routing.choice import Policy
from vllm_pd_plugin.frontend.telemetry.metrics import FrontendMetrics, MetricKinds
from vllm_pd_plugin.frontend.telemetry.outcomes import Objectives, current_request
from vllm_pd_plugin.frontend.telemetry.tracing import record, spans_of
from vllm_pd_plugin.frontend.underway import Limits, Underway
from vllm_pd_plugin.ids import new_incarnation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.tasks import SupportedTask

logger = logging.getLogger(__name__)

_LOOK_S = 0.5
"""How often it is looked what the pool's load is, which engines tell no more often, and what
clients do not read."""
_FLUSH_S = 0.2
"""What is left of answers when the last request has ended is written in this time."""


class PoolCore(EngineCoreClient):
    """What ``AsyncLLM`` takes for an engine core."""

    engine_ranks_managed = [0]  # noqa: RUF012

    def __init__(
        self,
        policy: Policy,
        limits: Limits,
        slos: Mapping[str, Objectives],
        kinds: MetricKinds | None = None,
    ) -> None:
        """kinds: what makes series; by default Prometheus' own."""
        self.kinds = kinds or MetricKinds()
        self.resources = SimpleNamespace(engine_dead=False)
        self._outputs: asyncio.Queue[tuple[float, EngineCoreOutputs]] = asyncio.Queue()
        self._waited_s = 0.0
        self.on_failed: Callable[[Course, Ending], None] = lambda course, ending: None
        self.on_over: Callable[[Underway], None] = lambda underway: None
        self.dispatch = Dispatch(
            policy,
            limits,
            FrontendMetrics(slos, self.kinds),
            self._put,
            lambda course, ending: self.on_failed(course, ending),
            lambda underway: self.on_over(underway),
            new_incarnation(),
        )
        self.dispatch.lag.watch(self._behind_s)

    def _put(self, outputs: EngineCoreOutputs) -> None:
        self._outputs.put_nowait((self.dispatch.now(), outputs))

    async def get_output_async(self) -> EngineCoreOutputs:
        """Return what the engines give out; for vLLM's output handler, the only one that asks.

        It takes outputs as they come, but lets others have their turn within those of a large step:
        when it cannot keep up, they pile up here. None is dropped; new requests are turned away.
        """
        put_at, outputs = await self._outputs.get()
        self._waited_s = self.dispatch.now() - put_at
        return outputs

    def _behind_s(self) -> float:
        """Return how late the output handler is, while it has something to do."""
        return 0.0 if self._outputs.empty() else self._waited_s

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        if request.mm_features or request.prompt_embeds is not None:
            raise VLLMValidationError("this server takes text only")
        self.dispatch.add(request)
        note(self.dispatch.underway(request.request_id))

    async def abort_requests_async(self, request_ids: Iterable[str]) -> None:
        """End requests that have come to a stop string, which only this process looks for."""
        self.dispatch.stop(request_ids)

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing to do: ``PoolLLM`` closes the dispatch."""


class PoolLLM(AsyncLLM):
    """An ``EngineClient`` whose engine is a pool of engines."""

    def __init__(self, vllm_config: VllmConfig, core: PoolCore, log_requests: bool) -> None:
        # Not AsyncLLM's own, which starts an engine core: what it sets otherwise is set here.
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.scheduler_config = vllm_config.scheduler_config
        self.observability_config = vllm_config.observability_config
        self.log_requests = log_requests
        self.log_stats = True
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self.admission_stats = None
        self.output_processor = OutputProcessor(
            self.renderer.tokenizer,
            log_stats=True,
            stream_interval=vllm_config.scheduler_config.stream_interval,
            tracing_enabled=vllm_config.observability_config.otlp_traces_endpoint is not None,
        )
        self.engine_core = core
        self.dispatch = core.dispatch
        limits = vllm_config.scheduler_config
        self.dispatch.gate.has_limit = limits.max_num_queued_reqs is not None
        core.on_failed = self._request_failed
        if (endpoint := vllm_config.observability_config.otlp_traces_endpoint) is not None:
            init_tracer("vllm.llm_engine", endpoint)
            core.on_over = self._trace
        self.logger_manager = make_loggers(vllm_config, core.kinds)
        self._client_count = 1
        self._loop = asyncio.get_running_loop()
        self._is_draining = False
        self.output_handler = None
        self.profiler = None
        self._run_output_handler()
        self._looker = self._loop.create_task(self._look(), name="look")

    async def _look(self) -> None:
        """Look after both again and again; one wake-up for them all, as each costs."""
        while True:
            for what, look in (
                ("the engines' load", self._tell_load), ("what is unread", self._end_unread),
            ):  # fmt: skip
                try:
                    look()
                except Exception:
                    logger.exception("unexpected error with %s", what)
            await asyncio.sleep(_LOOK_S)

    def _tell_load(self) -> None:
        """Tell vLLM's loggers how busy the engines are, as an engine core would with its steps."""
        self.logger_manager.record(load_of(self.dispatch.pool), None)

    def _end_unread(self) -> None:
        """End what clients read so slowly that too much of it waits for them."""
        vocabulary = self.model_config.get_vocab_size()
        for request_id, amount in list(unread(self.output_processor, vocabulary)):
            if amount > MOST_UNREAD and (underway := self.dispatch.underway(request_id)):
                underway.course.give_up(Ending.UNREAD)

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Refuse a request that cannot be served, while an HTTP status can still say so.

        vLLM asks before it answers anything, without a request_id, and again for each request that
        begins: what was let in then has room now.
        """
        context, begins = current(), request_id is not None
        siblings = current_request().siblings
        if siblings.is_going_on:
            return  # it was let in
        if begins and context.room is not None and context.room.take(n):
            if siblings.are_beams:
                context.give_back()  # its beams are steps of one answer
            return
        slo_class = self.dispatch.metrics.slo_class(context.slo_class)
        if (turned_away := self._turn_away(n, request_id)) is not None:
            context.retry_after_s = turned_away.retry_after_s
            self.dispatch.metrics.refused(slo_class, turned_away.why)
            raise refusal(turned_away.why)
        if not begins and context.has_end:
            gate = self.dispatch.gate
            context.give_back()
            context.room = gate.reserve(gate.tenant(slo_class, context.key), n)

    def _turn_away(self, num_new: int, request_id: str | None) -> TurnedAway | None:
        if self._is_draining:
            return TurnedAway(Refusal.STOPPING)
        num_coming = num_new + self.dispatch.gate.num_reserved  # vLLM counts those that have begun
        try:
            super().check_admission(num_coming, request_id)
        except (QueueOverflowError, MaxQueuedTokensError):  # the operator's own bounds
            return TurnedAway(Refusal.OVERLOADED)
        return self.dispatch.refuse(num_new)

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> RequestOutputCollector:
        """Check what only a frontend can know of a request, and begin it."""
        arguments = getattr(params, "extra_args", None) or {}
        refuse_transfer_params(arguments, self.dispatch.pool.allowed_codecs)
        if kwargs.get("lora_request") is not None:
            refuse_without_lora(self.dispatch.pool)
        with self.dispatch.metrics.one_request():
            return await super().add_request(request_id, prompt, params, *args, **kwargs)

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Let requests name an adapter; engines load it when one does."""
        refuse_without_lora(self.dispatch.pool)
        number_adapter(lora_request)
        return True

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """End requests whose clients have gone."""
        given = (request_id,) if isinstance(request_id, str) else list(request_id)
        self.dispatch.abort(self.output_processor.abort_requests(given, internal))

    async def _add_request(self, request: EngineCoreRequest, *args: Any, **kwargs: Any) -> None:
        params, prompt = request.sampling_params, request.prompt_token_ids
        if params is not None and params.max_tokens is not None and prompt is not None:
            room = self.model_config.max_model_len - len(prompt)
            params.max_tokens = max(1, min(params.max_tokens, room))
        try:
            await super()._add_request(request, *args, **kwargs)
        except BaseException:
            self.output_processor.abort_requests([request.request_id], internal=True)
            raise

    async def check_health(self) -> None:
        """Raise EngineDeadError while no request could be served."""
        missing = self.dispatch.serves()
        if missing is not None or self._is_draining:
            raise EngineDeadError(f"no request can be served now: {missing or 'shutting down'}")

    def shutdown(self, timeout: float | None = None) -> None:
        """Let what is under way come to its end, for so many seconds; then end it.

        Not from the event loop's own thread.
        """
        self._is_draining = True
        deadline = time.monotonic() + (timeout or 0.0)
        while self.get_num_unfinished_requests() and time.monotonic() < deadline:
            time.sleep(0.05)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.dispatch.give_up, Ending.SHUTDOWN)
        time.sleep(_FLUSH_S)
        if self.output_handler is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.output_handler.cancel)
            self._loop.call_soon_threadsafe(self._looker.cancel)
        self.renderer.shutdown()

    def __del__(self) -> None:
        """Nothing, where AsyncLLM would shut down a half-made client."""

    def _request_failed(self, course: Course, ending: Ending) -> None:
        """Tell a client that there will be no answer."""
        state = self.output_processor.request_states.get(course.id)
        if state is None:
            return
        if state.queue is not None:
            state.queue.put(PoolError(ending, course.refusal))
        parent = state.parent_req
        whole = parent.request_id if parent is not None else course.id
        ended = self.output_processor.abort_requests([whole], internal=True)
        self.dispatch.abort(ended)

    def _trace(self, underway: Underway) -> None:
        """Tell the trace collector how a request went."""
        request, route = underway.course.request, underway.course.route
        now = self._loop.time()
        attributes: dict[str, str | int] = {
            "gen_ai.request.id": request.external_req_id or request.request_id,
            "pd.attempts": underway.course.attempt,
        }
        if route is not None:
            attributes |= {
                "pd.route": route.reason.value,
                "pd.prefill_engine": route.prefill or route.decode,
                "pd.decode_engine": route.decode,
            }
        spans = spans_of(underway.marks, underway.timeline.first_at, now)
        record(spans, now, attributes, request.trace_headers)
