"""vLLM's own engine client, over a pool of engines in the place of an engine core.

Everything that vLLM's API server does with a request (rendering, checks, detokenising, stop
strings, log-probabilities, ``n``) stays vLLM's own code; only the engine core is replaced.
"""

from __future__ import annotations

import asyncio
import time
from http import HTTPStatus
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.renderers import renderer_from_config
from vllm.tracing import init_tracer
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.metrics.loggers import StatLoggerManager

from vllm_pd_plugin.codecs.codec import AUTO
from vllm_pd_plugin.frontend.dispatch import Dispatch
from vllm_pd_plugin.frontend.requests.course import Course
from vllm_pd_plugin.frontend.requests.endings import Ending
from vllm_pd_plugin.frontend.routing.choice import Policy
from vllm_pd_plugin.frontend.telemetry.metrics import FrontendMetrics, Objectives
from vllm_pd_plugin.frontend.telemetry.tracing import record, spans_of
from vllm_pd_plugin.frontend.underway import Limits, Underway

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from vllm.config import VllmConfig
    from vllm.tasks import SupportedTask

_CLIENT_PARAMS = {"codec"}
"""What a client may say in ``kv_transfer_params``; the rest is between frontend and engines."""
_FLUSH_S = 0.2
"""What is left of answers when the last request has ended is written in this time."""

_ANSWERS = {
    Ending.NO_ENGINE: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        "no engine that could take the request came up in time; try again later",
    ),
    Ending.SHUTDOWN: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        "this frontend is shutting down; try another one",
    ),
    Ending.ATTEMPTS_EXHAUSTED: (
        HTTPStatus.BAD_GATEWAY,
        "several engines failed one after another; try again",
    ),
    Ending.NOT_REPLAYABLE: (
        HTTPStatus.BAD_GATEWAY,
        "the engine was lost, and what it had sampled cannot be sampled again: penalties or "
        "structured output at a temperature above 0 need a seed for that",
    ),
    Ending.REPLAY_DIFFERS: (
        HTTPStatus.BAD_GATEWAY,
        "the engine was lost, and another one sampled something else",
    ),
    Ending.DEADLINE: (HTTPStatus.GATEWAY_TIMEOUT, "the request took longer than is allowed"),
    Ending.UNSENDABLE: (
        HTTPStatus.BAD_REQUEST,
        "the request has a number or a text in it that cannot be sent",
    ),
    Ending.INTERNAL: (HTTPStatus.INTERNAL_SERVER_ERROR, "the frontend failed; see its log"),
}


class PoolError(GracefulHTTPError):
    """A request ended without an answer."""

    def __init__(self, ending: Ending) -> None:
        status, text = _ANSWERS[ending]
        super().__init__(text, status)


class PoolCore(EngineCoreClient):
    """What ``AsyncLLM`` takes for an engine core."""

    engine_ranks_managed = [0]  # noqa: RUF012

    def __init__(self, policy: Policy, limits: Limits, slos: Mapping[str, Objectives]) -> None:
        self.resources = SimpleNamespace(engine_dead=False)
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self.on_failed: Callable[[Course, Ending], None] = lambda course, ending: None
        self.on_over: Callable[[Underway], None] = lambda underway: None
        self.dispatch = Dispatch(
            policy,
            limits,
            FrontendMetrics(slos),
            self._outputs.put_nowait,
            lambda course, ending: self.on_failed(course, ending),
            lambda underway: self.on_over(underway),
        )

    async def get_output_async(self) -> EngineCoreOutputs:
        return await self._outputs.get()

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        if request.mm_features or request.prompt_embeds is not None:
            raise VLLMValidationError("this server takes text only")
        self.dispatch.add(request)

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
        core.on_failed = self._request_failed
        if (endpoint := vllm_config.observability_config.otlp_traces_endpoint) is not None:
            init_tracer("vllm.llm_engine", endpoint)
            core.on_over = self._trace
        self.logger_manager = StatLoggerManager(
            vllm_config=vllm_config, engine_idxs=[0], enable_default_loggers=True
        )
        self._client_count = 1
        self._loop = asyncio.get_running_loop()
        self._is_draining = False
        self.output_handler = None
        self.profiler = None
        self._run_output_handler()

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Refuse a request that cannot be served, while an HTTP status can still say so."""
        if self._is_draining:
            text = "this frontend is shutting down; try another one"
            raise GracefulHTTPError(text, HTTPStatus.SERVICE_UNAVAILABLE)
        super().check_admission(n, request_id)

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> RequestOutputCollector:
        """Check what only a frontend can know of a request, and begin it."""
        arguments = getattr(params, "extra_args", None) or {}
        refuse_transfer_params(arguments, self.dispatch.allowed_codecs())
        return await super().add_request(request_id, prompt, params, *args, **kwargs)

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
        self.renderer.shutdown()

    def __del__(self) -> None:
        """Nothing, where AsyncLLM would shut down a half-made client."""

    def _request_failed(self, course: Course, ending: Ending) -> None:
        """Tell a client that there will be no answer."""
        state = self.output_processor.request_states.get(course.id)
        if state is None:
            return
        if state.queue is not None:
            state.queue.put(PoolError(ending))
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


def refuse_transfer_params(extra_args: Mapping[str, Any], codecs: Collection[str]) -> None:
    """Refuse what a client may not say to the connector.

    codecs: that every engine allows. Raises VLLMValidationError.
    """
    transfer = extra_args.get("kv_transfer_params")
    if transfer is None:
        return
    if not isinstance(transfer, dict) or set(transfer) - _CLIENT_PARAMS:
        text = f"kv_transfer_params may hold {', '.join(_CLIENT_PARAMS)}, and nothing else"
        raise VLLMValidationError(text, parameter="kv_transfer_params")
    if transfer.get("codec", AUTO) not in codecs:
        text = f"codec must be one of {', '.join(sorted(codecs))}"
        raise VLLMValidationError(text, parameter="kv_transfer_params")
