"""A pool that one frontend runs, and how its answers are taken."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests import models
from tests.alone import Alone
from tests.engine import Engine, engine_urls, parse_event, start_frontend
from tests.engines.conftest import ARGUMENTS
from tests.http_client import HTTP

NAMES = ("prefill-0", "decode-0", "decode-1")
ARGS = (*ARGUMENTS["tiny-llama"], "--max-num-batched-tokens", "768")


class Cluster:
    """What one engine alone answers, and a pool that one frontend runs and another one uses too."""

    def __init__(self, logs: Path, alone: Alone) -> None:
        model = models.tiny_llama()
        self._logs = logs
        self.alone = alone
        pool = ("--prefill", "1", "--decode", "2", "--local-below", "0")
        self.frontend = start_frontend("up", model, (*ARGS, *pool), folder=logs)

    @property
    def urls(self) -> dict[str, str]:
        return engine_urls(self.frontend)

    def engine(self, name: str) -> Engine:
        url = self.urls[name]
        return Engine(name, url, self.frontend.model, self.frontend.process, self.frontend.log)

    def process(self, name: str) -> psutil.Process:
        port = self.urls[name].rsplit(":", 1)[1]
        children = psutil.Process(self.frontend.process.pid).children()
        return next(c for c in children if port in c.cmdline())

    def signal(self, name: str, number: signal.Signals) -> None:
        process = self.process(name)
        for each in (process, *process.children(recursive=True)):
            each.send_signal(number)

    def serve(self, *arguments: str, environ: dict[str, str] | None = None) -> Engine:
        """Start another frontend over the same engines."""
        pool = ("--prefill", self.urls["prefill-0"], "--decode", self.urls["decode-0"])
        limits = ("--max-model-len", "4096", *arguments)
        model = models.tiny_llama()
        return start_frontend("serve", model, (*pool, *limits), folder=self._logs, environ=environ)

    def pool(self) -> dict[str, Any]:
        answer: dict[str, Any] = HTTP.get(f"{self.frontend.url}/pd/v1/pool", timeout=10).json()
        return answer

    def tell(self, path: str, **body: Any) -> None:
        """Call the admin API."""
        HTTP.post(f"{self.frontend.url}/pd/v1{path}", json=body, timeout=10).raise_for_status()

    def wait_until_whole(self) -> None:
        """Wait until every engine is up again, and holds nothing."""
        wait_until(lambda: all(e["state"] == "up" for e in self.pool()["engines"]), 240)
        for name in NAMES:
            self.engine(name).wait_until_at_rest(60)
        assert self.pool()["requests_open"] == 0

    def working(self) -> str:
        """Return which decode engine works on the one request there is."""
        wait_until(lambda: self._decoding() is not None, 30)
        name = self._decoding()
        assert name is not None
        return name

    def _decoding(self) -> str | None:
        busy = {e["url"] for e in self.pool()["engines"] if e["role"] == "decode" and e["legs"]}
        return next((name for name, url in self.urls.items() if url in busy), None)

    def retries(self) -> float:
        """Return how often a request had to go on elsewhere so far, because its engine was lost."""
        return self.frontend.metrics()['pd_frontend_retries_total{reason="engine_lost"}']


BEGUN_TOKENS = 20


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def stream(
    server: Engine,
    prompt: list[int],
    num_tokens: int,
    *,
    begun: threading.Semaphore | None = None,
    timeout_s: float = 120.0,
    **sampling: Any,
) -> list[Any]:
    """Return the tokens of a streamed answer, and its finish reason or error at the end.

    `begun` is released when some tokens have come, so that the decode engine is at work.
    """
    body = server.body(prompt, num_tokens, ignore_eos=True, stream=True, **sampling)
    body.pop("logprobs")
    got: list[Any] = []
    url = f"{server.url}/v1/completions"
    with HTTP.stream("POST", url, json=body, timeout=timeout_s) as answer:
        for line in answer.iter_lines():
            if not (part := parse_event(line)):
                continue
            if "error" in part:
                return [*got, part["error"]["message"]]
            choice = part["choices"][0]
            before = len(got)
            got += choice["token_ids"] or []
            if begun and before < BEGUN_TOKENS <= len(got):
                begun.release()
            if choice["finish_reason"]:
                got.append(choice["finish_reason"])
    return got
