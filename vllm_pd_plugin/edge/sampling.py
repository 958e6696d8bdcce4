"""Where vLLM's CPU backend ends an engine, or spoils a batch, by how a request is sampled.

Both are vLLM's own, with or without a connector. A prompt that is handed off meets them more often
than another: it is computed in steps, and on the consumer beside requests of other clients.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

_MARK = "_vllm_pd_plugin_sampling"


def mend() -> None:
    """Wrap vLLM's sampling of CPU workers; does nothing when it is wrapped already."""
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if getattr(GPUModelRunner, _MARK, False):
        return
    GPUModelRunner.sample_tokens = _with_generators_set_aside(GPUModelRunner.sample_tokens)
    rejection_sampler.expand_batch_to_tokens = _expanding_on_cpu(
        rejection_sampler.expand_batch_to_tokens
    )
    rejection_sampler.apply_top_k_top_p = _unless_empty(rejection_sampler.apply_top_k_top_p)
    setattr(GPUModelRunner, _MARK, True)


def _with_generators_set_aside(sample_tokens: Any) -> Any:
    """Let a seeded prompt be computed in several steps.

    vLLM samples after each, and winds the request's generator back where that is not used. A CPU's
    generator cannot be wound back: the engine ends. So it is not used in the first place.
    """

    @functools.wraps(sample_tokens)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.device.type != "cpu":
            return sample_tokens(self, *args, **kwargs)
        batch = self.input_batch
        unused = np.flatnonzero(self.discard_request_mask.np[: batch.num_reqs])
        rows = [int(row) for row in unused if int(row) in batch.generators]
        aside = {row: batch.generators.pop(row) for row in rows}
        try:
            return sample_tokens(self, *args, **kwargs)
        finally:
            batch.generators.update(aside)

    return wrapped


def _unless_empty(apply_top_k_top_p: Any) -> Any:
    """Let a step have no speculated token although speculation is on: vLLM's replacement for a GPU
    kernel asks for the largest of no top-k, and the engine ends."""

    @functools.wraps(apply_top_k_top_p)
    def wrapped(
        logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None
    ) -> torch.Tensor:
        if not logits.numel():
            return logits
        masked: torch.Tensor = apply_top_k_top_p(logits, k, p)
        return masked

    return wrapped


def _expanding_on_cpu(expand: Any) -> Any:
    """Let requests with speculated tokens be sampled.

    vLLM's replacement for a GPU kernel writes each request's temperature, top-k and top-p into a
    copy of what it was given, as whole numbers: the logits are divided by what lay in memory.
    """

    @functools.wraps(expand)
    def wrapped(
        x: torch.Tensor,
        cu_num_tokens: torch.Tensor,
        num_tokens: int,
        replace_from: int = 0,
        replace_to: int = 0,
    ) -> torch.Tensor:
        """See ``expand_batch_to_tokens``: ``[batch]`` to ``[num_tokens]``."""
        if x.device.type != "cpu":
            expanded: torch.Tensor = expand(x, cu_num_tokens, num_tokens, replace_from, replace_to)
            return expanded
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
        return torch.repeat_interleave(values, counts.to(torch.int64), output_size=num_tokens)

    return wrapped
