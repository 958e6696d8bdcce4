"""The client of `benchmarks.frontend`: streams completions with as little work as possible.

It speaks HTTP/1.1 over connections that are kept, and looks for marks in what comes instead of
parsing it: a client that parsed every chunk would cost more than the frontend that it measures.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import uvloop

from benchmarks.common.client import RequestFailed

T = TypeVar("T")

CHUNK_MARK = b"data: {"
"""Is in every chunk once."""

_HEAD_END, _END = b"\r\n\r\n", b"\r\n0\r\n\r\n"
_FINISHED = b'"finish_reason":"length"'
_TAIL_BYTES = 2048
_CONNECT_TRIES = 5
_OPENING_AT_ONCE = 8
_COME_AGAIN_S = 2.0


class Busy(RequestFailed):
    """The server says that the request may come again later."""


@dataclasses.dataclass(slots=True)
class Reading:
    """What has come of one answer so far.

    mark: what to count; never torn into two HTTP chunks. marks: how often it has come.
    longest_gap_s: between two arrivals of marks, since the last ``count_anew``.
    """

    mark: bytes
    sent: float
    marks: int = 0
    first_at: float = 0.0
    last_at: float = 0.0
    longest_gap_s: float = 0.0
    is_over: bool = False
    _head: bytes | None = b""
    _tail: bytes = b""

    def feed(self, data: bytes, now: float) -> None:
        """Take what has come. Raises RequestFailed if it is not what a stream begins with."""
        if self._head is not None:
            self._head += data
            head, found, data = self._head.partition(_HEAD_END)
            if not found:
                return
            if head.split(b" ", 2)[1:2] != [b"200"]:
                text = self._head.decode(errors="replace")[:600]
                raise (Busy if b" 503 " in head else RequestFailed)(f"refused: {text}")
            self._head = None
        carried = len(self.mark) - 1
        found_marks = (self._tail[-carried:] + data).count(self.mark)
        if found_marks:
            self._arrived(found_marks, now)
        self._tail = (self._tail + data)[-_TAIL_BYTES:]
        self.is_over = self._tail.endswith(_END)

    @property
    def has_finished(self) -> bool:
        """Whether the answer came to the end that was asked for."""
        return self.is_over and _FINISHED in self._tail

    @property
    def tail(self) -> str:
        return self._tail.decode(errors="replace")[-300:]

    def count_anew(self) -> None:
        self.marks, self.longest_gap_s = 0, 0.0

    def _arrived(self, marks: int, now: float) -> None:
        if self.first_at:
            self.longest_gap_s = max(self.longest_gap_s, now - self.last_at)
        else:
            self.first_at = now
        self.last_at = now
        self.marks += marks


class Connection(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self, mark: bytes) -> None:
        self.reading: Reading | None = None
        self._mark = mark
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[Reading] | None = None

    def connection_made(self, transport: Any) -> None:  # uvloop's are of classes of its own
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(RequestFailed(f"the connection was lost: {error!r}"))

    def data_received(self, data: bytes) -> None:
        if self.reading is None or self._done is None or self._done.done():
            return
        try:
            self.reading.feed(data, time.perf_counter())
        except RequestFailed as error:
            self._fail(error)
            return
        if self.reading.is_over:
            self._done.set_result(self.reading)

    async def ask(self, request: bytes) -> Reading:
        """Send a request and wait for the end of its answer. Raises RequestFailed."""
        assert self._transport is not None
        self._done = asyncio.get_running_loop().create_future()
        self.reading = Reading(self._mark, time.perf_counter())
        self._transport.write(request)
        reading = await self._done
        if not reading.has_finished:
            raise RequestFailed(f"ended early: {reading.tail}")
        return reading

    async def first(self) -> Reading:
        """Wait for the first of what is counted. Raises RequestFailed."""
        while self.reading is None or not self.reading.marks:
            if self._done is not None and self._done.done():
                return self._done.result()
            await asyncio.sleep(0.005)
        return self.reading

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, error: RequestFailed) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


async def connect(url: str, mark: bytes) -> Connection:
    """Open a connection; a listener whose queue is full is asked again. Raises RequestFailed."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    loop = asyncio.get_running_loop()
    for attempt in range(1, _CONNECT_TRIES + 1):
        try:
            _, connection = await loop.create_connection(lambda: Connection(mark), host, port)
            return connection
        except OSError as error:
            if attempt == _CONNECT_TRIES:
                raise RequestFailed(f"{url}: {error!r}") from error
            await asyncio.sleep(0.1 * attempt)
    raise AssertionError


def request_bytes(url: str, model: str, prompt: Sequence[int], max_tokens: int) -> bytes:
    """Return a request for a greedy stream of exactly so many tokens."""
    content = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    body = json.dumps(content, separators=(",", ":")).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@dataclasses.dataclass(frozen=True, slots=True)
class Closed:
    """What a closed loop gave. first_ms, whole_ms: of each request, to the first token and all."""

    elapsed_s: float
    first_ms: tuple[float, ...]
    whole_ms: tuple[float, ...]
    marks: int


async def closed_loop(
    url: str,
    mark: bytes,
    requests: Iterable[bytes],
    concurrency: int,
    seconds: float | None = None,
) -> Closed:
    """Send the requests, so many at a time; what has begun when time is up still ends.

    seconds: None until there are no more requests.
    """
    queue = iter(requests)
    done: list[Reading] = []

    async def work(connection: Connection, deadline: float) -> None:
        while time.perf_counter() < deadline:
            request = next(queue, None)
            if request is None:
                return
            done.append(await connection.ask(request))

    connections: list[Connection] = []
    try:
        for _ in range(concurrency):
            connections.append(await connect(url, mark))
        start = time.perf_counter()
        deadline = start + seconds if seconds is not None else float("inf")
        async with asyncio.TaskGroup() as group:
            for connection in connections:
                group.create_task(work(connection, deadline))
        elapsed_s = time.perf_counter() - start
    except ExceptionGroup as errors:
        raise _first(errors) from None
    finally:
        for connection in connections:
            connection.close()
    return Closed(
        elapsed_s,
        tuple(1e3 * (reading.first_at - reading.sent) for reading in done),
        tuple(1e3 * (reading.last_at - reading.sent) for reading in done),
        sum(reading.marks for reading in done),
    )


def _first(errors: ExceptionGroup[Exception]) -> Exception:
    error: Exception = errors
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """What streams that were all open at once got meanwhile. marks, longest_gap_ms: of each."""

    opening_s: float
    seconds: float
    marks: tuple[int, ...]
    longest_gap_ms: tuple[float, ...]


async def open_streams(
    url: str,
    mark: bytes,
    requests: Sequence[bytes],
    seconds: float,
    opening_s: float,
    at_start: Callable[[], None],
    at_end: Callable[[], None],
) -> Window:
    """Open a stream for each request, some at a time, watch them when all have begun, and break
    them off.

    opening_s: how long that may take. at_start, at_end: called when the time begins and ends.

    Raises:
        RequestFailed: a stream did not begin, or ended.
    """
    began = time.perf_counter()
    left = list(requests)
    connections: list[Connection] = []
    streams: list[asyncio.Task[Reading]] = []
    readings: list[Reading] = []

    async def open_some() -> None:
        while left:
            reading, stream = await _open(url, mark, left.pop(), connections)
            readings.append(reading)
            streams.append(stream)

    try:
        async with asyncio.timeout(opening_s), asyncio.TaskGroup() as group:
            for _ in range(_OPENING_AT_ONCE):
                group.create_task(open_some())
        _check_open(streams)
        opened = time.perf_counter()
        for reading in readings:
            reading.count_anew()
        at_start()
        await asyncio.sleep(seconds)
        end = time.perf_counter()
        _check_open(streams)
        gaps = [max(reading.longest_gap_s, end - reading.last_at) for reading in readings]
        marks = tuple(reading.marks for reading in readings)
        at_end()
        longest_ms = tuple(1e3 * gap for gap in gaps)
        return Window(opened - began, end - opened, marks, longest_ms)
    except ExceptionGroup as errors:
        raise _first(errors) from None
    except TimeoutError:
        text = f"{len(readings)} of {len(requests)} streams have begun in {opening_s:g} s"
        raise RequestFailed(text) from None
    finally:
        for connection in connections:
            connection.close()
        await asyncio.gather(*streams, return_exceptions=True)


async def _open(
    url: str, mark: bytes, request: bytes, connections: list[Connection]
) -> tuple[Reading, asyncio.Task[Reading]]:
    """Open one stream and wait for its first token; a server that is too busy is asked again, as
    clients do. connections: gets every one that is made. Raises RequestFailed."""
    while True:
        connection = await connect(url, mark)
        connections.append(connection)
        stream = asyncio.create_task(connection.ask(request))
        try:
            return await connection.first(), stream
        except Busy:
            await asyncio.gather(stream, return_exceptions=True)
            connection.close()
            await asyncio.sleep(_COME_AGAIN_S)


def _check_open(streams: Sequence[asyncio.Task[Reading]]) -> None:
    for stream in streams:
        if stream.done():
            stream.result()  # raises what ended it
            raise RequestFailed("a stream ended before it was broken off")


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run this client on the fastest event loop there is."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def bodies(url: str, model: str, prompts: Iterable[Sequence[int]], max_tokens: int) -> list[bytes]:
    return [request_bytes(url, model, prompt, max_tokens) for prompt in prompts]


def again(requests: Sequence[bytes]) -> Iterable[bytes]:
    """Return the requests over and over."""
    return itertools.cycle(requests)
