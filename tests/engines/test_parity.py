"""What two engines answer together equals what one engine alone answers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engine import Completion, hand_off, hand_off_at_once
from tests.engines.conftest import BLOCK_TOKENS, Trio, TrioOf, random_prompt
from tests.parity import FLOAT32, compare

pytestmark = pytest.mark.engine

CASES: dict[str, tuple[Callable[..., Completion], dict[str, float]]] = {
    "serial, greedy": (hand_off, {"temperature": 0}),
    "at once, seeded": (hand_off_at_once, {"temperature": 0.9, "top_p": 0.95, "seed": 7}),
}


@pytest.fixture(scope="module", params=["smollm2", "tiny-llama", "tiny-mla", "tiny-gemma3"])
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def trio(model: str, trio_of: TrioOf) -> Trio:
    return trio_of(model)


def lengths(model: str) -> list[int]:
    block = BLOCK_TOKENS[model]
    # Where a window of 256 begins at the last token of a block.
    window = [255, 639] if model == "tiny-gemma3" else []
    return [1, block - 1, block, block + 1, *window, 1000, 3000]


def test_adjacent_blocks_become_one_descriptor_a_layer(trio: Trio, model: str) -> None:
    """First of all (see ``tests/conftest.py``): an engine gives out its blocks in ascending order
    while it is new.

    The prompt is computed in one step: between two, a sliding window gives blocks back."""
    hand_off(trio.producer, trio.consumer, random_prompt(5 * BLOCK_TOKENS[model], 300), 2)
    layers = {"smollm2": 30, "tiny-llama": 4, "tiny-mla": 4, "tiny-gemma3": 6}[model]
    assert trio.consumer.metrics()["pd_fetch_descriptors_total"] == layers


@pytest.mark.parametrize("case", CASES)
def test_answers_equal_for_prompts_around_block_borders(trio: Trio, model: str, case: str) -> None:
    ask, sampling = CASES[case]
    for seed, length in enumerate(lengths(model)):
        prompt = random_prompt(length, 1000 * len(case) + seed)
        expected = trio.alone.complete(prompt, **sampling)
        answer = ask(trio.producer, trio.consumer, prompt, **sampling)
        compare(expected, answer, FLOAT32)
    trio.assert_at_rest()


def test_only_the_suffix_moves_when_the_consumer_has_the_prefix(trio: Trio, model: str) -> None:
    if model == "tiny-mla":
        pytest.skip("vLLM's CPU backend turns prefix caching off for MLA")
    block = BLOCK_TOKENS[model]
    prefix = random_prompt(4 * block, 100)
    prompt = prefix + random_prompt(block + 10, 101)
    trio.consumer.complete(prefix, 1)
    before = trio.consumer.metrics()
    expected = trio.alone.complete(prompt)
    answer = hand_off(trio.producer, trio.consumer, prompt)
    compare(expected, answer, FLOAT32)
    moved = _moved(trio, before)
    whole = random_prompt(len(prompt), 102)
    before = trio.consumer.metrics()
    hand_off(trio.producer, trio.consumer, whole)
    assert 0 < moved <= 0.7 * _moved(trio, before)
    trio.assert_at_rest()


def test_kv_moves_while_the_prompt_is_computed(trio: Trio, model: str) -> None:
    before = trio.consumer.metrics()["pd_fetch_stretches_total"]
    hand_off_at_once(trio.producer, trio.consumer, random_prompt(1500, 400), 2)
    assert trio.consumer.metrics()["pd_fetch_stretches_total"] >= before + 3
    trio.assert_at_rest()


def test_a_seeded_prompt_may_be_computed_in_several_steps(trio: Trio, model: str) -> None:
    """It ends a CPU engine of vLLM's own, without our connector: a client needs only a seed."""
    if model != "tiny-llama":
        pytest.skip("one model is enough: nothing in it depends on the model")
    prompt, seeded = random_prompt(3000, 500), {"temperature": 0.9, "top_p": 0.95, "seed": 5}
    expected = trio.alone.complete(prompt, **seeded)  # in one step
    compare(expected, trio.producer.complete(prompt, **seeded), FLOAT32)  # in four
    trio.assert_at_rest()


def test_sixteen_at_once_answer_as_one_alone(trio: Trio, model: str) -> None:
    prompts = [random_prompt(40 + 37 * i, 200 + i) for i in range(16)]
    expected = [trio.alone.complete(prompt, 8) for prompt in prompts]

    def ask(index: int) -> Completion:
        how = (hand_off, hand_off_at_once)[index % 2]
        return how(trio.producer, trio.consumer, prompts[index], 8)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    for one, other in zip(expected, answers, strict=True):
        compare(one, other, FLOAT32)
    trio.assert_at_rest()


def _moved(trio: Trio, before: dict[str, float]) -> float:
    after = trio.consumer.metrics()["pd_fetch_bytes_total"]
    return after - before.get("pd_fetch_bytes_total", 0.0)
