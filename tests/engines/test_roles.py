"""Engines of role both move from one pool to the other while they work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import models
from tests.engine import Engine, connector_arguments, running, start, start_frontend
from tests.engines.conftest import ARGUMENTS, random_prompt
from tests.engines.frontend_failures.cluster import stream

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


class Site:
    """Two engines that can do both, and a frontend that lets each do one."""

    def __init__(self, logs: Path) -> None:
        model = models.tiny_llama()
        words = (*ARGUMENTS["tiny-llama"], *connector_arguments("both"))
        self.engines = [
            start(name, model, words, cores=core, folder=logs)
            for name, core in (("first", "0"), ("second", "1"))
        ]
        first, second = (engine.url for engine in self.engines)
        pool = ("--prefill", first, "--decode", second, "--local-below", "0")
        self.frontend = start_frontend(
            "serve", model, (*pool, "--max-model-len", "4096"), folder=logs
        )

    def set_role(self, engine: Engine, role: str) -> None:
        body = {"url": engine.url, "role": role}
        url = f"{self.frontend.url}/pd/v1/engines"
        httpx.post(url, json=body, timeout=10).raise_for_status()

    def pool(self) -> dict[str, dict[str, Any]]:
        answer = httpx.get(f"{self.frontend.url}/pd/v1/pool", timeout=10).json()
        return {engine["url"]: engine for engine in answer["engines"]}


@pytest.fixture(scope="module")
def site(logs: Path) -> Iterator[Site]:
    site = Site(logs)
    with running([*site.engines, site.frontend]):
        yield site


def test_two_engines_change_places_in_the_middle_of_an_answer(site: Site) -> None:
    first, second = site.engines
    long, short = random_prompt(300, 95), random_prompt(300, 96)
    before = {url: engine["incarnation"] for url, engine in site.pool().items()}
    fetched = first.metrics()["pd_fetch_kv_bytes_total"]
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stream, site.frontend, long, 800, begun=begun)
        assert begun.acquire(timeout=60)
        site.set_role(first, "decode")
        site.set_role(second, "prefill")
        got = [stream(site.frontend, short, 40), answer.result(120)]
    roles = {url: (engine["role"], engine["incarnation"]) for url, engine in site.pool().items()}
    assert roles == {
        first.url: ("decode", before[first.url]),
        second.url: ("prefill", before[second.url]),
    }
    metrics = site.frontend.metrics()
    assert metrics['pd_frontend_routes_total{reason="disaggregated"}'] == 2
    assert sum(v for k, v in metrics.items() if k.startswith("pd_frontend_retries_total")) == 0
    for engine in site.engines:
        engine.wait_until_at_rest()
    assert first.metrics()["pd_fetch_kv_bytes_total"] > fetched
    assert got == [stream(first, short, 40), stream(first, long, 800)]
