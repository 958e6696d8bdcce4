"""Engines of two tensor parallel ranks, and of two data parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.engine import (
    PRODUCE,
    Engine,
    connector_arguments,
    hand_off,
    running,
    start,
    start_frontend,
)
from tests.engines.conftest import ARGUMENTS, Trio, random_prompt
from tests.http_client import HTTP
from tests.parity import FLOAT32, compare

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def pair(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Engine]]:
    """A producer, and a consumer of the same weights in other files at another path."""
    producer_files = models.tiny_llama()
    consumer_files = tmp_path_factory.mktemp("tp2") / "model"
    models.reshard(producer_files, consumer_files)
    words = (*ARGUMENTS["tiny-llama"], "-tp", "2", "--distributed-executor-backend", "mp")
    # Both ranks of an engine on one core: vLLM's workers yield in a loop while their engine steps,
    # and an engine steps while it holds blocks. On every core at once that starves the machine.
    started = [
        start("tp2-producer", producer_files, (*words, *connector_arguments("prefill", lease_s=5)),
              cores="0|0", folder=logs),
        start("tp2-consumer", consumer_files, (*words, *connector_arguments("decode")),
              cores="1|1", folder=logs),
    ]  # fmt: skip
    with running(started):
        yield started


def test_they_answer_as_one_alone(pair: list[Engine]) -> None:
    producer, consumer = pair
    for length in (1, 128, 129, 1000):
        prompt = random_prompt(length, 460 + length)
        expected = producer.complete(prompt, 8)
        compare(expected, hand_off(producer, consumer, prompt, 8), FLOAT32)
    for engine in pair:
        engine.wait_until_at_rest()


def test_ranks_of_another_number_hand_off(pair: list[Engine], llama: Trio) -> None:
    """To and fro, with blocks that end anywhere."""
    producer, consumer = pair
    for length in (1, 128, 129, 1000):
        prompt = random_prompt(length, 470 + length)
        expected = llama.alone.complete(prompt, 8)
        compare(expected, hand_off(producer, llama.consumer, prompt, 8), FLOAT32)
        compare(expected, hand_off(llama.producer, consumer, prompt, 8), FLOAT32)
    for engine in (*pair, llama.producer, llama.consumer):
        engine.wait_until_at_rest()


@pytest.fixture(scope="module")
def ranks(logs: Path) -> Iterator[Engine]:
    """One server with two data parallel ranks, both producers."""
    words = (*ARGUMENTS["tiny-llama"], "--data-parallel-size", "2", *connector_arguments("prefill"))
    engine = start("dp2-producer", models.tiny_llama(), words, cores="0|1", folder=logs)
    with running([engine]):
        yield engine


def described(engine: Engine) -> list[dict[str, Any]]:
    answer: list[dict[str, Any]] = HTTP.get(f"{engine.url}/pd/v1/engine", timeout=10).json()
    return answer


def test_each_data_parallel_rank_hands_off(ranks: Engine, llama: Trio) -> None:
    cores = described(ranks)
    assert [core["data_parallel_rank"] for core in cores] == [0, 1]
    for name in ("engine_id", "incarnation", "control_port"):
        assert len({core[name] for core in cores}) == 2
    for rank, core in enumerate(cores):
        prompt = random_prompt(300, 480 + rank)
        answer = HTTP.post(
            f"{ranks.url}/v1/completions",
            json=ranks.body(prompt, 1, PRODUCE),
            headers={"X-data-parallel-rank": str(rank)},
            timeout=60,
        )
        answer.raise_for_status()
        params = answer.json()["kv_transfer_params"]
        assert params["remote_engine_id"] == core["engine_id"]
        assert params["remote_port"] == core["control_port"]
        handed_off = llama.consumer.complete(prompt, 8, kv_transfer_params=params)
        compare(llama.alone.complete(prompt, 8), handed_off, FLOAT32)


def test_a_frontend_uses_each_data_parallel_rank(ranks: Engine, llama: Trio, logs: Path) -> None:
    pool = ("--prefill", ranks.url, "--decode", llama.consumer.url)
    words = (*pool, "--local-below", "0", "--max-model-len", "4096")
    frontend = start_frontend("serve", models.tiny_llama(), words, folder=logs)
    with running([frontend]), ThreadPoolExecutor(8) as clients:
        prompts = [random_prompt(700, 490 + number) for number in range(8)]
        answers = list(clients.map(lambda prompt: frontend.complete(prompt, 4), prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == llama.alone.complete(prompt, 4).token_ids
        engines = HTTP.get(f"{frontend.url}/pd/v1/pool", timeout=10).json()["engines"]
    given = {engine["url"]: engine["tokens_given"] for engine in engines}
    assert given.keys() == {ranks.url, f"{ranks.url}#1", llama.consumer.url}
    assert all(given.values()), "a rank got nothing"
