"""How a frontend looks for an engine at an address that it was given."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest
import zmq
from aiohttp import web

from tests.fakes.engine_core import describe

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.engine_port import messages
    from vllm_pd_plugin.engine_port.link import Connection, Link
    from vllm_pd_plugin.ids import Incarnation
    from vllm_pd_plugin.net.async_channel import AsyncDealer, close_context, new_context
    from vllm_pd_plugin.net.channel import CurveKeys, Listener, Loop


@asynccontextmanager
async def serving(
    answer: Callable[[web.Request], web.Response | Awaitable[web.Response]],
) -> AsyncIterator[int]:
    """Run an HTTP server; gives its port."""

    async def handle(request: web.Request) -> web.Response:
        given = answer(request)
        return given if isinstance(given, web.Response) else await given

    app = web.Application()
    app.router.add_get("/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield runner.addresses[0][1]
    await runner.cleanup()


@asynccontextmanager
async def connecting() -> AsyncIterator[Connection]:
    context = new_context()
    async with aiohttp.ClientSession() as session:
        try:
            yield Connection("this", Incarnation("1" * 16), None, context, session)
        finally:
            close_context(context)


async def problem_of(link: Link) -> str:
    async with asyncio.timeout(20):
        while link.problem == "not asked yet":
            await asyncio.sleep(0.01)
    return link.problem


OWNER: Any = object()
"""Of links that are never attached."""


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    asked: set[str] = set()

    def answer(request: web.Request) -> web.Response:
        asked.add(request.path)
        return web.Response(status=status, headers={"Location": "/elsewhere"})

    async def run() -> None:
        async with serving(answer) as port, connecting() as connection:
            link = Link(f"http://127.0.0.1:{port}", connection, OWNER)
            assert f"answers with status {status}" in await problem_of(link)
            await link.close()

    asyncio.run(run())
    assert asked == {"/pd/v1/engine"}


def test_an_engine_in_a_long_step_is_given_longer_and_longer_to_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, seconds in {"_MIN_ANSWER_S": 0.5, "_MAX_ANSWER_S": 1.0, "_MAX_WAIT_S": 0.0}.items():
        monkeypatch.setattr(f"vllm_pd_plugin.engine_port.link.{name}", seconds)
    problems: list[str] = []
    between_steps = 4
    """When it is asked for this time, it answers."""

    class Noting(Link):
        @property
        def problem(self) -> str:
            return problems[-1]

        @problem.setter
        def problem(self, text: str) -> None:
            problems.append(text)

    async def run() -> None:
        num_asked = 0
        is_over = asyncio.Event()

        async def answer(request: web.Request) -> web.Response:
            nonlocal num_asked
            num_asked += 1
            if num_asked != between_steps:
                await is_over.wait()
            elsewhere = describe(control_host="192.0.2.1")  # where it may not be attached
            return web.Response(body=msgspec.json.encode([elsewhere]))

        async with serving(answer) as port, connecting() as connection:
            link = Noting(f"http://127.0.0.1:{port}", connection, OWNER)
            async with asyncio.timeout(20):
                while len(problems) < 2 + between_steps:
                    await asyncio.sleep(0.01)
            await link.close()
            is_over.set()

    asyncio.run(run())
    said = [text.partition("/pd/v1/engine ")[2].partition(":")[0] for text in problems[1:6]]
    patience = ["0.5", "1", "1", "", "0.5"]
    assert said == [text and f"has not answered within {text} s" for text in patience]
    assert "set the cluster key" in problems[between_steps]


def test_an_engine_of_two_names_is_not_attached_twice() -> None:
    engine = describe(control_host="127.0.0.1", control_port=1)  # where nobody answers

    def answer(request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode([engine]))

    async def run() -> None:
        async with serving(answer) as port, connecting() as connection:
            first = f"http://127.0.0.1:{port}"
            connection.claims.take(engine, first)
            second = Link(f"http://localhost:{port}", connection, OWNER)
            assert await problem_of(second) == f"it is the same engine as {first}"
            assert second.twin == first
            await second.close()
            assert connection.claims.take(engine, "http://other:1") == first

    asyncio.run(run())


def test_a_server_that_is_not_there_is_told_from_a_host_that_is_not() -> None:
    async def run() -> None:
        async with connecting() as connection:
            nobody = Link("http://127.0.0.1:1", connection, OWNER)
            nowhere = Link("http://no-such-host.invalid:8000", connection, OWNER)
            assert await problem_of(nobody) == "nothing listens there"
            assert await problem_of(nowhere) == "no host is called 'no-such-host.invalid'"
            await nobody.close()
            await nowhere.close()

    asyncio.run(run())


class LateDealer(AsyncDealer):
    """Not used before the connection has ended: a handshake may fail before the first message."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        until = time.monotonic() + 10
        while self._socket.poll(0, zmq.POLLOUT) and time.monotonic() < until:
            time.sleep(0.01)
        assert not self._socket.poll(0, zmq.POLLOUT)


@pytest.mark.parametrize(
    ("theirs", "ours", "dealer"),
    [
        ("a" * 16, "b" * 16, AsyncDealer),
        ("a" * 16, None, AsyncDealer),
        ("a" * 16, None, LateDealer),
    ],
)
def test_another_cluster_key_is_named_as_what_may_be_wrong(
    theirs: str, ours: str | None, dealer: type[AsyncDealer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_pd_plugin.engine_port.link.AsyncDealer", dealer)
    loop = Loop("engine", lambda: None)
    keys = CurveKeys.derive(theirs)
    listener = Listener(loop, ("127.0.0.1", 0), keys, lambda identity, frames: None)
    engine = describe(control_host="127.0.0.1", control_port=listener.port)

    def answer(request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode([engine]))

    async def run() -> None:
        async with serving(answer) as port, connecting() as connection:
            own = CurveKeys.derive(ours) if ours else None
            connection = dataclasses.replace(connection, keys=own)
            link = Link(f"http://127.0.0.1:{port}", connection, OWNER)
            assert await problem_of(link) == (
                f"its control channel at 127.0.0.1:{listener.port} ends the connection; is "
                "VLLM_PD_CLUSTER_KEY the same there and here?"
            )
            await link.close()

    loop.start()
    try:
        asyncio.run(run())
    finally:
        loop.close()


def test_a_control_channel_that_nobody_answers_at_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm_pd_plugin.engine_port.link._ATTACH_TIMEOUT_S", 0.5)
    engine = describe(control_host="127.0.0.1", control_port=1)

    def answer(request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode([engine]))

    async def run() -> None:
        async with serving(answer) as port, connecting() as connection:
            link = Link(f"http://127.0.0.1:{port}", connection, OWNER)
            assert "control channel at 127.0.0.1:1 does not answer" in await problem_of(link)
            await link.close()

    asyncio.run(run())


class Owner:
    """Of a link that is attached. news: set when something has been said."""

    def __init__(self) -> None:
        self.states: list[messages.State] = []
        self.num_attached = 0
        self.news = asyncio.Event()

    def attached(self, link: Link, load: messages.EngineLoad) -> None:
        self.states.clear()
        self.num_attached += 1
        self.news.set()

    def loaded(self, link: Link, state: messages.State) -> None:
        self.states.append(state)
        self.news.set()

    def lost(self, link: Link, why: str) -> None: ...


class NumberedEngine:
    """Answers what a frontend says, and notes the numbers of its requests.

    is_forgetful: it does not know the frontend any more at its next ping.
    """

    def __init__(self) -> None:
        self.is_forgetful = False
        self.numbers: list[int] = []
        self.incarnation = Incarnation("2" * 16)
        self.loop = Loop("test", lambda: None)
        self.listener = Listener(self.loop, ("127.0.0.1", 0), None, self._receive)
        self.description = describe(control_host="127.0.0.1", control_port=self.listener.port)
        self.loop.start()

    def _receive(self, identity: bytes, frames: list[bytes]) -> None:
        header, message, _ = messages.decode(frames)
        answer: messages.ToFrontend
        match message:
            case messages.Attach():
                self.numbers.clear()
                answer = messages.Attached(self.description, messages.EngineLoad())
            case messages.Ping() if self.is_forgetful:
                self.is_forgetful = False
                answer = messages.Unknown()
            case messages.Ping():
                answer = messages.State(messages.EngineLoad(), 0, last_add=len(self.numbers))
            case messages.Add(_, number):
                self.numbers.append(number)
                return
            case _:
                return
        self.listener.send(identity, messages.encode(answer, self.incarnation, header.sender))


def test_requests_are_numbered_from_one_each_time_an_engine_is_attached() -> None:
    engine, owner = NumberedEngine(), Owner()

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                owner.news.clear()
                await owner.news.wait()

    async def run() -> None:
        page = msgspec.json.encode([engine.description])
        async with serving(lambda _: web.Response(body=page)) as port, connecting() as connection:
            there: Any = owner
            link = Link(f"http://127.0.0.1:{port}", connection, there)
            for times in (1, 2):
                await until(lambda: owner.num_attached == times)  # noqa: B023
                assert [link.add(f"r{number}", []) for number in range(3)] == [1, 2, 3]
                await until(lambda: bool(owner.states) and owner.states[-1].last_add == 3)
                assert engine.numbers == [1, 2, 3]
                engine.is_forgetful = True
            await link.close()

    try:
        asyncio.run(run())
    finally:
        engine.loop.close()
