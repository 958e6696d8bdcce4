"""An engine core with a frontend's way into it, and the frontends that use it."""

from __future__ import annotations

import dataclasses
import queue
import threading
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tests.fakes.clock import FakeClock
from tests.fakes.courses import make_request
from tests.fakes.engines import make_kv
from vllm_pd_plugin.engine_port import messages
from vllm_pd_plugin.ids import Incarnation, new_incarnation

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import (
        EngineCoreOutput,
        EngineCoreOutputs,
        EngineCoreRequest,
        EngineCoreRequestType,
        FinishReason,
    )
    from vllm.v1.request import RequestStatus
    from vllm.v1.serial_utils import MsgpackEncoder

    from vllm_pd_plugin.engine_port.peer_decoder import PeerDecoder
    from vllm_pd_plugin.engine_port.server import TokenServer, divert_outputs
    from vllm_pd_plugin.engine_port.step_statistics import StepStatistics

MAX_MODEL_LEN, VOCABULARY = 64, 1000
GATE_TIMEOUT_S = 10.0
ADD, ABORT = EngineCoreRequestType.ADD, EngineCoreRequestType.ABORT


def describe(**changes: Any) -> messages.EngineDescription:
    """An engine, with some of what is said of it changed."""
    fields: dict[str, Any] = {
        "engine_id": "engine",
        "role": "decode",
        "model": "model",
        "vllm_version": "0.32.0",
        "control_host": "127.0.0.1",
        "control_port": 7000,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 2048,
        "data_parallel_size": 1,
        "codecs": ("auto", "raw"),
        "vocab_size": 1000,
        "kv": make_kv(),
        "kv_tokens": 10_000,
        "block_tokens": 16,
    }
    return messages.EngineDescription(**fields | changes)


@dataclasses.dataclass(eq=False)
class Scheduled:
    """What is read of a ``vllm.v1.request.Request`` in the scheduler."""

    num_prompt_tokens: int
    num_computed_tokens: int = 0
    status: RequestStatus = RequestStatus.RUNNING
    kv_transfer_params: Any = None
    num_output_tokens: int = 0


class FakeScheduler:
    """What is read of vLLM's."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.counts = (0, 0)
        self.kv_usage = 0.0

    def get_request_counts(self) -> tuple[int, int]:
        return self.counts

    def get_kv_cache_usage(self) -> float:
        return self.kv_usage


class FakeCore:
    """What a token server uses of an engine core.

    prepared: every request that went through ``preprocess_add_request``.
    refusal: what that raises, if anything. grammar: what becomes of a request's.
    gates: requests that it prepares only when these are open, by their ids; at_gate: set when one
        of them waits.
    log_stats: whether it keeps statistics.
    """

    def __init__(self, log_stats: bool = True) -> None:
        self.input_queue: queue.Queue[Any] = queue.Queue()
        self.aborts_queue: queue.Queue[Any] = queue.Queue()
        self.output_queue: queue.Queue[Any] = queue.Queue()
        self.scheduler = FakeScheduler()
        self.log_stats = log_stats
        self.prepared: list[EngineCoreRequest] = []
        self.refusal: Exception | None = None
        self.grammar: Any = None
        self.gates: dict[str, threading.Event] = {}
        self.at_gate = threading.Event()
        model = SimpleNamespace(max_model_len=MAX_MODEL_LEN, get_vocab_size=lambda: VOCABULARY)
        self.vllm_config = SimpleNamespace(model_config=model, lora_config=None)

    def preprocess_add_request(self, request: EngineCoreRequest) -> tuple[EngineCoreRequest, int]:
        if self.refusal is not None:
            raise self.refusal
        if (gate := self.gates.get(request.request_id)) is not None:
            self.at_gate.set()
            assert gate.wait(GATE_TIMEOUT_S)
        self.prepared.append(request)
        assert request.sampling_params is not None
        if request.sampling_params.structured_outputs is None:
            return request, request.current_wave
        waits: Any = SimpleNamespace(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling_params=request.sampling_params,
            lora_request=request.lora_request,
            structured_output_request=SimpleNamespace(grammar=self.grammar),
        )
        return waits, request.current_wave

    def taken(self, kind: EngineCoreRequestType) -> list[Any]:
        """What has come in of a kind; it stays there."""
        return [item for each, item in list(self.input_queue.queue) if each is kind]


class FakeFrontend:
    """One that is attached, or not. received: what the engine has said to it, decoded."""

    def __init__(self, engine: ServingEngine, name: str) -> None:
        self.name = name
        self.identity = name.encode()
        self.incarnation = new_incarnation()
        self.received: list[Any] = []
        self.senders: list[Incarnation] = []
        self.payloads: list[list[bytes]] = []
        self._engine = engine

    def say(
        self,
        message: messages.FromFrontend,
        payload: list[bytes] | None = None,
        target: Incarnation | None = None,
    ) -> None:
        target = self._engine.incarnation if target is None else target
        frames = messages.encode(message, self.incarnation, target, payload)
        self._engine.server.receive(self.identity, frames)
        if not self._engine.core.gates:
            self._engine.settle()

    def attach(self) -> None:
        self.say(messages.Attach(self.name), target=Incarnation(""))

    def add(
        self, request_id: str = "r", request: EngineCoreRequest | None = None, number: int = 0
    ) -> None:
        payload = [bytes(each) for each in MsgpackEncoder().encode(request or make_request())]
        self.say(messages.Add(request_id, number), payload)

    def abort(self, *request_ids: str) -> None:
        self.say(messages.Abort(request_ids))

    def hear(self, frames: list[bytes]) -> None:
        header, message, payload = messages.decode(frames)
        assert header.target in (self.incarnation, "")
        self.senders.append(header.sender)
        self.received.append(message)
        self.payloads.append(payload)

    @property
    def client_index(self) -> int:
        """The index of the last request that it has added."""
        return self._engine.core.prepared[-1].client_index

    def outputs(self) -> list[EngineCoreOutput]:
        """What the engine has given out to it."""
        decoder = PeerDecoder(EngineCoreOutputs)
        return [
            output
            for message, payload in zip(self.received, self.payloads, strict=True)
            if isinstance(message, messages.Outputs)
            for output in decoder.decode(payload).outputs
        ]

    def numbers(self) -> list[int]:
        return [each.number for each in self.received if isinstance(each, messages.Outputs)]


class ServingEngine:
    """A token server with what is around it; its threads wait for each other in ``settle``."""

    def __init__(self, log_stats: bool = True, lora_config: Any = None) -> None:
        self.clock = FakeClock()
        self.core = FakeCore(log_stats)
        self.core.vllm_config.lora_config = lora_config
        self.incarnation = new_incarnation()
        self.frontends: dict[bytes, FakeFrontend] = {}
        self._calls: list[Callable[[], None]] = []
        core: Any = self.core
        self.server = TokenServer(
            core, describe(), self.incarnation, self._calls.append, self._send, self.clock
        )
        divert_outputs(core, self.server, StepStatistics(self.clock))

    def frontend(self, name: str = "frontend") -> FakeFrontend:
        """Another one, which has not attached."""
        frontend = self.frontends[name.encode()] = FakeFrontend(self, name)
        return frontend

    def settle(self) -> None:
        """Let the thread that prepares requests come to rest, and then the control thread."""
        self.server._intake._thread.submit(lambda: None).result()
        while self._calls:
            calls, self._calls[:] = list(self._calls), []
            for call in calls:
                call()

    def told(self) -> list[EngineCoreOutputs]:
        """What has gone to the engine's API server; it is gone then."""
        items = [self.core.output_queue.get() for _ in range(self.core.output_queue.qsize())]
        assert {index for index, _ in items} <= {0}
        return [outputs for _, outputs in items]

    def give(
        self,
        frontend: FakeFrontend,
        *tokens_given: int,
        request_id: str = "r",
        finish: FinishReason | None = None,
        timestamp: float = 0.0,
        **more: Any,
    ) -> None:
        """A step has given something out for a frontend's request."""
        output = EngineCoreOutput(request_id, list(tokens_given), finish_reason=finish, **more)
        outputs = EngineCoreOutputs(outputs=[output], timestamp=timestamp)
        self.core.output_queue.put_nowait((frontend.client_index, outputs))
        self.settle()

    def _send(self, identity: bytes, frames: list[bytes]) -> None:
        self.frontends[identity].hear(frames)


def added(engine: ServingEngine) -> list[str]:
    return [request.request_id for request, _ in engine.core.taken(ADD)]


def aborted(engine: ServingEngine) -> list[list[str]]:
    """What was aborted; the core is told twice, as vLLM does it."""
    told: list[list[str]] = engine.core.taken(ABORT)
    assert list(engine.core.aborts_queue.queue) == told
    return told
