"""Prefill or decode engines for `benchmarks.frontend` that compute nothing.

They speak the control channel's protocol with frontends (``vllm_pd_plugin.engine_port``), and have
HTTP servers that say where that is; several engines behind one server are its data parallel ranks.
Every request is given the same token in every step, until it has as many as it may have: a prefill
engine's has one, as that is all that a frontend asks of it.

    python -m benchmarks.frontend.fake --role decode --ports 8200 --token 13592
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.version import __version__ as VLLM_VERSION

from vllm_pd_plugin.engine_port import messages
from vllm_pd_plugin.frontend.processes.open_files import raise_open_files
from vllm_pd_plugin.ids import Incarnation, RequestId, new_incarnation
from vllm_pd_plugin.memory.identity import KvIdentity, Weights
from vllm_pd_plugin.net.channel import Listener, Loop

MAX_MODEL_LEN = 8192
VOCAB_SIZE = 49_152
"""Of the test models."""


@dataclasses.dataclass(slots=True, eq=False)
class _Frontend:
    """identity: where its messages come from. num_outputs: how many Outputs it has been sent.
    last_add: the number of its last request."""

    incarnation: Incarnation
    identity: bytes
    num_outputs: int = 0
    last_add: int = 0


@dataclasses.dataclass(slots=True, eq=False)
class _Open:
    """A request. left: how many tokens it may still have."""

    id: RequestId
    frontend: _Frontend
    left: int
    num_prompt_tokens: int
    is_fetched: bool
    is_new: bool = True


class CannedEngine:
    """The frontends that are attached, and their requests; owned by the control thread.

    step_s: time between two steps; 0 for as fast as possible. description: set before the start.
    send: sends frames to an identity. on_work: called when there may be something to do.
    """

    def __init__(
        self,
        token: int,
        step_s: float,
        send: Callable[[bytes, list[bytes]], None],
        on_work: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description: messages.EngineDescription
        self._token = token
        self._step_s = step_s
        self._send_frames = send
        self._on_work = on_work
        self._clock = clock
        self._incarnation = new_incarnation()
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreRequest)
        self._frontends: dict[Incarnation, _Frontend] = {}
        self._open: dict[RequestId, _Open] = {}
        self._next_step_at = 0.0

    def receive(self, identity: bytes, frames: list[bytes]) -> None:
        """Handle a message from a frontend."""
        header, message, payload = messages.decode(frames)
        if isinstance(message, messages.Attach):
            self._attach(_Frontend(header.sender, identity))
            return
        frontend = self._frontends.get(header.sender)
        if frontend is None or header.target != self._incarnation:
            self._reply(_Frontend(header.sender, identity), messages.Unknown())
            return
        match message:
            case messages.Add(request_id, number):
                frontend.last_add = number
                self._add(frontend, request_id, payload)
                self._on_work()
            case messages.Abort(request_ids):
                for request_id in request_ids:
                    self._open.pop(request_id, None)
            case messages.Ping():
                self._reply(frontend, self._state(frontend))

    def turn(self) -> float | None:
        """Take a step, if it is time; return in how many seconds the next one is."""
        if not self._open:
            return None
        now = self._clock()
        if now >= self._next_step_at:
            self._step()
            self._next_step_at = max(self._next_step_at + self._step_s, now)
        return max(0.0, self._next_step_at - now) if self._open else None

    def _attach(self, frontend: _Frontend) -> None:
        before = self._frontends.get(frontend.incarnation)
        self._open = {key: each for key, each in self._open.items() if each.frontend is not before}
        self._frontends[frontend.incarnation] = frontend
        self._reply(frontend, messages.Attached(self.description, self._load()))

    def _add(self, frontend: _Frontend, request_id: RequestId, payload: list[bytes]) -> None:
        request = self._decoder.decode(payload)
        params, length = request.sampling_params, len(request.prompt_token_ids)
        transfer = (params.extra_args or {}).get("kv_transfer_params", {})
        is_fetched = bool(transfer.get("do_remote_prefill"))
        self._open[request_id] = _Open(request_id, frontend, params.max_tokens, length, is_fetched)

    def _state(self, frontend: _Frontend) -> messages.State:
        return messages.State(
            self._load(),
            frontend.num_outputs,
            last_add=frontend.last_add,
            num_frontends=len(self._frontends),
        )

    def _load(self) -> messages.EngineLoad:
        return messages.EngineLoad(running=len(self._open))

    def _step(self) -> None:
        by_frontend: dict[Incarnation, list[EngineCoreOutput]] = {}
        for request in list(self._open.values()):
            request.left -= 1
            output = EngineCoreOutput(request.id, [self._token])
            if request.is_new:
                request.is_new = False
                output.events, output.prefill_stats = self._told_once(request)
            if request.left <= 0:
                output.finish_reason = FinishReason.LENGTH
                del self._open[request.id]
            by_frontend.setdefault(request.frontend.incarnation, []).append(output)
        for incarnation, outputs in by_frontend.items():
            frontend = self._frontends[incarnation]
            frontend.num_outputs += 1
            payload = self._encoder.encode(EngineCoreOutputs(outputs=outputs))
            message = messages.Outputs(frontend.num_outputs)
            self._reply(frontend, message, [bytes(buffer) for buffer in payload])

    def _told_once(self, request: _Open) -> tuple[list[EngineCoreEvent], PrefillStats]:
        """Return what comes with the first token of a request."""
        now = time.monotonic()
        kinds = (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED)
        stats = PrefillStats()
        stats.set(request.num_prompt_tokens, 0, request.num_prompt_tokens * request.is_fetched)
        return [EngineCoreEvent.new_event(kind, now) for kind in kinds], stats

    def _reply(
        self, to: _Frontend, message: messages.ToFrontend, payload: list[bytes] | None = None
    ) -> None:
        frames = messages.encode(message, self._incarnation, to.incarnation, payload)
        self._send_frames(to.identity, frames)


class Turns:
    """Lets each of many engines take its steps when they are due; owned by the control thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._engines: list[CannedEngine] = []
        self._due: list[tuple[float, int]] = []
        self._waiting: set[int] = set()

    def add(self, engine: CannedEngine) -> None:
        self._engines.append(engine)

    def wake(self, number: int) -> None:
        """The engine that was added so many before has something to do."""
        if number not in self._waiting:
            self._push(self._clock(), number)

    def turn(self) -> float | None:
        """Take the steps that are due; return in how many seconds the next one is."""
        now = self._clock()
        due: list[int] = []
        while self._due and self._due[0][0] <= now:
            due.append(heapq.heappop(self._due)[1])
        self._waiting.difference_update(due)
        for number in due:
            wait_s = self._engines[number].turn()
            if wait_s is not None:
                self._push(now + wait_s, number)
        return max(0.0, self._due[0][0] - now) if self._due else None

    def _push(self, at: float, number: int) -> None:
        heapq.heappush(self._due, (at, number))
        self._waiting.add(number)


def serve_descriptions(descriptions: Sequence[messages.EngineDescription], port: int) -> None:
    """Answer health checks and frontends, until the process is ended."""
    pages = {"/health": b"", messages.DESCRIPTION_PATH: msgspec.json.encode(descriptions)}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path)
            self.send_response(404 if page is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(page or b"")))
            self.end_headers()
            self.wfile.write(page or b"")

        def log_message(self, *args: Any) -> None:
            """Nothing."""

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


class Engines:
    """Engines of one role in this process, on one control thread. step_s: see ``CannedEngine``."""

    def __init__(self, role: str, model: str, token: int, step_s: float) -> None:
        self._role, self._model, self._token, self._step_s = role, model, token, step_s
        self._turns = Turns()
        self._num_engines = 0
        self.loop = Loop("canned engines", self._turns.turn)

    def make(self, server: int, rank: int, num_ranks: int) -> messages.EngineDescription:
        """Make an engine, before the loop starts; return where it is. server: its HTTP port."""
        number, self._num_engines = self._num_engines, self._num_engines + 1
        engine = CannedEngine(
            self._token,
            self._step_s,
            lambda identity, frames: listener.send(identity, frames),
            lambda: self._turns.wake(number),
        )
        self._turns.add(engine)
        listener = Listener(self.loop, ("127.0.0.1", 0), None, engine.receive)
        engine.description = messages.EngineDescription(
            engine_id=f"canned {self._role} {server}#{rank}",
            role=self._role,
            model=self._model,
            vllm_version=VLLM_VERSION,
            control_host="127.0.0.1",
            control_port=listener.port,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=4096,
            max_num_batched_tokens=MAX_MODEL_LEN,
            data_parallel_size=num_ranks,
            codecs=("auto", "raw"),
            vocab_size=VOCAB_SIZE,
            kv=KvIdentity("", "", Weights("canned"), "", "", "", "", ""),
            kv_tokens=2**24,
            block_tokens=128,
            data_parallel_rank=rank,
        )
        return engine.description


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frontend.fake",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--role", choices=("prefill", "decode"), required=True)
    parser.add_argument(
        "--ports", type=int, nargs="+", required=True, help="of HTTP servers, in the order of use"
    )
    parser.add_argument("--engines", type=int, default=1, help="in all (%(default)s)")
    parser.add_argument("--token", type=int, required=True, help="that every request is given")
    parser.add_argument("--model", default="canned", help="its name (%(default)s)")
    parser.add_argument(
        "--step-ms", type=float, default=0.0, help="time between two steps (%(default)g: none)"
    )
    args = parser.parse_args()
    raise_open_files(args.engines)
    engines = Engines(args.role, args.model, args.token, args.step_ms / 1e3)
    sizes = [len(range(place, args.engines, len(args.ports))) for place in range(len(args.ports))]
    served = [
        [engines.make(port, rank, size) for rank in range(size)]
        for port, size in zip(args.ports, sizes, strict=True)
    ]
    engines.loop.start()
    try:
        for descriptions, port in zip(served[1:], args.ports[1:], strict=True):
            serve = threading.Thread(
                target=serve_descriptions, args=(descriptions, port), daemon=True
            )
            serve.start()
        serve_descriptions(served[0], args.ports[0])
    finally:
        engines.loop.close()


if __name__ == "__main__":
    main()
