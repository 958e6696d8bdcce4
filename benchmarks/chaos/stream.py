"""One request of a chaos run on a fleet, as its client sees it: streamed or whole."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any

import httpx

from benchmarks.chaos.requests import error_message
from tests.engine import Completion, parse_event


@dataclasses.dataclass(slots=True)
class Received:
    """What has come of an answer so far; it stays when the client leaves.

    status: None where the connection broke before there was one.
    error: why there will be no more; empty without one.
    arrivals: when tokens came, of ``time.monotonic``; of a stream only.
    """

    status: int | None = None
    error: str = ""
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    token_logprobs: list[float] = dataclasses.field(default_factory=list)
    logprobs: list[Mapping[str, float]] = dataclasses.field(default_factory=list)
    finish_reason: str = ""
    is_done: bool = False
    arrivals: list[float] = dataclasses.field(default_factory=list)

    def take(self, answer: Mapping[str, Any]) -> int:
        """Take a whole answer, or a piece of one; return how many tokens it has.

        Raises LookupError, TypeError or ValueError for anything else.
        """
        (choice,) = answer["choices"]
        token_ids = choice.get("token_ids") or ()
        self.text += choice["text"]
        self.token_ids += token_ids
        if found := choice.get("logprobs"):
            self.token_logprobs += found["token_logprobs"]
            self.logprobs += found["top_logprobs"]
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return len(token_ids)

    def take_line(self, line: str, now: float) -> None:
        """Take one line of a stream."""
        piece = parse_event(line)
        if piece is None:
            return
        if not piece:
            self.is_done = True
        elif "error" in piece:
            self.error = error_message(json.dumps(piece))
        elif self.take(piece):
            self.arrivals.append(now)

    def completion(self) -> Completion:
        return Completion(
            self.text,
            tuple(self.token_ids),
            tuple(self.token_logprobs),
            tuple(self.logprobs),
            self.finish_reason,
            None,
        )


async def ask(
    client: httpx.AsyncClient, url: str, body: Mapping[str, Any], received: Received
) -> None:
    """Send a request, streamed if its body says so; ``received`` gets what comes, errors too."""
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            received.status = answer.status_code
            if answer.status_code != 200:
                received.error = error_message((await answer.aread()).decode(errors="replace"))
                received.error = f"HTTP {answer.status_code}: {received.error}"
            elif body.get("stream"):
                async for line in answer.aiter_lines():
                    received.take_line(line, time.monotonic())
                if not received.is_done:
                    received.error = received.error or "the stream ended before its end"
            else:
                received.take(json.loads(await answer.aread()))
                received.is_done = True
    except httpx.HTTPError as error:
        received.error = f"{type(error).__name__} {error}".strip()
    except (LookupError, TypeError, ValueError) as error:
        received.error = f"malformed answer: {error!r}"
