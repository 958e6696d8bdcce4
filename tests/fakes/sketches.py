"""Sketches of what `tests.fakes.llama` computes."""

from __future__ import annotations

from typing import Any

import torch

from tests.fakes import llama
from vllm_pd_plugin.memory import probe
from vllm_pd_plugin.memory.probe import Sketch

TOKENS = probe.prompt(llama.VOCAB)


def sketch_of(
    weights: llama.Weights, dtype: torch.dtype = torch.float32, tp_size: int = 1, **how: Any
) -> Sketch:
    """Return what an engine of so many ranks would keep. how: see ``llama.compute``."""
    computed = llama.compute(weights, TOKENS, dtype, **how)
    heads = llama.KV_HEADS // tp_size
    ranks = []
    for rank in range(tp_size):
        own = slice(rank * heads, (rank + 1) * heads)
        sums = {}
        for place in probe.probed_layers(llama.LAYERS):
            for kind, rows in (("key", computed.keys), ("value", computed.values)):
                part = rows[place][:, own].numpy()
                sums[f"layer {place} {kind}"] = probe.sketch(part, rank * heads)
        ranks.append(sums)
    ranks[0]["logits"] = probe.sketch_logits(computed.logits.numpy())
    return probe.together(ranks)


def disturbed(weights: llama.Weights, name: str, by: float, seed: int = 7) -> llama.Weights:
    """Return the weights with noise added to one matrix, element by element, so large relative to
    each."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(weights[name].shape, generator=generator)
    return weights | {name: weights[name] * (1 + by * noise)}
