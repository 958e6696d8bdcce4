"""What a request's sampling carries from one token to the next; pure.

It decides two things. May a decode engine go on after a token that another engine has sampled, as
if it were a part of the prompt? And how does a request go on when the engine that had sampled its
tokens is gone?
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

_GREEDY_BELOW = 1e-5  # vLLM's _SAMPLING_EPS


class Replay(enum.StrEnum):
    """How a request goes on elsewhere after some of its tokens have gone to the client."""

    EXTEND = "extend"
    """With its tokens as a part of the prompt: nothing but the text matters."""
    REGENERATE = "regenerate"
    """From its beginning: the same tokens come again, are compared, and are not sent twice."""
    REFUSE = "refuse"
    """Not at all: other tokens would come."""


def is_greedy(params: SamplingParams) -> bool:
    return params.temperature < _GREEDY_BELOW


def carries_state(params: SamplingParams) -> bool:
    """Say whether what is sampled next depends on more than the tokens before it: on which of them
    are output, on a grammar's state, on how often a seeded generator was asked."""
    other_arguments = set(params.extra_args or ()) - {"kv_transfer_params"}
    return bool(
        (params.seed is not None and not is_greedy(params))
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1
        or params.min_tokens
        or params.bad_words
        or params.structured_outputs is not None
        or params.thinking_token_budget is not None
        or params.repetition_detection is not None
        or params.trace_decode_token_ids
        or params.watermarking
        or other_arguments  # custom logits processors read them
    )


def is_seed_safe(params: SamplingParams) -> bool:
    """Say whether a decode engine may go on after the token that the prefill engine has sampled.

    Also false for a request that needs an engine that computes all of its prompt.
    """
    return not carries_state(params) and not needs_whole_prompt(params)


def needs_whole_prompt(params: SamplingParams) -> bool:
    """Say whether a request wants what only an engine has that computes all of its prompt."""
    return bool(
        params.prompt_logprobs is not None
        or params.prompt_logprob_token_ids is not None
        or params.skip_reading_prefix_cache
    )


def replay_of(params: SamplingParams) -> Replay:
    """Return how a request may go on elsewhere when some of its tokens are with the client."""
    if is_seed_safe(params):
        return Replay.EXTEND
    if is_greedy(params) or params.seed is not None:
        return Replay.REGENERATE
    return Replay.REFUSE
