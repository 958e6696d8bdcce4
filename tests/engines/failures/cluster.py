"""Engines whose failures are watched, and what tests ask of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import psutil
import pytest

from tests import models
from tests.engine import (
    PRODUCE,
    Completion,
    Engine,
    connector_arguments,
    free_port,
    hand_off,
    start,
)
from tests.engines.conftest import ARGUMENTS, CHUNKED, STRETCH_BYTES, random_prompt
from tests.http_client import HTTP
from tests.parity import FLOAT32, compare

LEASE_S, PEER_TIMEOUT_S, FETCH_TIMEOUT_S = 4.0, 3.0, 8.0
OPTIONS = {
    "lease_s": LEASE_S,
    "peer_timeout_s": PEER_TIMEOUT_S,
    "fetch_timeout_s": FETCH_TIMEOUT_S,
}


class Cluster:
    """A producer that may be killed and restarted, and a consumer of each failure policy."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._control_port = free_port()
        self.producer = self._start_producer()
        self.failing = self._start_failing()
        self.recomputing = self._start_recomputing()

    def _start_producer(self) -> Engine:
        options = {**OPTIONS, "port": self._control_port, "stretch_bytes": STRETCH_BYTES}
        arguments = (*ARGUMENTS["tiny-llama"], *CHUNKED, *connector_arguments("prefill", **options))
        return start(
            "producer",
            models.tiny_llama(),
            arguments,
            cores="0",
            folder=self._logs,
            control_port=self._control_port,
            environ={"VLLM_SERVER_DEV_MODE": "1"},
        )

    def _start_failing(self) -> Engine:
        """Also the one that compares what it has read with what the producer holds."""
        options = connector_arguments("decode", **OPTIONS, integrity="digest")
        arguments = (*ARGUMENTS["tiny-llama"], *options)
        return start("failing", models.tiny_llama(), arguments, cores="1", folder=self._logs)

    def _start_recomputing(self) -> Engine:
        """Also the producer that a consumer may turn to when the first one fails."""
        port = free_port()
        options = {**OPTIONS, "kv_load_failure_policy": "recompute", "port": port}
        arguments = (*ARGUMENTS["tiny-llama"], *connector_arguments("both", **options))
        return start(
            "recomputing",
            models.tiny_llama(),
            arguments,
            cores="1",
            folder=self._logs,
            control_port=port,
        )

    def engines(self) -> list[Engine]:
        return [self.producer, self.failing, self.recomputing]

    def restart_producer(self) -> None:
        """Bring up another producer on the same control address."""
        self.producer = self._start_producer()
        self.producer.wait_until_ready()

    def prefill_s(self, num_tokens: int, seed: int) -> float:
        """Return how long the producer needs for a prompt; its prefix cache is empty afterwards."""
        started = time.monotonic()
        self.producer.complete(random_prompt(num_tokens, seed), 1)
        taken = time.monotonic() - started
        self.producer.forget_prefixes()
        return taken

    def assert_at_rest(self) -> None:
        for engine in self.engines():
            engine.wait_until_at_rest(LEASE_S + FETCH_TIMEOUT_S + 10)

    def assert_healthy(self, seed: int) -> None:
        """Both consumers still fetch from the producer, and answer right."""
        prompt = random_prompt(300, seed)
        expected = self.producer.complete(prompt, 8)
        for consumer in (self.failing, self.recomputing):
            before = failures(consumer)
            compare(expected, hand_off(self.producer, consumer, prompt, 8), FLOAT32)
            assert failures(consumer) == before


@contextmanager
def slowed(engine: Engine) -> Iterator[None]:
    """Let an engine compute a fifth of the time, so that a prefill has a middle on any machine."""
    worker, ended = psutil.Process(engine.worker_pid()), Event()

    def hold_back() -> None:
        try:
            while not ended.wait(0.01):
                worker.suspend()
                ended.wait(0.04)
                worker.resume()
        except psutil.NoSuchProcess:
            return  # the test has killed it

    thread = Thread(target=hold_back)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def failures(engine: Engine) -> dict[str, float]:
    """Return the failed handoffs by reason."""
    name = "pd_handoff_failures_total{reason="
    return {
        key.removeprefix(name).strip('"}'): value
        for key, value in engine.metrics().items()
        if key.startswith(name)
    }


def new_failures(engine: Engine, before: dict[str, float]) -> set[str]:
    return {reason for reason, count in failures(engine).items() if count > before.get(reason, 0)}


def assert_fails(engine: Engine, prompt: list[int], params: Any) -> set[str]:
    """The request is refused within the deadlines, and counted; returns the reasons."""
    before = failures(engine)
    started = time.monotonic()
    with pytest.raises(httpx.HTTPStatusError) as error:
        engine.complete(prompt, 4, kv_transfer_params=params)
    assert error.value.response.status_code in (400, 500)
    assert time.monotonic() - started < FETCH_TIMEOUT_S + 2 * PEER_TIMEOUT_S + 5
    engine.wait_until_at_rest()
    return new_failures(engine, before)


def assert_recomputes(
    engine: Engine, prompt: list[int], params: Any, expected: Completion
) -> set[str]:
    """The request is answered right all the same, and the failure counted."""
    before = failures(engine)
    compare(expected, engine.complete(prompt, 4, kv_transfer_params=params), FLOAT32)
    engine.wait_until_at_rest()
    return new_failures(engine, before)


def produce(cluster: Cluster, prompt: list[int]) -> dict[str, Any]:
    params = cluster.producer.complete(prompt, 1, kv_transfer_params=PRODUCE).kv_transfer_params
    assert params is not None
    return dict(params)


def leave_after(
    engine: Engine, prompt: list[int], max_tokens: int, params: Any, delay_s: float
) -> None:
    """Send a request and drop the connection after a while, as an impatient client does."""
    body = engine.body(prompt, max_tokens, params)
    limit = httpx.Timeout(delay_s + 0.01, connect=5)
    with suppress(httpx.TimeoutException):
        HTTP.post(f"{engine.url}/v1/completions", json=body, timeout=limit)


def address_of(producer: Engine) -> dict[str, Any]:
    return {"remote_host": "127.0.0.1", "remote_port": producer.control_port}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def retries(engine: Engine) -> float:
    """Return how often it turned to another producer because one could not be reached."""
    return engine.metrics().get('pd_handoff_retries_total{reason="peer_unreachable"}', 0)
