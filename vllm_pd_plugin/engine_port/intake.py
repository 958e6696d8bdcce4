"""The way of a frontend's request into the engine core, and its end there.

Here is done what vLLM's input thread does for its own API servers: a request is decoded, checked,
made ready (a grammar for structured output, block hashes) and put into the core's queue. Client
input must never end the engine: whatever is wrong with a request ends that request only.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
)

from vllm_pd_plugin.engine_port import messages
from vllm_pd_plugin.engine_port.adapters import Adapters
from vllm_pd_plugin.engine_port.attached import Entry
from vllm_pd_plugin.engine_port.peer_decoder import PeerDecoder
from vllm_pd_plugin.engine_port.refusals import RefusedError, check, refusal
from vllm_pd_plugin.ids import RequestId

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine import UtilityOutput
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


class Intake:
    """Owned by the control thread, with a thread of its own to make requests ready.

    loader_index: the client index of this package, when it has the core load adapters.
    call: runs a function on the control thread.
    began: takes what goes into the core, with when it came (``time.time``); on the control thread.
    refused: takes the client index and the output of a request that does not; on either thread.
    """

    def __init__(
        self,
        core: EngineCoreProc,
        loader_index: int,
        call: Callable[[Callable[[], None]], None],
        began: Callable[[int, Request, float], None],
        refused: Callable[[int, EngineCoreOutput], None],
    ) -> None:
        self._core = core
        self._loader_index = loader_index
        self._call = call
        self._began = began
        self._refused = refused
        self._decoder = PeerDecoder(EngineCoreRequest)
        self._thread = ThreadPoolExecutor(1, "pd-prepare")
        self._lock = threading.Lock()
        lora = core.vllm_config.lora_config
        most = (lora.max_cpu_loras or lora.max_loras) if lora is not None else 0
        self._adapters = Adapters(self._load_adapter, most)

    def add(
        self, client_index: int, request_id: RequestId, entry: Entry, payload: list[bytes]
    ) -> None:
        """A request has come."""
        arrived_at = time.time()
        self._thread.submit(self._prepare, client_index, request_id, entry, payload, arrived_at)

    def give_up(self, entries: Mapping[RequestId, Entry]) -> None:
        """Nobody wants these any more. That waits for no request that is made ready."""
        with self._lock:  # either its ADD is in the queue, or it never comes there
            for entry in entries.values():
                entry.is_given_up = True
            begun = [each for each, entry in entries.items() if entry.is_in_core]
        if begun:
            # As vLLM's own input thread does: one queue is read in a step, the other keeps order.
            self._core.aborts_queue.put_nowait(begun)
            self._core.input_queue.put_nowait((EngineCoreRequestType.ABORT, begun))

    def adapter_loaded(self, output: UtilityOutput) -> None:
        """The core has loaded an adapter, or says why not."""
        self._adapters.answered(output)

    def close(self) -> None:
        """Stop the thread; nothing more is added."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _prepare(
        self,
        client_index: int,
        request_id: RequestId,
        entry: Entry,
        payload: list[bytes],
        arrived_at: float,
    ) -> None:
        """On the thread for that."""
        if entry.is_given_up:
            return
        try:
            prepared = self._prepared(client_index, request_id, payload)
        except RefusedError as error:
            logger.warning("request %s is refused: %s", request_id, error)
            self._refused(client_index, refusal(request_id, str(error)))
        except Exception:
            logger.exception("request %s cannot be prepared", request_id)
            output = EngineCoreOutput(request_id, [], finish_reason=FinishReason.ERROR)
            self._refused(client_index, output)
        else:
            begin = functools.partial(self._begin, client_index, entry, prepared, arrived_at)
            if (lora := prepared[0].lora_request) is None:
                begin()
            else:
                entry.needs_adapter = True
                self._call(lambda: self._adapters.need(lora, begin))

    def _prepared(
        self, client_index: int, request_id: RequestId, payload: list[bytes]
    ) -> tuple[Request, int]:
        """Return what goes into the core. Raises RefusedError, and whatever else may happen."""
        request = self._decoder.decode(payload)
        request.request_id, request.client_index = request_id, client_index
        # Data parallel ranks of a mixture of experts step together, or all pause. vLLM's own
        # clients wake the others; a request of no wave of steps lets this rank do it.
        request.current_wave = -1
        if request_id in self._core.scheduler.requests:
            raise messages.FrontendError(f"the id {request_id} is in use")
        check(request, self._core.vllm_config)
        try:
            prepared: tuple[Request, int] = self._core.preprocess_add_request(request)
        except ValueError as error:  # so vLLM says that a request is wrong
            raise RefusedError(str(error)) from error
        return prepared

    def _begin(
        self,
        client_index: int,
        entry: Entry,
        prepared: tuple[Request, int],
        arrived_at: float,
        problem: str = "",
    ) -> None:
        """Give a request to the core, unless it was given up; or refuse it, if its LoRA adapter is
        a problem."""
        with self._lock:
            entry.needs_adapter = False
            if entry.is_given_up:
                return
            if not problem:
                entry.is_in_core = True
                self._call(lambda: self._began(client_index, prepared[0], arrived_at))
                self._core.input_queue.put_nowait((EngineCoreRequestType.ADD, prepared))
                return
        text = f"its LoRA adapter cannot be loaded: {problem}"
        self._refused(client_index, refusal(prepared[0].request_id, text))

    def _load_adapter(self, call: int, lora: LoRARequest) -> None:
        request = (self._loader_index, call, "add_lora", (lora,))
        self._core.input_queue.put_nowait((EngineCoreRequestType.UTILITY, request))
