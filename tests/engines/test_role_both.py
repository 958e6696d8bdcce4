"""Engines of role both: they fetch from each other, and move from one pool to the other."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import models
from tests.engine import PRODUCE, Engine, hand_off, running, start, start_frontend
from tests.engines.conftest import ARGUMENTS, Trio, random_prompt
from tests.engines.frontend_failures.cluster import stream
from tests.http_client import HTTP
from tests.parity import FLOAT32, compare

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

KEY = {"VLLM_PD_CLUSTER_KEY": "0123456789abcdef0123456789abcdef"}


class Site:
    """Two engines with an encrypted control channel, one started with YAML and one with JSON, and a
    frontend that lets each do one thing."""

    def __init__(self, logs: Path, folder: Path) -> None:
        model, common = models.tiny_llama(), ARGUMENTS["tiny-llama"]
        yaml = folder / "engine.yaml"
        yaml.write_text("kv-connector: pdplugin\nkv-role: both\n")
        as_json = {
            "kv_connector": "pdplugin",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"host": "0.0.0.0", "advertise_host": "127.0.0.1"},
        }
        forms = {
            "yaml": ("--config", str(yaml)),
            "json": ("--kv-transfer-config", json.dumps(as_json)),
        }
        self.engines = [
            start(name, model, (*common, *words), cores=str(core), folder=logs, environ=KEY)
            for core, (name, words) in enumerate(forms.items())
        ]
        first, second = (engine.url for engine in self.engines)
        pool = ("--prefill", first, "--decode", second, "--local-below", "0")
        self.frontend = start_frontend(
            "serve", model, (*pool, "--max-model-len", "4096"), folder=logs, environ=KEY
        )

    def set_role(self, engine: Engine, role: str) -> None:
        body = {"url": engine.url, "role": role}
        url = f"{self.frontend.url}/pd/v1/engines"
        HTTP.post(url, json=body, timeout=10).raise_for_status()

    def pool(self) -> dict[str, dict[str, Any]]:
        answer = HTTP.get(f"{self.frontend.url}/pd/v1/pool", timeout=10).json()
        return {engine["url"]: engine for engine in answer["engines"]}


@pytest.fixture(scope="module")
def site(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(logs, tmp_path_factory.mktemp("forms"))
    with running([*site.engines, site.frontend]):
        yield site


def test_each_fetches_from_the_other(site: Site, llama: Trio) -> None:
    one, other = site.engines
    for producer, consumer, seed in ((one, other, 500), (other, one, 501)):
        prompt = random_prompt(400, seed)
        expected = llama.alone.complete(prompt, 8)
        compare(expected, hand_off(producer, consumer, prompt, 8), FLOAT32)
    for engine in site.engines:
        engine.wait_until_at_rest()
        assert "encrypted" in engine.log.read_text()
        assert KEY["VLLM_PD_CLUSTER_KEY"] not in engine.log.read_text()


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


def test_an_engine_without_the_key_cannot_talk_to_them(site: Site, llama: Trio) -> None:
    """Last: the blocks stay until their lease ends."""
    producer, prompt = site.engines[0], random_prompt(300, 502)
    first = producer.complete(prompt, 1, kv_transfer_params=PRODUCE)
    name = 'pd_handoff_failures_total{reason="peer_unreachable"}'
    before = llama.consumer.metrics().get(name, 0)
    with pytest.raises(httpx.HTTPStatusError):
        llama.consumer.complete(prompt, 4, kv_transfer_params=first.kv_transfer_params)
    assert llama.consumer.metrics()[name] == before + 1
    with pytest.raises(AssertionError, match="still holds KV"):
        producer.wait_until_at_rest(1)
    llama.assert_at_rest()
