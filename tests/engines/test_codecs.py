"""KV that is packed, or written down as small integers, between real engines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import models
from tests.engine import (
    PRODUCE,
    Completion,
    Engine,
    at_once,
    connector_arguments,
    running,
    start,
)
from tests.engines.conftest import ARGUMENTS, BLOCK_TOKENS, TrioOf, random_prompt
from tests.parity import FLOAT32, compare

pytestmark = pytest.mark.engine

LENGTHS = (1, 31, 127, 128, 129, 600, 1000, 3000)
LARGEST_SHARE = {
    "tiny-llama": {"int8": 0.27, "int4": 0.18, "int2": 0.13},
    "tiny-mla": {"int8": 0.27, "int4": 0.17, "int2": 0.18},  # never less than 4 bits
}
"""Of float32's bytes. Heads of 32 channels have more scales than most."""


LARGEST_ERROR = {"int8": 1.0, "int4": 4.0, "int2": math.inf}
"""Of a log-probability of the first token, in nats; random weights exaggerate every error."""


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-mla"])
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def trio(model: str, trio_of: TrioOf, logs: Path) -> Iterator[list[Any]]:
    """One engine alone, a producer, and a consumer for which everything is packed."""
    usual = trio_of(model)
    consume = connector_arguments(
        "decode", packing="always", lossy_max="int2", integrity="digest", staging_bytes=8 * 2**20
    )
    words = (*ARGUMENTS[model], *consume)
    consumer = start("packing", models.MODELS[model](), words, cores="1", folder=logs)
    with running([consumer]):
        yield [usual.alone, usual.producer, consumer]


def fetch(trio: list[Engine], prompt: list[int], codec: str | None, **more: Any) -> Completion:
    """Ask producer and consumer at once, with a codec for the KV."""
    _, producer, consumer = trio
    produce, consume = at_once(producer)
    wanted = {} if codec is None else {"codec": codec}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(producer.complete, prompt, 1, kv_transfer_params=produce)
        answer = consumer.complete(prompt, 16, kv_transfer_params={**consume, **wanted}, **more)
        first.exception(120)
    return answer


def apart(expected: Completion, answer: Completion) -> float:
    """Return how far the first token's log-probabilities are apart; infinity where the most likely
    tokens have none in common."""
    first, other = expected.logprobs[0], answer.logprobs[0]
    common = first.keys() & other.keys()
    return max((abs(first[token] - other[token]) for token in common), default=math.inf)


def counted(consumer: Engine, before: Mapping[str, float], series: str) -> float:
    return consumer.metrics().get(series, 0.0) - before.get(series, 0.0)


def test_packed_kv_gives_the_answers_of_one_engine(trio: list[Engine], model: str) -> None:
    alone, _, consumer = trio
    before = consumer.metrics()
    for length in LENGTHS:
        prompt = random_prompt(length, length)
        compare(alone.complete(prompt), fetch(trio, prompt, None), FLOAT32)
    stretches = counted(consumer, before, "pd_fetch_stretches_total")
    assert stretches > len(LENGTHS)
    assert counted(consumer, before, "pd_fetch_packed_stretches_total") == stretches
    assert counted(consumer, before, "pd_fetch_descriptors_total") == stretches
    for engine in trio:
        engine.wait_until_at_rest()


def test_sixteen_at_once_share_little_staging_memory(trio: list[Engine], model: str) -> None:
    alone, *_ = trio
    prompts = [random_prompt(200 + 61 * i, 300 + i) for i in range(16)]
    expected = [alone.complete(prompt) for prompt in prompts]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda prompt: fetch(trio, prompt, None), prompts))
    for one, other in zip(expected, answers, strict=True):
        compare(one, other, FLOAT32)
    for engine in trio:
        engine.wait_until_at_rest()


@pytest.mark.parametrize("codec", LARGEST_ERROR)
def test_a_lossy_codec_moves_few_bytes_and_changes_little(
    trio: list[Engine], model: str, codec: str
) -> None:
    alone, _, consumer = trio
    before = consumer.metrics()
    prompt = random_prompt(8 * BLOCK_TOKENS[model], len(codec) + ord(codec[-1]))
    expected, answer = alone.complete(prompt), fetch(trio, prompt, codec)
    assert counted(consumer, before, f'pd_fetches_total{{codec="{codec}"}}') == 1
    moved = counted(consumer, before, "pd_fetch_bytes_total")
    share = moved / counted(consumer, before, "pd_fetch_kv_bytes_total")
    assert 0 < share <= LARGEST_SHARE[model][codec]
    assert 0 < apart(expected, answer) <= LARGEST_ERROR[codec]
    assert answer.finish_reason == "length"


def test_what_the_codec_leaves_out_is_not_missed_in_a_short_prompt(
    trio: list[Engine], model: str
) -> None:
    """All of it is tail, and so in int8."""
    alone, *_ = trio
    prompt = random_prompt(20, 77)
    expected, answer = alone.complete(prompt), fetch(trio, prompt, "int2")
    assert apart(expected, answer) < LARGEST_ERROR["int8"]


def test_auto_stays_bit_for_bit_where_engines_share_memory(trio: list[Engine], model: str) -> None:
    alone, _, consumer = trio
    before = consumer.metrics()
    for seed in range(4):
        prompt = random_prompt(900, 500 + seed)
        compare(alone.complete(prompt), fetch(trio, prompt, "auto"), FLOAT32)
    assert counted(consumer, before, 'pd_fetches_total{codec="raw"}') == 4


def test_a_codec_that_is_not_known_fails_its_request_only(trio: list[Engine], model: str) -> None:
    _, producer, consumer = trio
    prompt = random_prompt(40, 9)
    first = producer.complete(prompt, 1, kv_transfer_params=PRODUCE)
    params = {**(first.kv_transfer_params or {}), "codec": "int1"}
    with pytest.raises(httpx.HTTPStatusError, match="500"):
        consumer.complete(prompt, kv_transfer_params=params)
    assert fetch(trio, random_prompt(40, 10), "int8").finish_reason == "length"


def test_what_came_through_a_lossy_codec_is_nobody_else_s_prefix(
    trio: list[Engine], model: str
) -> None:
    """The second request asks for its KV as it is, and shares a prefix with the first."""
    if model == "tiny-mla":
        pytest.skip("vLLM's CPU backend turns prefix caching off for MLA")
    alone, producer, consumer = trio
    prefix = random_prompt(4 * BLOCK_TOKENS[model], 980)
    first, second = (prefix + random_prompt(20, seed) for seed in (981, 982))
    fetch(trio, first, "int2")
    before = consumer.metrics()
    answer = fetch(trio, second, "raw")
    compare(alone.complete(second), answer, FLOAT32)
    moved = counted(consumer, before, "pd_fetch_kv_bytes_total")
    # And one that allows the codec finds what is there.
    before = consumer.metrics()
    fetch(trio, prefix + random_prompt(20, 983), "int2")
    assert counted(consumer, before, "pd_fetch_kv_bytes_total") < 0.7 * moved
    for engine in (producer, consumer):
        engine.wait_until_at_rest()
