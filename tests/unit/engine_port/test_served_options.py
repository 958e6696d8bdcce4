"""Which options of a frontend and its engines must be alike."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.config import ReasoningConfig, StructuredOutputsConfig, WatermarkConfig

    from vllm_pd_plugin.engine_port.served_options import differing_option, served_options


class Processor:
    """A logits processor, as ``LLM()`` may be given one."""


def options(
    outputs: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **config: Any
) -> dict[str, str]:
    """Those of vLLM's defaults, but for what is given."""
    defaults = {"logits_processors": None, "logprobs_mode": "raw_logprobs", "max_logprobs": 20}
    whole = {"reasoning_config": None, "watermark_config": None, **config}
    made: Any = SimpleNamespace(
        structured_outputs_config=StructuredOutputsConfig(**outputs or {}),
        model_config=SimpleNamespace(**{**defaults, **(model or {})}),
        **whole,
    )
    return served_options(made)


def reasoning(start: list[int], end: list[int]) -> ReasoningConfig:
    """One whose tokens are known, as an engine's are."""
    made = ReasoningConfig()
    made._reasoning_start_token_ids, made._reasoning_end_token_ids = start, end
    made._natural_reasoning_end_token_ids, made._enabled = end, True
    return made


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        (options({"reasoning_parser": "qwen3"}), "--reasoning-parser"),
        (options(reasoning_config=reasoning([1], [2])), "--reasoning-config"),
        (options(model={"logits_processors": [Processor]}), "--logits-processors"),
        (options(model={"logprobs_mode": "raw_logits"}), "--logprobs-mode"),
        (options(watermark_config=WatermarkConfig(key=5)), "--watermark-config"),
        (
            options({"backend": "xgrammar", "disable_any_whitespace": True}),
            "--structured-outputs-config.disable_any_whitespace",
        ),
        (
            options({"backend": "guidance", "disable_additional_properties": True}),
            "--structured-outputs-config.disable_additional_properties",
        ),
        (
            options({"enable_in_reasoning": True}),
            "--structured-outputs-config.enable_in_reasoning",
        ),
    ],
)
def test_what_an_engine_samples_by_is_compared(changed: dict[str, str], name: str) -> None:
    said = differing_option(options(), changed)
    assert said == (
        f"its {name} is {changed[name]}, and this frontend's is {options()[name]}; "
        "give both the same"
    )


@pytest.mark.parametrize(
    "changed",
    [
        options({"backend": "guidance"}),
        options({"reasoning_parser_plugin": "/a/file.py"}),
        options(model={"max_logprobs": 5}),
        options(reasoning_config=ReasoningConfig(reasoning_parser="none of its tokens is known")),
    ],
)
def test_what_only_a_frontend_acts_on_is_not(changed: dict[str, str]) -> None:
    assert differing_option(options(), changed) == ""


def test_thinking_is_told_apart_by_its_tokens_however_they_were_said() -> None:
    assert options(reasoning_config=reasoning([1], [2])) == options(
        reasoning_config=reasoning([1], [2])
    )
    other = options(reasoning_config=reasoning([1], [3]))
    assert differing_option(options(reasoning_config=reasoning([1], [2])), other)


def test_the_key_of_a_watermark_is_told_to_nobody() -> None:
    assert "31337" not in str(options(watermark_config=WatermarkConfig(key=31337)))
