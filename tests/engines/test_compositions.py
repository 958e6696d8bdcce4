"""Our connector beside others, in vLLM's MultiConnector."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import models
from tests.engine import (
    Engine,
    at_once,
    free_port,
    hand_off,
    hand_off_at_once,
    running,
    spawn,
    start,
)
from tests.engines.conftest import ARGUMENTS, Trio, random_prompt
from tests.http_client import HTTP
from tests.parity import FLOAT32, compare

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

LMCACHE_START_S = 120.0


def composition(beside: dict[str, Any], port: int) -> Sequence[str]:
    """pdplugin, and another connector after it."""
    ours = {
        "kv_connector": "pdplugin",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"port": port, "peer_timeout_s": 3, "fetch_timeout_s": 8},
    }
    transfer = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [ours, {**beside, "kv_role": "kv_both"}]},
    }
    return *ARGUMENTS["tiny-llama"], "--kv-transfer-config", json.dumps(transfer)


@pytest.fixture(scope="module")
def engines(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Engine]]:
    """One with ExampleConnector, which writes files, and one with LMCache's server."""
    files = tmp_path_factory.mktemp("example")
    port, http_port = free_port(), free_port()
    lmcache = [
        str(Path(sys.executable).with_name("lmcache")), "server", "--l1-size-gb", "0.25",
        "--eviction-policy", "LRU", "--host", "127.0.0.1", "--port", str(port),
        "--http-port", str(http_port), "--chunk-size", "128",
        "--supported-transfer-mode", "auto",
    ]  # fmt: skip
    server = spawn(lmcache, {"LMCACHE_TRACK_USAGE": "false"}, logs / "lmcache.log")
    beside = {
        "example": {
            "kv_connector": "ExampleConnector",
            "kv_connector_extra_config": {"shared_storage_path": str(files)},
        },
        "lmcache": {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port,
            },
        },
    }  # fmt: skip
    started = []
    for name, config in beside.items():
        control = free_port()
        words = composition(config, control)
        cores = str(len(started))
        environ = {
            "LMCACHE_TRACK_USAGE": "false", "PYTHONHASHSEED": "0", "VLLM_SERVER_DEV_MODE": "1",
            # A fork would have LMCache's modules, and vLLM does not start where it finds these.
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }  # fmt: skip
        started.append(
            start(
                name, models.tiny_llama(), words, cores=cores, folder=logs, control_port=control,
                environ=environ,
            )
        )  # fmt: skip
    try:
        with running(started):
            yield started
    finally:
        os.killpg(server.pid, 9)
        server.wait(30)


@pytest.mark.parametrize("producer", [0, 1], ids=["example", "lmcache"])
def test_engines_of_two_compositions_hand_off(
    engines: list[Engine], llama: Trio, producer: int
) -> None:
    source, target = engines[producer], engines[1 - producer]
    before = target.metrics().get("pd_fetch_bytes_total", 0.0)
    for seed, how in enumerate((hand_off, hand_off_at_once)):
        prompt = random_prompt(700, 800 + 10 * producer + seed)
        expected = llama.alone.complete(prompt)
        compare(expected, how(source, target, prompt), FLOAT32)
    assert target.metrics()["pd_fetch_bytes_total"] > before
    for engine in engines:
        engine.wait_until_at_rest()


def test_frontends_find_our_connector_among_others(engines: list[Engine]) -> None:
    for engine in engines:
        (description,) = HTTP.get(f"{engine.url}/pd/v1/engine", timeout=10).json()
        assert (description["role"], description["control_port"]) == ("both", engine.control_port)


def test_a_first_token_that_cannot_be_had_ends_its_request(
    engines: list[Engine], llama: Trio
) -> None:
    """A failed handoff with ``seed_first_token`` is not computed afresh as others are, and does not
    hang."""
    example, lmcache = engines
    prompt = random_prompt(300, 830)
    _, consume = at_once(example)  # and the producer never hears of it
    consume |= {"remote_incarnation": "0" * 16}
    seeded = {**consume, "seed_first_token": True}
    with pytest.raises(httpx.HTTPStatusError) as error:
        lmcache.complete(prompt, 8, kv_transfer_params=seeded, timeout_s=60)
    assert error.value.response.status_code == 500
    answer = lmcache.complete(prompt, 8, kv_transfer_params=consume, timeout_s=60)
    compare(llama.alone.complete(prompt, 8), answer, FLOAT32)
    assert lmcache.metrics()['pd_handoff_failures_total{reason="peer_restarted"}'] == 2
    for engine in engines:
        engine.wait_until_at_rest()


def test_what_the_other_connector_has_is_used_where_nothing_is_handed_off(
    engines: list[Engine], llama: Trio
) -> None:
    for number, engine in enumerate(engines):
        prompt = random_prompt(600, 840 + number)
        expected = llama.alone.complete(prompt)
        compare(expected, engine.complete(prompt), FLOAT32)
        engine.forget_prefixes()
        before = engine.metrics()["vllm:external_prefix_cache_hits_total"]
        compare(expected, engine.complete(prompt), FLOAT32)
        hits = engine.metrics()["vllm:external_prefix_cache_hits_total"] - before
        assert hits >= 512, f"{engine.name} has no KV of its own connector"
