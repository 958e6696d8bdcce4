"""Which pairs of unequal engines are tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

_PP2 = ("--pipeline-parallel-size", "2", "--distributed-executor-backend", "mp")
_TP2 = ("--tensor-parallel-size", "2", "--distributed-executor-backend", "mp")


@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """One engine: how it is called in the table, its arguments, and options of its connector."""

    name: str
    arguments: tuple[str, ...] = ()
    options: tuple[tuple[str, object], ...] = ()
    left_out: tuple[str, ...] = ()
    """Of the usual arguments."""

    @property
    def ranks(self) -> int:
        return 2 if "2" in self.arguments[1:2] else 1


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A pair. bound: of the mean divergence of what is answered from what the consumer answers
    alone, in nats; 0 where the answers have to be equal."""

    model: str
    producer: Side
    consumer: Side
    bound: float = 0.0
    needs: Callable[[], str] = lambda: ""
    """Says what this machine lacks for it; empty where it has everything."""

    @property
    def name(self) -> str:
        return f"{self.model}, {self.producer.name} to {self.consumer.name}"


def block(tokens: int) -> Side:
    return Side(f"blocks of {tokens}", ("--block-size", str(tokens)))


def dtype(name: str) -> Side:
    return Side(name, ("--dtype", name))


def lacks_avx512() -> str:
    """Say why vLLM's CPU backend has no fp8 KV cache here; empty where it has."""
    with open("/proc/cpuinfo") as file:
        flags = file.read()
    return "" if "avx512f" in flags else "this processor has no AVX512"


ONE, TP2 = Side("one rank"), Side("TP 2", _TP2)
# vLLM 0.32 allocates what a stage takes from the one before in its warm-up, which eager mode on a
# CPU leaves out: the first request ends such an engine, with or without a connector.
PP2 = Side("PP 2", _PP2, left_out=("--enforce-eager",))
FP8 = Side("fp8 KV", ("--dtype", "bfloat16", "--kv-cache-dtype", "fp8"), (("allow_fp8", True),))

# Stated before any run: what rounding to eight bits of mantissa, or to three, may come to.
BFLOAT16_BOUND, FP8_BOUND = 0.02, 0.2

ROWS = (
    *(Row("tiny-llama", *pair) for pair in ((ONE, TP2), (TP2, ONE), (ONE, PP2), (PP2, ONE))),
    Row("tiny-llama", TP2, PP2),
    *(
        Row("tiny-llama", block(theirs), block(ours))
        for theirs, ours in ((32, 64), (64, 32), (32, 96), (128, 32))
    ),
    Row("tiny-llama", Side("TP 2, blocks of 32", (*_TP2, "--block-size", "32")), block(96)),
    *(Row("tiny-gemma3", *pair) for pair in ((ONE, TP2), (PP2, ONE), (block(32), block(96)))),
    *(Row("tiny-mla", *pair) for pair in ((ONE, TP2), (TP2, ONE), (block(16), block(64)))),
    Row("tiny-llama", dtype("float32"), dtype("bfloat16"), BFLOAT16_BOUND),
    Row("tiny-llama", dtype("bfloat16"), dtype("float32"), BFLOAT16_BOUND),
    Row("tiny-llama", dtype("float16"), dtype("bfloat16"), BFLOAT16_BOUND),
    Row("tiny-llama", dtype("bfloat16"), FP8, FP8_BOUND, lacks_avx512),
)
