"""The second section of ``docs/compatibility.md``, made of what ``tests.matrix`` has found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "matrix.json"

_HEAD = """
## Pairs of unequal engines

What a producer and a consumer of one model may differ in. `make test-matrix` starts each pair on
vLLM's CPU backend, hands {prompts} prompts of 1 to 1,500 tokens off, and compares each answer of 8
tokens with what the consumer answers to the same prompt alone. *Equal* are tokens and
log-probabilities (within 0.002). Where types differ, it is the mean Kullback-Leibler divergence of
the first token from the consumer's own, in nats, that has to stay below a bound stated before.
Every other prompt is sent to both at once, so that KV moves while it is computed. TTFT is that of
the whole request as a multiple of the consumer's alone, on two shared cores: it says that nothing
is stuck, not how fast it is. Found at commit {commit}.

| model | producer | consumer | outcome | TTFT |
| --- | --- | --- | --- | --- |
"""
_TAIL = """
Blocks of 16 and 48 tokens, which vLLM's CPU attention does not have, three pipeline stages, more
ranks than KV heads and other pages are tried [in the mapping's model](mapping.md#what-is-tried) and
on tensors in CPU memory only. vLLM 0.32 on a CPU ends with `--enforce-eager` and pipeline stages at
its first request, with or without a connector: the engines of two stages here run without it.
Context parallelism is refused at the start; so are Mamba layers, draft models and EAGLE, and
encoder-decoder models. Nothing here was run on a GPU.
"""


def section() -> str:
    found = json.loads(RESULTS.read_text())
    rows = found["rows"]
    lines = "".join(
        f"| {row['model']} | {row['producer']} | {row['consumer']} | {_outcome(row)} "
        f"| {row.get('ttft_ratio', '')} |\n"
        for row in rows
    )
    prompts = max(row.get("compared", 0) for row in rows)
    return _HEAD.format(prompts=prompts, commit=found["commit"][:9]) + lines + _TAIL


def _outcome(row: dict[str, Any]) -> str:
    if row["equal"] is None:
        return f"skipped: {row['skipped']}"
    if not row["equal"]:
        return "**not as it has to be**"
    if not row["bound"]:
        return "equal"
    return f"divergence {row['divergence']:.4f}, allowed {row['bound']:g}"
