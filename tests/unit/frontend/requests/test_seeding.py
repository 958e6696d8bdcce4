"""What a request's sampling carries on, over vLLM's own parameters."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.sampling_params import (
        RepetitionDetectionParams,
        SamplingParams,
        StructuredOutputsParams,
    )

    from vllm_pd_plugin.frontend.requests.seeding import (
        Replay,
        is_greedy,
        is_seed_safe,
        needs_whole_prompt,
        replay_of,
    )

GREEDY: dict[str, Any] = {"temperature": 0.0}
DRAWN: dict[str, Any] = {"temperature": 0.7}
SEEDED: dict[str, Any] = {"temperature": 0.7, "seed": 3}

SAFE: dict[str, dict[str, Any]] = {
    "temperature": {},
    "seed, which a greedy request does not use": {"seed": 3, "temperature": 0.0},
    "top_p, top_k and min_p": {"top_p": 0.9, "top_k": 40, "min_p": 0.05},
    "logit_bias": {"logit_bias": {5: 2.0}},
    "allowed_token_ids": {"allowed_token_ids": [1, 2, 3]},
    "stop, which is found where text is made of tokens": {"stop": ["\n\n", "END"]},
    "include_stop_str_in_output": {"stop": ["END"], "include_stop_str_in_output": True},
    "stop_token_ids": {"stop_token_ids": [7]},
    "ignore_eos": {"ignore_eos": True},
    "logprobs": {"logprobs": 5},
    "logprobs of all tokens": {"logprobs": -1},
    "logprob_token_ids": {"logprob_token_ids": [1, 2]},
    "flat_logprobs": {"logprobs": 2, "flat_logprobs": True},
    "max_tokens": {"max_tokens": 1000},
    "what the text is made of": {
        "detokenize": False,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    },
    "stream_interval": {"stream_interval": 4},
    "no watermark": {"watermarking": False},
    "a repetition penalty that is none": {"repetition_penalty": 1.0},
    "what is for the connector": {"extra_args": {"kv_transfer_params": {"codec": "int8"}}},
    "no further arguments": {"extra_args": {}},
}

STATEFUL: dict[str, dict[str, Any]] = {
    "presence_penalty": {"presence_penalty": 0.5},
    "a negative presence_penalty": {"presence_penalty": -0.5},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "a negative frequency_penalty": {"frequency_penalty": -0.5},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "a repetition_penalty below one": {"repetition_penalty": 0.9},
    "min_tokens": {"min_tokens": 4},
    "bad_words": {"bad_words": ["no"]},
    "structured_outputs": {"structured_outputs": StructuredOutputsParams(regex="[ab]+")},
    "thinking_token_budget": {"thinking_token_budget": 16},
    "a thinking_token_budget of none": {"thinking_token_budget": 0},
    "repetition_detection": {
        "repetition_detection": RepetitionDetectionParams(max_pattern_size=4, min_count=3)
    },
    "trace_decode_token_ids": {"trace_decode_token_ids": [1, 2, 3]},
    "watermarking": {"watermarking": True},
    "prompt_logprobs": {"prompt_logprobs": 0},
    "prompt_logprob_token_ids": {"prompt_logprob_token_ids": [[1], [2]]},
    "a prompt that is to be computed": {"skip_reading_prefix_cache": True},
    "an argument of a logits processor": {"extra_args": {"my_processor": 1}},
    "one beside what is for the connector": {
        "extra_args": {"kv_transfer_params": {"codec": "int8"}, "my_processor": None}
    },
}
"""Fields for which one must know more than the text, whatever the temperature is."""


def params(*fields: dict[str, Any]) -> SamplingParams:
    merged: dict[str, Any] = {}
    for each in fields:
        merged |= each
    return SamplingParams(**merged)


@pytest.mark.parametrize("temperature", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", SAFE)
def test_a_request_that_looks_at_the_text_only_goes_on_anywhere(
    name: str, temperature: dict[str, Any]
) -> None:
    sampling = params(temperature, SAFE[name])
    assert is_seed_safe(sampling)
    assert replay_of(sampling) is Replay.EXTEND


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(GREEDY, Replay.REGENERATE), (DRAWN, Replay.REFUSE), (SEEDED, Replay.REGENERATE)],
    ids=["greedy", "drawn", "seeded"],
)
@pytest.mark.parametrize("name", STATEFUL)
def test_a_request_that_carries_state_begins_again_where_that_gives_the_same_tokens(
    name: str, temperature: dict[str, Any], expected: Replay
) -> None:
    sampling = params(temperature, STATEFUL[name])
    assert not is_seed_safe(sampling)
    assert replay_of(sampling) is expected


@pytest.mark.parametrize("name", SAFE)
def test_a_seed_s_generator_is_state_however_little_else_there_is(name: str) -> None:
    sampling = params(SAFE[name], SEEDED)
    assert not is_seed_safe(sampling)
    assert replay_of(sampling) is Replay.REGENERATE


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"seed": 3, "presence_penalty": 0.5}, False),
        ({"prompt_logprobs": 0}, True),
        ({"prompt_logprob_token_ids": [[1], [2]]}, True),
        ({"skip_reading_prefix_cache": True}, True),
        ({"skip_reading_prefix_cache": False}, False),
    ],
)
def test_what_is_said_of_a_prompt_takes_an_engine_that_computes_all_of_it(
    fields: dict[str, Any], expected: bool
) -> None:
    assert needs_whole_prompt(params(fields)) is expected


def test_a_seed_of_zero_is_one() -> None:
    assert not is_seed_safe(params(DRAWN, {"seed": 0}))
    assert replay_of(params(DRAWN, {"seed": 0, "presence_penalty": 1})) is Replay.REGENERATE


@pytest.mark.parametrize(("temperature", "expected"), [(0.0, True), (0.01, False), (1.0, False)])
def test_greedy_is_what_vllm_takes_for_greedy(temperature: float, expected: bool) -> None:
    assert is_greedy(SamplingParams(temperature=temperature)) is expected


WITHOUT_STATE = {
    # How a token is chosen of what the text gives.
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "logit_bias",
    "allowed_token_ids",
    # When a request ends: by its newest token alone, or by a count that each leg is given.
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "max_tokens",
    "_eos_token_id",
    "_all_stop_token_ids",
    # What is said of each token, and how it is shown.
    "logprobs",
    "logprob_token_ids",
    "flat_logprobs",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "output_kind",
    "stream_interval",
    "output_text_buffer_length",
    "routed_experts_prompt_start",
    # The frontend's own vLLM makes one request of each choice, and clones it or not.
    "n",
    "skip_clone",
    # Only says that a watermark was left out.
    "_watermarking_skipped",
}
LOOKED_AT = {
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "bad_words",
    "_bad_words_token_ids",  # made of bad_words
    "structured_outputs",
    "thinking_token_budget",
    "repetition_detection",
    "trace_decode_token_ids",
    "watermarking",
    "extra_args",
    "prompt_logprobs",
}
OF_THE_WHOLE_PROMPT = {
    "prompt_logprob_token_ids",
    "prompt_logprob_start",
    "skip_reading_prefix_cache",
}
"""With these an engine computes a prompt itself, or they belong to one that does."""


def test_every_field_of_vllm_s_sampling_has_been_decided_on() -> None:
    """A new one may carry state: then a token of another engine must not be taken over."""
    decided = WITHOUT_STATE | LOOKED_AT | OF_THE_WHOLE_PROMPT
    assert set(SamplingParams.__struct_fields__) == decided
