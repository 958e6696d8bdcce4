"""Engines of unequal shape answer as one alone; ``tests.matrix`` has every pair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests import models
from tests.engine import (
    PRODUCE,
    Engine,
    connector_arguments,
    hand_off,
    hand_off_at_once,
    running,
    start,
)
from tests.engines.conftest import ARGUMENTS, Trio, random_prompt
from tests.engines.control_client import ControlClient, Forger
from tests.matrix.__main__ import divergence
from tests.matrix.rows import BFLOAT16_BOUND, PP2
from tests.parity import FLOAT32, compare
from vllm_pd_plugin.mapping.kv_cache import EngineKvCache, KvCacheGroup
from vllm_pd_plugin.protocol import wire

pytestmark = pytest.mark.engine

REFUSED = 'pd_handoff_failures_total{reason="peer_incompatible"}'


@pytest.fixture
def staged(logs: Path) -> Iterator[Engine]:
    """A consumer of two pipeline stages, whose blocks are as long as no producer's."""
    words = [word for word in ARGUMENTS["tiny-llama"] if word not in PP2.left_out]
    consume = (*PP2.arguments, "--block-size", "96", *connector_arguments("decode"))
    engine = start(
        "pp2-consumer", models.tiny_llama(), (*words, *consume), cores="1|1", folder=logs
    )
    with running([engine]):
        yield engine


def test_pipeline_stages_with_other_blocks_answer_as_one_alone(staged: Engine, llama: Trio) -> None:
    for number, length in enumerate((1, 95, 96, 97, 129, 300, 1500)):
        prompt = random_prompt(length, 900 + number)
        ask = (hand_off, hand_off_at_once)[number % 2]
        answer = ask(llama.producer, staged, prompt, 8)
        compare(llama.alone.complete(prompt, 8), answer, FLOAT32)
    for engine in (llama.producer, staged):
        engine.wait_until_at_rest()
    assert staged.metrics()["pd_fetch_packed_stretches_total"] > 0


@pytest.fixture
def rounded(logs: Path) -> Iterator[Engine]:
    """A consumer whose KV has half the bits of the producer's."""
    words = (*ARGUMENTS["tiny-llama"], "--no-enable-prefix-caching", "--max-logprobs", "20")
    words = (*words, "--dtype", "bfloat16", *connector_arguments("decode"))
    engine = start("bfloat16-consumer", models.tiny_llama(), words, cores="1", folder=logs)
    with running([engine]):
        yield engine


def test_kv_of_another_type_is_converted_within_the_stated_bound(
    rounded: Engine, llama: Trio
) -> None:
    found = []
    for number in range(20):
        prompt = random_prompt(20 + 23 * number, 920 + number)
        answer = hand_off(llama.producer, rounded, prompt, 2, logprobs=5)
        found.append(divergence(rounded.complete(prompt, 2, logprobs=5), answer))
    assert statistics.fmean(found) <= BFLOAT16_BOUND
    assert rounded.metrics()["pd_fetch_seconds_count"] >= 20


def _changed(
    kv_cache: EngineKvCache,
    spec: dict[str, Any] | None = None,
    layout: dict[str, Any] | None = None,
    **engine: Any,
) -> EngineKvCache:
    change = msgspec.structs.replace
    (group,) = kv_cache.groups
    group = KvCacheGroup(change(group.spec, **spec or {}), change(group.layout, **layout or {}))
    return change(kv_cache, groups=(group,), **engine)


FORGED: dict[str, tuple[Callable[[EngineKvCache], EngineKvCache], str]] = {
    "another model": (
        lambda kv: _changed(kv, layout={"layers": ((*kv.layers_of(0)[:3], "another.3"),)}),
        "another model: theirs has 4 layers, ours 4; theirs has no model.layers.3",
    ),
    "an odd number of heads": (
        lambda kv: _changed(kv, spec={"num_heads": 3}, tensor_parallel_size=2),
        "has 3 KV heads, which their tensor parallel size 2 does not divide",
    ),
    "more heads": (
        lambda kv: _changed(kv, spec={"num_heads": 4}),
        "reaches to byte",
    ),
    "ranks that are not there": (
        lambda kv: _changed(kv, tensor_parallel_size=2),
        "their memory is that of 1 ranks",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_who_does_not_fit_is_refused_at_once_and_the_engine_goes_on(llama: Trio, name: str) -> None:
    forge, complaint = FORGED[name]
    prompt = random_prompt(200, 950)
    first = llama.producer.complete(prompt, 1, kv_transfer_params=PRODUCE)
    assert first.kv_transfer_params is not None
    with ControlClient(first.kv_transfer_params) as client:
        welcome = client.ask(wire.Hello("test"))
    assert isinstance(welcome, wire.Welcome)
    forged = msgspec.structs.replace(welcome, kv_cache=forge(welcome.kv_cache))
    before = llama.consumer.metrics().get(REFUSED, 0)
    with Forger(forged) as forger:
        there = {"remote_port": forger.port, "remote_incarnation": forger.incarnation}
        params = {**first.kv_transfer_params, **there}
        began = time.monotonic()
        with pytest.raises(httpx.HTTPStatusError):
            llama.consumer.complete(prompt, 2, kv_transfer_params=params)
        assert time.monotonic() - began < 1.0
    assert llama.consumer.metrics()[REFUSED] == before + 1
    assert complaint in llama.consumer.log.read_text()
    answer = llama.consumer.complete(prompt, 2, kv_transfer_params=first.kv_transfer_params)
    compare(llama.alone.complete(prompt, 2), answer, FLOAT32)
    for engine in (llama.producer, llama.consumer):
        engine.wait_until_at_rest()
