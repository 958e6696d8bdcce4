"""A prefill or decode engine for `benchmarks.frontend` that computes nothing.

It speaks the control channel's protocol with frontends (``vllm_pd_plugin.tokens``), and has an HTTP
server that says where that is. Every request is given the same token in every step, until it has as
many as it may have: a prefill engine's has one, as that is all that a frontend asks of it.

    python -m benchmarks.frontend.fake --role decode --port 8200 --token 13592
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
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
from vllm_pd_plugin.ids import Incarnation, RequestId, new_incarnation
from vllm_pd_plugin.memory.identity import KvIdentity, Weights
from vllm_pd_plugin.net.channel import Listener, Loop

MAX_MODEL_LEN = 8192
VOCAB_SIZE = 49_152
"""Of the test models."""


@dataclasses.dataclass(slots=True, eq=False)
class _Frontend:
    """identity: where its messages come from. num_outputs: how many Outputs it has been sent."""

    incarnation: Incarnation
    identity: bytes
    num_outputs: int = 0


@dataclasses.dataclass(slots=True, eq=False)
class _Open:
    """A request. left: how many tokens it may still have."""

    id: RequestId
    frontend: _Frontend
    left: int
    num_prompt_tokens: int
    is_new: bool = True


class CannedEngine:
    """The frontends that are attached, and their requests; owned by the control thread.

    step_s: time between two steps; 0 for as fast as possible. description: set before the start.
    send: sends frames to an identity.
    """

    def __init__(
        self,
        token: int,
        step_s: float,
        send: Callable[[bytes, list[bytes]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description: messages.EngineDescription
        self._token = token
        self._step_s = step_s
        self._send_frames = send
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
            case messages.Add(request_id):
                self._add(frontend, request_id, payload)
            case messages.Abort(request_ids):
                for request_id in request_ids:
                    self._open.pop(request_id, None)
            case messages.Ping():
                self._reply(frontend, messages.State(self._load(), frontend.num_outputs))

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
        left, length = request.sampling_params.max_tokens, len(request.prompt_token_ids)
        self._open[request_id] = _Open(request_id, frontend, left, length)

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
        stats.set(request.num_prompt_tokens, 0, 0)
        return [EngineCoreEvent.new_event(kind, now) for kind in kinds], stats

    def _reply(
        self, to: _Frontend, message: messages.ToFrontend, payload: list[bytes] | None = None
    ) -> None:
        frames = messages.encode(message, self._incarnation, to.incarnation, payload)
        self._send_frames(to.identity, frames)


def serve_description(description: messages.EngineDescription, port: int) -> None:
    """Answer health checks and frontends, until the process is ended."""
    pages = {"/health": b"", messages.DESCRIPTION_PATH: msgspec.json.encode([description])}

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


def start_engine(
    role: str, model: str, token: int, step_s: float
) -> tuple[Loop, messages.EngineDescription]:
    """Start the control thread; its loop is to be closed at the end."""
    engine = CannedEngine(token, step_s, lambda identity, frames: listener.send(identity, frames))
    loop = Loop("canned engine", engine.turn)
    listener = Listener(loop, ("127.0.0.1", 0), None, engine.receive)
    engine.description = messages.EngineDescription(
        engine_id=f"canned {role}",
        role=role,
        model=model,
        vllm_version=VLLM_VERSION,
        control_host="127.0.0.1",
        control_port=listener.port,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=4096,
        max_num_batched_tokens=MAX_MODEL_LEN,
        data_parallel_size=1,
        codecs=("auto", "raw"),
        vocab_size=VOCAB_SIZE,
        kv=KvIdentity("", "", Weights("canned"), "", "", "", "", ""),
        kv_tokens=2**24,
        block_tokens=128,
    )
    loop.start()
    return loop, engine.description


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frontend.fake",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--role", choices=("prefill", "decode"), required=True)
    parser.add_argument("--port", type=int, required=True, help="of HTTP")
    parser.add_argument("--token", type=int, required=True, help="that every request is given")
    parser.add_argument("--model", default="canned", help="its name (%(default)s)")
    parser.add_argument(
        "--step-ms", type=float, default=0.0, help="time between two steps (%(default)g: none)"
    )
    args = parser.parse_args()
    loop, description = start_engine(args.role, args.model, args.token, args.step_ms / 1e3)
    try:
        serve_description(description, args.port)
    finally:
        loop.close()


if __name__ == "__main__":
    main()
