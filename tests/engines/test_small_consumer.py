"""Consumers that are short of blocks, or that guess tokens ahead."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests import models
from tests.engine import (
    Completion,
    Engine,
    at_once,
    connector_arguments,
    hand_off,
    hand_off_at_once,
    running,
    start,
)
from tests.engines.conftest import ARGUMENTS, Trio, random_prompt
from tests.parity import FLOAT32, compare

pytestmark = pytest.mark.engine

# Block 0 is never given out; two prompts of eight blocks fit.
TINY_POOL = ("--max-model-len", "1152", "--num-gpu-blocks-override", "20")
GUESSING = ("--speculative-config", json.dumps({
    "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1,
}))  # fmt: skip


@pytest.fixture(scope="module")
def engines(logs: Path, llama: Trio) -> Iterator[dict[str, Engine]]:
    path, common = models.tiny_llama(), ARGUMENTS["tiny-llama"]
    consume = connector_arguments("decode")
    started = [
        start("small", path, (*common, *consume, *TINY_POOL), cores="1", folder=logs),
        start("guessing", path, (*common, *consume, *GUESSING), cores="1", folder=logs),
    ]
    with running(started):
        yield {engine.name: engine for engine in (llama.producer, *started)}


def test_twenty_requests_share_a_pool_that_holds_two(engines: dict[str, Engine]) -> None:
    producer, small = engines["producer"], engines["small"]
    prompts = [random_prompt(900 + i, 60 + i) for i in range(20)]
    expected = [producer.complete(prompt, 8) for prompt in prompts]

    def ask(index: int) -> Completion:
        how = (hand_off, hand_off_at_once)[index % 2]
        return how(producer, small, prompts[index], 8)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    for one, other in zip(expected, answers, strict=True):
        compare(one, other, FLOAT32)
    for engine in (producer, small):
        engine.wait_until_at_rest()


def test_a_preempted_consumer_still_answers_right(engines: dict[str, Engine], llama: Trio) -> None:
    """Eight requests that grow to four blocks each, where 19 are."""
    producer, small = engines["producer"], engines["small"]
    prompts = [random_prompt(250 + 13 * i, 440 + i) for i in range(8)]
    expected = [llama.alone.complete(prompt, 160) for prompt in prompts]
    before = small.metrics()["vllm:num_preemptions_total"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda p: hand_off(producer, small, p, 160), prompts))
    for one, other in zip(expected, answers, strict=True):
        compare(one, other, FLOAT32)
    assert small.metrics()["vllm:num_preemptions_total"] > before
    for engine in (producer, small):
        engine.wait_until_at_rest()


def test_a_prompt_larger_than_the_pool_is_refused_at_once(engines: dict[str, Engine]) -> None:
    started = time.monotonic()
    _, consume = at_once(engines["producer"])
    with pytest.raises(httpx.HTTPStatusError) as error:
        engines["small"].complete(random_prompt(2600, 90), 4, kv_transfer_params=consume)
    assert error.value.response.status_code == 400
    assert time.monotonic() - started < 5
    engines["small"].wait_until_at_rest()


def test_guessing_ahead_changes_no_token(engines: dict[str, Engine]) -> None:
    """N-gram speculation on the consumer; the prompt repeats itself, so that guesses are made."""
    producer, guessing = engines["producer"], engines["guessing"]
    for seed, how in enumerate((hand_off, hand_off_at_once)):
        prompt = random_prompt(70, 91 + seed) * 4
        expected = producer.complete(prompt, 40)
        compare(expected, how(producer, guessing, prompt, 40), FLOAT32)
    assert guessing.metrics()["vllm:spec_decode_num_draft_tokens_total"] > 0
    for engine in (producer, guessing):
        engine.wait_until_at_rest()


def test_guessing_ahead_spoils_no_batch(engines: dict[str, Engine], llama: Trio) -> None:
    """Greedy and sampled requests, handed off and not, in one batch with speculated tokens."""
    guessing, producer = engines["guessing"], engines["producer"]
    prompts = [random_prompt(70, 95 + i) * 4 for i in range(4)]
    expected = [llama.alone.complete(prompt, 40) for prompt in prompts]
    # Only the most likely token can be sampled: at any temperature it is the greedy one.
    certain = {"temperature": 0.7, "top_k": 1, "seed": 3}
    begun = guessing.metrics()["vllm:spec_decode_num_draft_tokens_total"]

    def ask(index: int) -> Completion:
        match index:
            case 0:
                return hand_off(producer, guessing, prompts[0], 40)
            case 1:
                return hand_off_at_once(producer, guessing, prompts[1], 40, **certain)
            case 2:
                return guessing.complete(prompts[2], 40)
            case 3:
                return guessing.complete(prompts[3], 40, **certain)
        return guessing.complete(random_prompt(90, 110 + index), 40, temperature=1.0, seed=index)

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(6)))
    for one, other in zip(expected, answers[:4], strict=True):
        assert one.token_ids == other.token_ids
    for one, other in ((expected[0], answers[0]), (expected[2], answers[2])):
        compare(one, other, FLOAT32)
    assert all(len(answer.token_ids) == 40 for answer in answers)
    assert guessing.metrics()["vllm:spec_decode_num_draft_tokens_total"] > begun
    guessing.wait_until_at_rest()
