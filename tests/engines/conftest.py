"""Real engines, shared by all tests of a module: they take half a minute to start."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import models
from tests.engine import Engine, connector_arguments, free_port, running, start

# Every prompt in one step: vLLM's CPU backend dies of a seeded prompt that needs several.
FLOAT32 = (
    *("--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "4096", "--max-num-batched-tokens", "4096"),
)

ARGUMENTS: dict[str, tuple[str, ...]] = {
    # In bfloat16 it would answer many times slower on a CPU without AVX512-BF16.
    "smollm2": FLOAT32,
    "tiny-llama": FLOAT32,
    # vLLM's CPU kernel for rotary embeddings is wrong for MLA's strided queries; and where there is
    # a matrix unit (AMX), vLLM takes a backend for MLA that cannot do float32.
    "tiny-mla": (
        *FLOAT32,
        *("--compilation-config", '{"custom_ops": ["-rotary_embedding"]}'),
        *("--attention-backend", "CPU_MLA"),
    ),
    "tiny-gemma3": FLOAT32,
}
# For a producer, after the above: longer prompts are computed in several steps. MLA cannot do that.
CHUNKED = ("--max-num-batched-tokens", "768")
# Less than one layer's KV of a chunk: each layer is announced.
STRETCH_BYTES = 50_000
BLOCK_TOKENS = {"smollm2": 128, "tiny-llama": 128, "tiny-mla": 16, "tiny-gemma3": 128}


@dataclasses.dataclass(frozen=True, slots=True)
class Trio:
    """One engine alone, and a producer and a consumer, of the same model."""

    alone: Engine
    producer: Engine
    consumer: Engine

    def assert_at_rest(self) -> None:
        for engine in (self.alone, self.producer, self.consumer):
            engine.wait_until_at_rest()


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


def start_trio(model: str, logs: Path, extra: tuple[str, ...] = ()) -> list[Engine]:
    path = models.MODELS[model]()
    common = (*ARGUMENTS[model], *extra)
    port = free_port()
    produce = connector_arguments("prefill", port=port, stretch_bytes=STRETCH_BYTES)
    chunked = () if model == "tiny-mla" else CHUNKED
    return [
        start("alone", path, common, cores="0", folder=logs),
        start(
            "producer",
            path,
            (*common, *chunked, *produce),
            cores="0",
            folder=logs,
            control_port=port,
        ),
        start("consumer", path, (*common, *connector_arguments("decode")), cores="1", folder=logs),
    ]


@pytest.fixture(scope="module")
def llama(logs: Path) -> Iterator[Trio]:
    with running(start_trio("tiny-llama", logs)) as engines:
        yield Trio(*engines)


def random_prompt(length: int, seed: int) -> list[int]:
    """Return token ids that no other seed gives; none is special."""
    chooser = random.Random(seed)
    return [chooser.randrange(100, 49_000) for _ in range(length)]
