"""Engines of two tensor parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests import models
from tests.engine import Engine, connector_arguments, hand_off, running, start
from tests.engines.conftest import ARGUMENTS, Trio, random_prompt
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


def test_an_engine_of_another_size_is_refused(pair: list[Engine], llama: Trio) -> None:
    producer, _ = pair
    prompt = random_prompt(200, 470)
    before = llama.consumer.metrics()
    with pytest.raises(httpx.HTTPStatusError):
        hand_off(producer, llama.consumer, prompt, 4)
    name = 'pd_handoff_failures_total{reason="peer_incompatible"}'
    assert llama.consumer.metrics()[name] == before.get(name, 0) + 1
    producer.wait_until_at_rest(60)
    llama.consumer.wait_until_at_rest()
    assert "tensor parallel size is 2, ours is 1" in llama.consumer.log.read_text()
