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
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager

from vllm_pd_plugin.frontend.course import Course, Ending
from vllm_pd_plugin.frontend.dispatch import Dispatch, Limits
from vllm_pd_plugin.frontend.metrics import FrontendMetrics
from vllm_pd_plugin.frontend.routing import Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vllm.config import VllmConfig
    from vllm.tasks import SupportedTask

_CLIENT_PARAMS = {"codec"}
"""What a client may say in ``kv_transfer_params``; the rest is between frontend and engines."""

_STATUS = {
    Ending.NO_ENGINE: HTTPStatus.SERVICE_UNAVAILABLE,
    Ending.ATTEMPTS_EXHAUSTED: HTTPStatus.BAD_GATEWAY,
    Ending.NOT_REPLAYABLE: HTTPStatus.BAD_GATEWAY,
    Ending.REPLAY_DIFFERS: HTTPStatus.BAD_GATEWAY,
    Ending.DEADLINE: HTTPStatus.GATEWAY_TIMEOUT,
}
_TEXT = {
    Ending.NO_ENGINE: "no engine that could take the request came up in time; try again later",
    Ending.ATTEMPTS_EXHAUSTED: "several engines failed one after another; try again",
    Ending.NOT_REPLAYABLE: "the engine was lost, and what it had sampled cannot be sampled again: "
    "penalties or structured output at a temperature above 0 need a seed for that",
    Ending.REPLAY_DIFFERS: "the engine was lost, and another one sampled something else",
    Ending.DEADLINE: "the request took longer than the frontend allows",
}


class PoolError(GracefulHTTPError):
    """A request ended without an answer."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(_TEXT[ending], _STATUS[ending])


class PoolCore(EngineCoreClient):
    """What ``AsyncLLM`` takes for an engine core."""

    engine_ranks_managed = [0]  # noqa: RUF012

    def __init__(self, policy: Policy, limits: Limits) -> None:
        self.resources = SimpleNamespace(engine_dead=False)
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self.on_failed: Callable[[Course, Ending], None] = lambda course, ending: None
        self.dispatch = Dispatch(
            policy,
            limits,
            FrontendMetrics(),
            self._outputs.put_nowait,
            lambda course, ending: self.on_failed(course, ending),
        )

    async def get_output_async(self) -> EngineCoreOutputs:
        return await self._outputs.get()

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.dispatch.add(request)

    async def abort_requests_async(self, request_ids: Iterable[str]) -> None:
        self.dispatch.abort(request_ids)

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
        self, request_id: str, prompt: Any, params: Any, *args: Any, **kw: Any
    ) -> Any:
        """Check what only a frontend can know of a request, and begin it."""
        transfer = (getattr(params, "extra_args", None) or {}).get("kv_transfer_params")
        if transfer is not None and (
            not isinstance(transfer, dict) or set(transfer) - _CLIENT_PARAMS
        ):
            text = f"kv_transfer_params may hold {', '.join(_CLIENT_PARAMS)}, and nothing else"
            raise VLLMValidationError(text, parameter="kv_transfer_params")
        return await super().add_request(request_id, prompt, params, *args, **kw)

    async def check_health(self) -> None:
        """Raise EngineDeadError while no request could be served."""
        missing = self.dispatch.serves()
        if missing is not None or self._is_draining:
            raise EngineDeadError(f"no request can be served now: {missing or 'shutting down'}")

    def shutdown(self, timeout: float | None = None) -> None:
        """Let what is under way come to its end, for so many seconds; then end it.

        Not from the event loop's own thread, unless timeout is 0 or None.
        """
        self._is_draining = True
        deadline = time.monotonic() + (timeout or 0.0)
        while len(self.dispatch) and time.monotonic() < deadline:
            time.sleep(0.05)
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
