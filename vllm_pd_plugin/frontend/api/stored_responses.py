"""Stored responses and several workers: ``/v1/responses`` with ``VLLM_ENABLE_RESPONSES_API_STORE``.

vLLM keeps a response in the memory of the process that has made it, and the kernel gives a client's
next request to any worker. The hash of a response's id says which worker keeps it: a worker makes
up ids that are its own, and hands on what is for another to that one's socket.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import re
import socket
import uuid
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import uvicorn
from vllm.entrypoints.launchers.launcher import NoSignalServer
from yarl import URL

from vllm_pd_plugin.frontend.api.errors import error_answer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

_CREATE = "/v1/responses"
_STORED = {
    "GET": re.compile(r"/v1/responses/([^/]+)"),
    "POST": re.compile(r"/v1/responses/([^/]+)/cancel"),
}
_HANDED_ON = "pd.handed_on"
"""In the scope of a request that another worker has handed on."""
_OF_A_CONNECTION = {
    b"connection", b"content-length", b"expect", b"host", b"keep-alive", b"proxy-authenticate",
    b"proxy-authorization", b"te", b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Holder:
    """This worker among those that keep responses.

    folder: where each has its socket; nobody else's user can look into it.
    """

    number: int
    num_workers: int
    folder: Path

    @classmethod
    def parse(cls, text: str, folder: Path) -> Holder:
        """Read what ``workers.WORKER_VARIABLE`` says."""
        number, _, num_workers = text.partition("/")
        return cls(int(number), int(num_workers), folder)

    def holder_of(self, response_id: str) -> int:
        """Return which worker keeps the response of an id, if there is any."""
        digest = hashlib.blake2b(response_id.encode(errors="surrogatepass"), digest_size=8)
        return int.from_bytes(digest.digest(), "big") % self.num_workers

    def new_id(self) -> str:
        """Return an id for a response that this worker keeps."""
        while True:
            response_id = f"resp_{uuid.uuid4().hex}"
            if self.holder_of(response_id) == self.number:
                return response_id

    def socket_of(self, worker: int) -> Path:
        return self.folder / f"worker-{worker}.sock"


class ToHolder:
    """Middleware that hands a request on to the worker that keeps the response in question."""

    def __init__(self, app: ASGIApp, holder: Holder) -> None:
        self._app = app
        self._holder = holder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")).removesuffix("/")
        pattern = _STORED.get(scope["method"])
        if pattern is not None and (match := pattern.fullmatch(path)):
            await self._give(self._holder.holder_of(match[1]), scope, receive, send)
        elif path == _CREATE and scope["method"] == "POST":
            body = await _read(receive)
            keeper, body, problem = self._keeper_of(body)
            if problem:
                await error_answer(HTTPStatus.BAD_REQUEST, problem)(scope, receive, send)
            else:
                await self._give(keeper, scope, _replay(body, receive), send, body)
        else:
            await self._app(scope, receive, send)

    def _keeper_of(self, body: bytes) -> tuple[int, bytes, str]:
        """Return which worker is to answer a new request, its body, and what is wrong with it."""
        own = self._holder.number
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            return own, body, ""  # vLLM says what is wrong with it
        if not isinstance(request, dict):
            return own, body, ""
        before, response_id = request.get("previous_response_id"), request.get("request_id")
        keeper = None
        if isinstance(before, str):
            keeper = self._holder.holder_of(before)
        if isinstance(response_id, str):
            chosen = self._holder.holder_of(response_id)
            if keeper is not None and keeper != chosen:
                return (
                    own,
                    body,
                    (
                        "request_id: another worker keeps the response of "
                        "previous_response_id; leave request_id out, and one is made up"
                    ),
                )
            return chosen, body, ""
        if keeper is None or keeper == own:
            return own, json.dumps({**request, "request_id": self._holder.new_id()}).encode(), ""
        return keeper, body, ""  # it makes the id up

    async def _give(
        self, worker: int, scope: Scope, receive: Receive, send: Send, body: bytes = b""
    ) -> None:
        """Let a worker answer; body: of the request, which ``receive`` has as well."""
        if worker == self._holder.number or scope.get(_HANDED_ON):
            await self._app(scope, receive, send)
            return
        path = self._holder.socket_of(worker)
        forward = asyncio.create_task(_forward(path, body, scope, send))
        leaves = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({forward, leaves}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaves.cancel()
            if not forward.done():
                forward.cancel()
        with suppress(asyncio.CancelledError):
            await forward


@asynccontextmanager
async def taking_from_workers(app: ASGIApp, holder: Holder) -> AsyncIterator[None]:
    """Let an application answer what other workers hand on, as long as this lasts."""

    async def handed_on(scope: Scope, receive: Receive, send: Send) -> None:
        scope[_HANDED_ON] = True
        await app(scope, receive, send)

    path = holder.socket_of(holder.number)
    path.unlink(missing_ok=True)  # of the worker before this one, that was killed
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        config = uvicorn.Config(handed_on, lifespan="off", access_log=False, log_config=None)
        server = NoSignalServer(config)
        serving = asyncio.create_task(server.serve([sock]), name="requests of other workers")
        try:
            yield
        finally:
            server.should_exit = True
            await serving


async def _forward(path: Path, body: bytes, scope: Scope, send: Send) -> None:
    """Ask another worker, and pass its answer on as it comes."""
    query = scope.get("query_string", b"").decode("ascii")
    target = (scope.get("raw_path") or scope["path"].encode()).decode("ascii")
    url = URL(f"http://worker{target}{'?' if query else ''}{query}", encoded=True)
    headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in _of_client(scope["headers"])]
    has_begun = False
    try:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(path)),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
            ) as session,
            session.request(
                scope["method"],
                url,
                headers=headers,
                skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
                data=body or None,
                allow_redirects=False,
            ) as answer,
        ):
            there = _of_client(answer.raw_headers)
            start = {"type": "http.response.start", "status": answer.status, "headers": there}
            has_begun = True
            await send(start)
            async for chunk in answer.content.iter_any():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
    except (aiohttp.ClientError, OSError) as error:
        if has_begun:
            raise  # the client's connection breaks off, too
        logger.warning("the worker at %s does not answer: %s", path, error)
        sentence = (
            "the worker that keeps this response does not answer; it may have to be made anew"
        )
        refusal = error_answer(HTTPStatus.SERVICE_UNAVAILABLE, sentence)
        await refusal(scope, _never, send)


def _of_client(headers: Any) -> list[tuple[bytes, bytes]]:
    """Return the headers that are not of one connection only."""
    return [(name, value) for name, value in headers if name.lower() not in _OF_A_CONNECTION]


async def _read(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b""  # the client has left
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives a body that was read, and then goes on."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return first.pop() if first else await receive()

    return again


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _never() -> Message:
    raise RuntimeError("nothing more is read of this request")
