"""Clients that do not read: a real server, and sockets that nobody reads."""

from __future__ import annotations

import asyncio
import socket
import warnings
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.flow_control import FlowControl

from tests.fakes.series import newly_registered, value

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.outputs import CompletionOutput, RequestOutput

    from tests.fakes.links import SkippingLoop
    from tests.fakes.streaming_server import SMALL, Client, ask, serving
    from vllm_pd_plugin.frontend.api.patience import MOST_UNREAD, impatient, unread
    from vllm_pd_plugin.frontend.api.refusals import PoolError

SHORT_S, PATIENCE_S = 0.1, 10.0
EVENT_BYTES = 8192
IN_BUFFERS = 65_536 + 2 * EVENT_BYTES + 16 * SMALL


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


async def is_over(sock: socket.socket) -> bool:
    """Read what is left; say whether it ends."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(PATIENCE_S):
            while await loop.sock_recv(sock, 65536):
                pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


class Events:
    """An application that streams without end, and counts what the server has taken of it."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.is_ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await StreamingResponse(self._events())(scope, receive, send)

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(EVENT_BYTES)
                self.num_bytes += EVENT_BYTES
                await asyncio.sleep(0)
        finally:
            self.is_ended = True


def test_a_client_that_does_not_read_is_dropped_and_its_engines_are_free_again() -> None:
    async def story() -> None:
        client = Client()
        engine = client.engine()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await StreamingResponse(client.stream(EVENT_BYTES))(scope, receive, send)

        metrics = client.dispatch.metrics
        async with serving(app, metrics.client_dropped, SHORT_S) as port:
            with await ask(port) as sock:
                await until(lambda: bool(engine.sent))
                async with asyncio.timeout(PATIENCE_S):
                    while not engine.aborted:
                        client.give(engine, 50)
                        await asyncio.sleep(0.001)
                assert engine.aborted == engine.sent
                assert len(client.dispatch) == 0, "nothing of it is left here"
                assert client.output_processor.request_states == {}
                assert await is_over(sock)
        await client.close()
        assert value("pd_frontend_clients_dropped_total") == 1
        assert value("pd_frontend_requests_total", slo_class="default", outcome="gone") == 1

    with newly_registered():
        asyncio.run(story())


def test_no_more_than_the_buffers_hold_is_taken_for_a_client_that_does_not_read() -> None:
    async def story() -> None:
        app = Events()
        async with serving(app, lambda: None, PATIENCE_S) as port:
            with await ask(port):
                await until(lambda: app.num_bytes >= 65_536)
                before = -1
                while before != app.num_bytes:
                    before = app.num_bytes
                    await asyncio.sleep(SHORT_S)
                assert app.num_bytes <= IN_BUFFERS

    asyncio.run(story())


def test_a_client_that_reads_slowly_is_kept() -> None:
    drops: list[None] = []

    async def story() -> None:
        loop = asyncio.get_running_loop()
        app = Events()
        async with serving(app, lambda: drops.append(None), 10 * SHORT_S) as port:
            with await ask(port) as sock:
                until_s = loop.time() + 25 * SHORT_S
                while loop.time() < until_s:
                    assert await loop.sock_recv(sock, 2048)
                    await asyncio.sleep(SHORT_S / 2)
                assert not drops
                assert not app.is_ended
                await until(lambda: app.is_ended)  # now it does not read any more
        assert len(drops) == 1

    asyncio.run(story())


def test_a_client_that_has_caught_up_is_not_looked_at_any_more() -> None:
    drops: list[None] = []
    left = 0

    def num_left() -> int:
        return left

    async def story() -> None:
        nonlocal left
        protocol: Any = impatient(lambda: drops.append(None), 60.0)
        connection = protocol.__new__(protocol)
        connection.loop, connection.client = asyncio.get_running_loop(), None
        connection.transport = SimpleNamespace(get_write_buffer_size=num_left, abort=lambda: None)
        connection.flow = FlowControl(connection.transport)
        left = 70_000
        connection.pause_writing()
        await asyncio.sleep(59.0)
        left = 10_000
        connection.resume_writing()
        await asyncio.sleep(30.0)
        left = 40_000  # it reads all the while, and so much is on its way at the moment
        await asyncio.sleep(200.0)
        assert not drops
        connection.pause_writing()
        await asyncio.sleep(61.0)
        assert len(drops) == 1

    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(story())


def test_a_client_that_reads_everything_is_never_dropped() -> None:
    drops: list[None] = []

    async def story() -> None:
        loop = asyncio.get_running_loop()
        async with serving(Events(), lambda: drops.append(None), 10 * SHORT_S) as port:
            with await ask(port) as sock:
                until_s = loop.time() + 25 * SHORT_S
                while loop.time() < until_s:
                    assert await loop.sock_recv(sock, 1 << 20)
        assert not drops

    asyncio.run(story())


@pytest.mark.parametrize("length", [10_000_000, 50_000], ids=["long", "short"])
@pytest.mark.parametrize("headers", [[], ["Connection: close"]], ids=["kept open", "to be closed"])
def test_an_answer_in_one_piece_that_nobody_fetches_is_not_kept(
    length: int, headers: list[str]
) -> None:
    drops: list[None] = []

    async def story() -> None:
        app = Response(bytes(length))
        idle = {"timeout_keep_alive": 0}
        async with serving(app, lambda: drops.append(None), SHORT_S, **idle) as port:
            with await ask(port, *headers) as sock:
                await until(lambda: bool(drops))
                assert await is_over(sock)
        assert len(drops) == 1

    asyncio.run(story())


# --- what waits in vLLM's collector -----------------------------------------------------------


def tell(story: Callable[[Client], object]) -> None:
    async def run() -> None:
        client = Client()
        await story(client)  # type: ignore[misc]
        await client.close()

    with newly_registered():
        asyncio.run(run())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_stream_that_is_read_much_too_slowly_is_told_that_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm_pd_plugin.frontend.api.client._LOOK_S", 0.0)

    async def story(client: Client) -> None:
        engine = client.engine()
        collector = await client.begin("r")
        sweep = asyncio.create_task(client._look())
        client.give(engine, *[50] * MOST_UNREAD)
        await settle()
        assert not engine.aborted, "so much may wait"
        client.give(engine, 50)
        await until(lambda: bool(engine.aborted))
        sweep.cancel()
        with pytest.raises(PoolError, match="read much more slowly"):
            collector.get_nowait()
        assert collector.get_nowait() is None, "what has waited is gone"
        assert client.output_processor.request_states == {}
        failures = {"slo_class": "default", "reason": "unread"}
        assert value("pd_frontend_failures_total", **failures) == 1

    tell(story)


def test_what_is_read_does_not_count_as_unread() -> None:
    async def story(client: Client) -> None:
        engine = client.engine()
        collector = await client.begin("r")
        client.give(engine, *[50] * 10)
        await settle()
        assert list(unread(client.output_processor, 1000)) == [("r", 10)]
        assert collector.get_nowait() is not None
        assert list(unread(client.output_processor, 1000)) == []

    tell(story)


@pytest.mark.parametrize(
    ("logprobs", "waits"),
    [pytest.param(4, 50, id="four"), pytest.param(-1, 10_010, id="the whole vocabulary")],
)
def test_a_token_s_log_probabilities_count_like_as_many_tokens(logprobs: int, waits: int) -> None:
    async def story(client: Client) -> None:
        collector = await client.begin("r", logprobs=logprobs)
        choice = CompletionOutput(0, "", [50] * 10, None, None)
        collector.put(RequestOutput("r", None, None, None, [choice], finished=False))
        assert list(unread(client.output_processor, 1000)) == [("r", waits)]

    tell(story)
