"""More requests than a pool can answer, for a while."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import time
from collections.abc import Iterable

import aiohttp

from tests.engine import Engine, parse_event
from tests.engines.conftest import random_prompt

PROMPT_TOKENS, ANSWER_TOKENS = 3500, 8
_CLIENTS = 8
"""Enough to keep a pool of two engines busy."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request; ttft_s: of one that was answered."""

    status: int
    retry_after: str | None
    ttft_s: float = 0.0
    error: str = ""


async def ask(session: aiohttp.ClientSession, server: Engine, seed: int) -> Outcome:
    """Stream one answer to a prompt that no cache has."""
    prompt = random_prompt(PROMPT_TOKENS, seed)
    body = server.body(prompt, ANSWER_TOKENS, ignore_eos=True, stream=True)
    started, first_s, error = time.monotonic(), 0.0, ""
    async with session.post(f"{server.url}/v1/completions", json=body) as answer:
        retry_after = answer.headers.get("Retry-After")
        async for line in answer.content:
            if answer.status != 200 or not (part := parse_event(line.decode())):
                continue
            if "error" in part:
                error = json.dumps(part)
            first_s = first_s or time.monotonic() - started
        return Outcome(answer.status, retry_after, first_s, error)


def rate(server: Engine, seconds: float, seeds: Iterable[int]) -> float:
    """Return how many requests a second a pool answers when it always has some to do."""

    async def run() -> float:
        ends_at, numbers = time.monotonic() + seconds, iter(seeds)

        async def client() -> int:
            count = 0
            while time.monotonic() < ends_at:
                assert (await ask(session, server, next(numbers))).status == 200
                count += 1
            return count

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            started = time.monotonic()
            counts = await asyncio.gather(*(client() for _ in range(_CLIENTS)))
            return sum(counts) / (time.monotonic() - started)

    return asyncio.run(run())


def flood(server: Engine, per_second: float, seconds: float, first_seed: int) -> list[Outcome]:
    """Send so many requests a second, whatever becomes of them."""

    async def run() -> list[Outcome]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            started, tasks = time.monotonic(), []
            for number in itertools.count():
                at = number / per_second
                if at >= seconds:
                    break
                await asyncio.sleep(max(0.0, started + at - time.monotonic()))
                tasks.append(asyncio.create_task(ask(session, server, first_seed + number)))
            return await asyncio.gather(*tasks)

    return asyncio.run(run())
