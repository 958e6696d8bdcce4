"""Options that decide what an answer is, and that both a frontend and its engines act on; pure.

A server of vLLM's own has each of them once. Here a frontend checks requests and reads answers by
its own, and engines sample by theirs: where they differ, answers do, and nothing says so. What only
a frontend acts on (chat templates, tool parsers, ``--max-logprobs``, the backend of structured
output, which goes with each request) is not among them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import ModelConfig, ReasoningConfig, VllmConfig, WatermarkConfig

_NONE = "none"
_OF_STRUCTURED_OUTPUT = (
    "disable_any_whitespace", "disable_additional_properties", "enable_in_reasoning",
)  # fmt: skip


def served_options(config: VllmConfig) -> dict[str, str]:
    """Return them by their names, each value in words that are equal where the values are."""
    outputs = config.structured_outputs_config
    return {
        "--reasoning-parser": outputs.reasoning_parser or _NONE,
        "--reasoning-config": _reasoning(config.reasoning_config),
        "--logits-processors": _processors(config.model_config),
        "--logprobs-mode": config.model_config.logprobs_mode,
        "--watermark-config": _watermark(config.watermark_config),
        **{
            f"--structured-outputs-config.{name}": str(getattr(outputs, name)).lower()
            for name in _OF_STRUCTURED_OUTPUT
        },
    }


def differing_option(
    ours: Mapping[str, str], theirs: Mapping[str, str], whose: str = "this frontend's"
) -> str:
    """Say in which option an engine differs; empty where none is known to. whose: ``ours``."""
    for name, value in ours.items():
        its = theirs.get(name, value)
        if its != value:
            return f"its {name} is {its}, and {whose} is {value}; give both the same"
    return ""


def _reasoning(reasoning: ReasoningConfig | None) -> str:
    """Return the tokens between which a model thinks, however they came to be known."""
    if reasoning is None or not reasoning.enabled:
        return _NONE
    ends = (reasoning.reasoning_end_token_ids, reasoning.natural_reasoning_end_token_ids)
    return f"tokens {reasoning.reasoning_start_token_ids} to {' or '.join(map(str, ends))}"


def _processors(model: ModelConfig) -> str:
    names = [
        each if isinstance(each, str) else f"{each.__module__}:{each.__qualname__}"
        for each in model.logits_processors or ()
    ]
    return ", ".join(names) or _NONE


def _watermark(watermark: WatermarkConfig | None) -> str:
    return repr(watermark) if watermark is not None else _NONE  # without its key
