"""Real engines, shared by as many tests as possible: they take half a minute to start."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import models, wheel
from tests.alone import Alone
from tests.engine import Engine, connector_arguments, free_port, running, start
from tests.engine_site import ONE_PROCESS, environ_of

FLOAT32 = (
    *("--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "4096", "--max-num-batched-tokens", "4096"),
    *ONE_PROCESS,
)

# What `openai_api` asks for: tools, and fifty prompts in one step.
API = (
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *("--enable-prompt-tokens-details", "--max-num-batched-tokens", "8192"),
)
ARGUMENTS: dict[str, tuple[str, ...]] = {
    # In bfloat16 it would answer many times slower on a CPU without AVX512-BF16.
    "smollm2": (*FLOAT32, *API),
    # 256 MiB of KV: what vLLM would take otherwise is a GiB for each engine.
    "tiny-llama": (*FLOAT32, "--num-gpu-blocks-override", "1024"),
    # vLLM's CPU kernel for rotary embeddings is wrong for MLA's strided queries; and where there is
    # a matrix unit (AMX), vLLM takes a backend for MLA that cannot do float32.
    "tiny-mla": (
        *FLOAT32,
        *("--compilation-config", '{"custom_ops": ["-rotary_embedding"]}'),
        *("--attention-backend", "CPU_MLA"),
        # Its kernels have blocks of 16.
        *("--block-size", "64"),
    ),
    # As vLLM has it on a CPU: another process computes.
    "tiny-gemma3": (*FLOAT32, "--distributed-executor-backend", "mp"),
}
# Its engines run from the installed wheel, those of the others from the checkout.
FROM_THE_WHEEL = "tiny-gemma3"
# For a producer, after the above: longer prompts are computed in several steps. MLA cannot do that.
CHUNKED = ("--max-num-batched-tokens", "768")
# Less than one layer's KV of a chunk: each layer is announced.
STRETCH_BYTES = 50_000
BLOCK_TOKENS = {"smollm2": 128, "tiny-llama": 128, "tiny-mla": 64, "tiny-gemma3": 128}


@dataclasses.dataclass(frozen=True, slots=True)
class Trio:
    """What one engine alone answers, and a producer and a consumer of the same model."""

    alone: Alone
    producer: Engine
    consumer: Engine

    def assert_at_rest(self) -> None:
        for engine in (self.alone, self.producer, self.consumer):
            engine.wait_until_at_rest()


@pytest.fixture(scope="session", autouse=True)
def _environ() -> Iterator[None]:
    """All that is started here inherits it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ_of().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def alone_of(logs: Path) -> Iterator[Callable[[str], Alone]]:
    """What one engine alone answers, by the name of its model; of one model at a time there is an
    engine."""
    known: dict[str, Alone] = {}

    def of(model: str) -> Alone:
        if model not in known:
            known[model] = Alone(models.MODELS[model](), ARGUMENTS[model], logs)
        for name, alone in known.items():
            if name != model:
                alone.stop()
        return known[model]

    yield of
    for alone in known.values():
        alone.stop()


def start_pair(model: str, logs: Path, consume: Sequence[str] = ()) -> list[Engine]:
    """Start a producer and a consumer. consume: the consumer's connector, if it is not usual."""
    path, common = models.MODELS[model](), ARGUMENTS[model]
    port = free_port()
    produce = connector_arguments("prefill", port=port, stretch_bytes=STRETCH_BYTES)
    chunked = () if model == "tiny-mla" else CHUNKED
    words = (*common, *chunked, *produce)
    consume = (*common, *(consume or connector_arguments("decode")))
    programs = wheel.environment() / "bin" if model == FROM_THE_WHEEL else None
    return [
        start(
            *("producer", path, words),
            cores="0",
            folder=logs,
            control_port=port,
            programs=programs,
        ),
        start("consumer", path, consume, cores="1", folder=logs, programs=programs),
    ]


TrioOf = Callable[[str], Trio]


@pytest.fixture(scope="session")
def trio_of(logs: Path, alone_of: Callable[[str], Alone]) -> Iterator[TrioOf]:
    """The engines of a model, for all modules that hand off between such; those of another model
    are stopped: memory is for one."""
    with ExitStack() as stack:
        known: dict[str, Trio] = {}

        def of(model: str) -> Trio:
            if model not in known:
                known.clear()
                stack.close()
                engines = stack.enter_context(running(start_pair(model, logs)))
                known[model] = Trio(alone_of(model), *engines)
            return known[model]

        yield of


@pytest.fixture(scope="session")
def llama(trio_of: TrioOf) -> Trio:
    return trio_of("tiny-llama")


def random_prompt(length: int, seed: int) -> list[int]:
    """Return token ids that no other seed gives; none is special."""
    chooser = random.Random(seed)
    return [chooser.randrange(100, 49_000) for _ in range(length)]
