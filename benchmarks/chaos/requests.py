"""One request of a chaos run: asks both engines as a router does, and keeps what they answered."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

import httpx

from benchmarks.chaos.account import Leg, Side
from benchmarks.chaos.plan import Arrival
from benchmarks.chaos.seats import Seat
from tests.engine import PRODUCE, Completion, parse_completion

MAX_TOKENS = 8

NIXL_PRODUCE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class Dispatcher:
    """Asks the engines of one arm, wherever they are at the moment."""

    def __init__(self, arm: str, seats: Mapping[Side, Seat], client: httpx.AsyncClient) -> None:
        self._arm = arm
        self._seats = seats
        self._client = client

    async def dispatch(self, arrival: Arrival, legs: list[Leg]) -> Completion | None:
        """Ask both engines as a router does; return the consumer's answer, if it is one.

        legs: gets what each engine answered, the deciding one last.
        """
        prompt = arrival.prompt()
        if arrival.concurrent and self._arm == "pdplugin":
            return await self._dispatch_concurrently(prompt, legs)
        produce = PRODUCE if self._arm == "pdplugin" else NIXL_PRODUCE
        leg, first = await self._ask(Side.PRODUCER, prompt, 1, produce)
        legs.append(leg)
        if first is None or first.kv_transfer_params is None:
            return None
        leg, answer = await self._ask(Side.CONSUMER, prompt, MAX_TOKENS, first.kv_transfer_params)
        legs.append(leg)
        return answer

    async def _dispatch_concurrently(self, prompt: list[int], legs: list[Leg]) -> Completion | None:
        """Name the handoff here, and ask both engines at once; the consumer waits for it."""
        handoff_id = uuid.uuid4().hex
        producer = self._seats[Side.PRODUCER].place
        produce = {**PRODUCE, "handoff_id": handoff_id}
        consume = {
            "do_remote_prefill": True,
            "remote_host": producer.kv_host,
            "remote_port": producer.kv_port,
            "remote_handoff_id": handoff_id,
        }
        (first, _), (second, answer) = await asyncio.gather(
            self._ask(Side.PRODUCER, prompt, 1, produce),
            self._ask(Side.CONSUMER, prompt, MAX_TOKENS, consume),
        )
        legs += [first, second]
        return answer

    async def _ask(
        self, side: Side, prompt: list[int], max_tokens: int, params: Mapping[str, Any]
    ) -> tuple[Leg, Completion | None]:
        """Ask one engine. The completion is None unless it answered with one."""
        seat = self._seats[side]
        engine, life, begun_s = seat.engine, len(seat.lives) - 1, time.monotonic()
        body = engine.body(prompt, max_tokens, params)
        status: int | None = None
        completion: Completion | None = None
        message = ""
        try:
            answer = await self._client.post(f"{engine.url}/v1/completions", json=body)
            status = answer.status_code
            if status == 200:
                completion = parse_completion(answer.json())
            else:
                message = error_message(answer.text)
        except httpx.HTTPError as error:
            message = f"{type(error).__name__} {error}".strip()
        except (LookupError, TypeError, ValueError) as error:
            message = f"malformed answer: {error!r}"
        return Leg(side, life, begun_s, time.monotonic(), status, message), completion


def error_message(text: str) -> str:
    """Return what the body of an error says; vLLM's JSON or any text."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return text.strip()
