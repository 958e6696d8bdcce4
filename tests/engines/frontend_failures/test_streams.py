"""Engines and frontends die: streams go on, nothing leaks."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from random import Random
from typing import Any

import httpx
import pytest

from tests.engine import running
from tests.engines.conftest import random_prompt
from tests.engines.frontend_failures.cluster import (
    NAMES,
    Cluster,
    stream,
    wait_until,
)
from tests.http_client import HTTP

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalties": {"frequency_penalty": 0.6, "presence_penalty": 0.3},
    "seed": {"temperature": 1.0, "seed": 7},
    "minimum": {"min_tokens": 200},
}


def test_streams_go_on_when_their_decode_engine_dies(cluster: Cluster) -> None:
    """Each as its sampling allows; what was drawn at random with penalties cannot be drawn again,
    and its client is told so."""
    unseeded = {"temperature": 1.0, "presence_penalty": 0.5}
    requests = [(random_prompt(300, 20 + i), each) for i, each in enumerate(SAMPLINGS.values())]
    expected = [cluster.alone.tokens(prompt, 600, **sampling) for prompt, sampling in requests]
    requests.append((random_prompt(200, 2), unseeded))
    before = cluster.retries()
    other = cluster.urls["decode-1"]
    cluster.tell("/engines/drain", url=other)
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = [
            pool.submit(stream, cluster.frontend, prompt, 600, begun=begun, **sampling)
            for prompt, sampling in requests
        ]
        assert all(begun.acquire(timeout=60) for _ in requests)
        cluster.tell("/engines", url=other, role="decode")
        cluster.signal("decode-0", signal.SIGKILL)
        *got, refused = [answer.result(120) for answer in answers]
    assert got == expected
    assert 0 < len(refused) < 600
    assert "need a seed" in refused[-1]
    assert cluster.retries() == before + len(SAMPLINGS)


def test_a_stream_goes_on_when_its_decode_engine_hangs(cluster: Cluster) -> None:
    prompt = random_prompt(300, 3)
    expected = cluster.alone.tokens(prompt, 600)
    before = cluster.retries()
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stream, cluster.frontend, prompt, 600, begun=begun)
        assert begun.acquire(timeout=60)
        victim = cluster.working()
        cluster.signal(victim, signal.SIGSTOP)
        try:
            assert answer.result(120) == expected
        finally:
            cluster.signal(victim, signal.SIGCONT)
    assert cluster.retries() == before + 1


@pytest.mark.parametrize("delay_s", [0.1, 0.4])
def test_a_prefill_engine_dies_at_any_moment(cluster: Cluster, delay_s: float) -> None:
    prompts = [random_prompt(3900, 40 + i) for i in range(4)]
    expected = [cluster.alone.tokens(prompt, 20) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(stream, cluster.frontend, prompt, 20) for prompt in prompts]
        time.sleep(delay_s)
        cluster.signal("prefill-0", signal.SIGKILL)
        assert [answer.result(120) for answer in answers] == expected


def test_an_engine_that_is_told_to_stop_loses_no_stream(cluster: Cluster) -> None:
    prompt = random_prompt(300, 5)
    expected = cluster.alone.tokens(prompt, 600)
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stream, cluster.frontend, prompt, 600, begun=begun)
        assert begun.acquire(timeout=60)
        victim = cluster.working()
        cluster.process(victim).terminate()
        assert answer.result(120) == expected


def test_a_storm_of_requests_deaths_and_impatient_clients_loses_and_leaks_nothing(
    cluster: Cluster,
) -> None:
    chooser = Random(6)
    prompts = [random_prompt(chooser.randrange(1, 1500), 100 + i) for i in range(40)]
    expected = [cluster.alone.tokens(prompt, 60) for prompt in prompts]

    def leave(prompt: list[int], delay_s: float) -> None:
        body = cluster.frontend.body(prompt, 500)
        url, limit = f"{cluster.frontend.url}/v1/completions", httpx.Timeout(delay_s, connect=5)
        with suppress(httpx.TimeoutException):
            HTTP.post(url, json=body, timeout=limit)

    def kill() -> None:
        for name in ("decode-0", "prefill-0"):
            time.sleep(1.0)
            cluster.signal(name, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    with ThreadPoolExecutor(16) as pool:
        killer.start()
        answers = []
        for prompt in prompts:
            answers.append(pool.submit(stream, cluster.frontend, prompt, 60))
            if chooser.random() < 0.4:
                pool.submit(leave, prompt, chooser.random())
        got = [answer.result(200) for answer in answers]
    killer.join()
    assert got == expected
    cluster.wait_until_whole()


def test_a_frontend_that_dies_leaves_nothing_on_the_engines(cluster: Cluster) -> None:
    other = cluster.serve("--local-below", "0")
    with running([other]), ThreadPoolExecutor(4) as pool:
        for i in range(4):
            pool.submit(_ignore_errors, stream, other, random_prompt(500, 60 + i), 3000)
        wait_until(cluster.engine("decode-0").holds_blocks)
        other.kill()
    for name in NAMES:
        cluster.engine(name).wait_until_at_rest(40)


def _ignore_errors(function: Callable[..., Any], *args: Any) -> None:
    try:
        function(*args)
    except httpx.HTTPError:
        return
