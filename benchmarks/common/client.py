"""The client of the benchmarks: streams completions and notes when each token came."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from typing import Any

import aiohttp

from tests.engine import parse_event

REQUEST_TIMEOUT_S = 900.0


class RequestFailed(RuntimeError):
    """A server refused a request or broke off its answer."""


class Prompts:
    """Random prompts, no two alike: no engine finds a prefix in its cache."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def next(self, length: int) -> list[int]:
        return [self._random.randrange(100, 49_000) for _ in range(length)]


def ask(
    url: str, model: str, prompt: Sequence[int], max_tokens: int, codec: str = "raw"
) -> tuple[float, list[float]]:
    """Ask for a completion on a new connection; return when it was sent and when tokens came.

    codec: of the KV, where that is not bit for bit; behind the concurrent proxy only.
    Times are seconds of ``time.perf_counter``.

    Raises:
        RequestFailed: the request was refused, or the answer ended early.
    """

    async def once() -> tuple[float, list[float]]:
        arrivals: list[float] = []
        async with session() as opened:
            sent = await stream(opened, url, model, prompt, max_tokens, arrivals, codec)
        return sent, arrivals

    return asyncio.run(once())


def session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
    )


async def stream(
    opened: aiohttp.ClientSession,
    url: str,
    model: str,
    prompt: Sequence[int],
    max_tokens: int,
    arrivals: list[float],
    codec: str = "raw",
) -> float:
    """Stream a greedy completion of exactly ``max_tokens``; return when it was sent.

    arrivals: gets the time of every chunk. vLLM sends a chunk for each token, unless tokens wait
        for the server's event loop; those count as one.

    Raises:
        RequestFailed: the request was refused, or the answer ended early.
    """
    request: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    if codec != "raw":
        request["kv_transfer_params"] = {"codec": codec}
    body = json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    sent = time.perf_counter()
    try:
        async with opened.post(f"{url}/v1/completions", data=body, headers=headers) as answer:
            if answer.status != 200:
                text = (await answer.text())[:300]
                raise RequestFailed(f"{url} answered {answer.status}: {text}")
            await _read(answer, url, arrivals)
    except (TimeoutError, aiohttp.ClientError) as error:
        raise RequestFailed(f"{url}: {error!r}") from error
    return sent


async def _read(answer: aiohttp.ClientResponse, url: str, arrivals: list[float]) -> None:
    finished = False
    async for line in answer.content:
        arrived = time.perf_counter()
        chunk = parse_event(line.decode(errors="replace"))
        if not chunk:
            continue
        choices = chunk.get("choices")
        if not choices:
            raise RequestFailed(f"{url} broke off: {line.decode(errors='replace')[:300]}")
        arrivals.append(arrived)
        finished = finished or choices[0].get("finish_reason") == "length"
    if not finished or not arrivals:
        raise RequestFailed(f"{url} ended its stream after {len(arrivals)} tokens")
