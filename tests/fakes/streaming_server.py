"""vLLM's engine client over a pool of fake engines, and a real server and real clients of it.

What vLLM renders a request with is left out: a request begins with its tokens, and a stream gives
out the numbers of tokens that it has got at a time.
"""

from __future__ import annotations

import asyncio
import socket
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from tests.fakes.courses import make_request

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

    from tests.fakes.links import FakeLink, link_of, make_member, output_of, outputs_of
    from vllm_pd_plugin.engine_port.messages import EngineLoad
    from vllm_pd_plugin.frontend.api.client import PoolCore, PoolLLM
    from vllm_pd_plugin.frontend.api.patience import impatient
    from vllm_pd_plugin.frontend.routing.choice import Policy, Role
    from vllm_pd_plugin.frontend.underway import Limits

SMALL = 4096
"""Of the buffers of sockets; the kernel takes some times that."""


class Client(PoolLLM):
    """One without a model, over one engine that decodes and does nothing by itself."""

    def __init__(self) -> None:
        core = PoolCore(Policy(local_below=0), Limits(), {})
        self.engine_core: Any = core
        self.dispatch = core.dispatch
        self.output_processor = OutputProcessor(None, log_stats=False)
        self.log_requests = self.log_stats = self._is_draining = False
        self.output_handler = None
        self.logger_manager: Any = None
        self.renderer: Any = SimpleNamespace(mm_processor_cache=None)
        self.scheduler_config: Any = SimpleNamespace(
            max_num_queued_reqs=None, max_num_queued_tokens=None
        )
        self.model_config: Any = SimpleNamespace(max_model_len=10**9, get_vocab_size=lambda: 1000)
        core.on_failed = self._request_failed
        self._run_output_handler()

    def engine(self) -> FakeLink:
        """An engine comes up, with room for everything."""
        member = make_member("d", Role.DECODE, max_num_seqs=10_000)
        self.dispatch.pool.add(member)
        self.dispatch.attached(member.link, EngineLoad())
        return link_of(member)

    def give(self, link: FakeLink, *tokens: int) -> None:
        """A step of the engine gives something to all that it was sent."""
        there: Any = link
        outputs = [output_of(leg, *tokens) for leg in link.sent]
        self.dispatch.gave_out(there, outputs_of(*outputs))

    async def begin(self, request_id: str, **sampling: Any) -> RequestOutputCollector:
        """Begin a stream; what comes of it waits in the collector."""
        collector = RequestOutputCollector(RequestOutputKind.DELTA, request_id)
        request = make_request(
            request_id, max_tokens=10**6, output_kind=RequestOutputKind.DELTA, **sampling
        )
        await self._add_request(request, None, None, 0, collector)
        return collector

    async def add_request(self, request_id: str, *args: Any, **kwargs: Any) -> Any:
        return await self.begin(request_id)

    async def stream(self, event_bytes: int) -> AsyncIterator[bytes]:
        """Give out an event for each piece of an answer."""
        async for output in self.generate({}, SamplingParams(), "r"):  # type: ignore[typeddict-item]
            yield b"%0*d" % (event_bytes, len(output.outputs[0].token_ids))

    async def close(self) -> None:
        if self.output_handler is not None:
            self.output_handler.cancel()
        await self.dispatch.close()


@asynccontextmanager
async def serving(
    app: ASGIApp, on_drop: Callable[[], None], timeout_s: float, **options: Any
) -> AsyncIterator[int]:
    """Serve an application as a frontend does, to clients that may be silent for so long; gives
    the port."""
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
    config = uvicorn.Config(
        app, http=impatient(on_drop, timeout_s), lifespan="off", log_config=None, **options
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server._serve([sock]))
    while not server.started:
        await asyncio.sleep(0.001)
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        await task
        sock.close()


async def ask(port: int, *headers: str) -> socket.socket:
    """Ask for something; what comes is not read. To be closed."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", port))
    lines = ["GET / HTTP/1.1", "Host: localhost", *headers, "", ""]
    await loop.sock_sendall(sock, "\r\n".join(lines).encode())
    return sock
