"""Which of vLLM's modules run, in which order, and which do not, and why."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

SERVER = "RemoteOpenAIServer"
"""What a module that starts a server names, itself or in its folder's conftest.py."""

_ASKS = re.compile(r"def test_\w+\([^)]*(client|server)")
"""A test that has a server from conftest.py."""

FOLDERS = ("tests/entrypoints", "tests/v1", "tests/tool_use")


@dataclasses.dataclass(frozen=True, slots=True)
class Module:
    """A file of vLLM's tests. deadline_s: for one run of it on one arm."""

    path: str
    deadline_s: float = 1200.0


_OPENAI = "tests/entrypoints/openai"
_SERVE = "tests/entrypoints/serve"
_CORE = "tests/v1/core"
_CONNECTOR = "tests/v1/kv_connector/unit"

PLAN = (
    Module(f"{_SERVE}/tokenize/test_tokenization.py"),
    Module(f"{_SERVE}/instrumentator/test_basic.py"),
    Module(f"{_OPENAI}/completion/test_completion.py"),
    Module(f"{_OPENAI}/chat_completion/test_chat.py", 2400.0),
    Module(f"{_OPENAI}/chat_completion/test_chat_completion.py"),
    Module(f"{_OPENAI}/chat_completion/test_batched_chat_completions.py"),
    Module(f"{_OPENAI}/chat_completion/test_chat_echo.py"),
    Module(f"{_OPENAI}/chat_completion/test_chat_logit_bias_validation.py"),
    Module(f"{_OPENAI}/chat_completion/test_completion_with_function_calling.py", 2400.0),
    Module(f"{_OPENAI}/chat_completion/test_enable_force_include_usage.py"),
    Module(f"{_OPENAI}/chat_completion/test_include_reasoning.py"),
    Module(f"{_OPENAI}/chat_completion/test_logprob_token_ids.py"),
    Module(f"{_OPENAI}/chat_completion/test_root_path.py"),
    Module(f"{_OPENAI}/chat_completion/test_thinking_token_budget.py"),
    Module(f"{_OPENAI}/completion/test_prompt_validation.py"),
    Module(f"{_OPENAI}/completion/test_token_in_token_out.py"),
    Module(f"{_OPENAI}/models/test_models.py"),
    Module(f"{_OPENAI}/responses/test_basic.py"),
    Module(f"{_OPENAI}/responses/test_errors.py"),
    Module(f"{_OPENAI}/responses/test_function_call.py"),
    Module(f"{_OPENAI}/responses/test_namespace_tool_separator.py"),
    Module(f"{_OPENAI}/responses/test_simple.py", 2400.0),
    Module(f"{_OPENAI}/responses/test_stateful.py"),
    Module(f"{_OPENAI}/responses/test_structured_output.py"),
    Module(f"{_OPENAI}/test_chunked_prompt.py"),
    Module(f"{_OPENAI}/test_return_token_ids.py"),
    Module(f"{_OPENAI}/test_return_tokens_as_ids.py"),
    Module("tests/entrypoints/anthropic/test_messages.py"),
    Module("tests/entrypoints/generate/generative_scoring/test_generative_scoring_e2e.py"),
    Module("tests/entrypoints/generate/structured_decisions/test_structured_decisions_e2e.py"),
    Module("tests/entrypoints/launchers/api_server/test_multi_api_servers.py"),
    Module("tests/entrypoints/launchers/test_shutdown.py"),
    Module("tests/entrypoints/scale_out/derender/test_derender_parity.py"),
    Module("tests/entrypoints/scale_out/token_in_token_out/test_serving_tokens.py", 2400.0),
    Module("tests/entrypoints/tool_parsers/test_hermes_tool_parser.py"),
    Module(f"{_SERVE}/instrumentator/test_metrics.py"),
    Module(f"{_SERVE}/instrumentator/test_orca_metrics.py"),
    Module(f"{_SERVE}/instrumentator/test_uds.py"),
    Module(f"{_SERVE}/middleware/test_optional_middleware.py"),
    Module(f"{_SERVE}/sagemaker/test_sagemaker_handler_overrides.py"),
    Module(f"{_SERVE}/sagemaker/test_sagemaker_middleware_integration.py"),
    Module(f"{_SERVE}/sagemaker/test_sagemaker_stateful_sessions.py"),
    # No servers: vLLM's scheduler and connectors, without and with this plug-in in the process.
    Module(f"{_CORE}/test_scheduler.py"),
    Module(f"{_CORE}/test_async_scheduler.py"),
    Module(f"{_CORE}/test_scheduler_e2e.py"),
    Module(f"{_CORE}/test_deferred_block_free.py"),
    Module(f"{_CORE}/test_kv_cache_utils.py"),
    Module(f"{_CORE}/test_prefix_caching.py"),
    Module(f"{_CORE}/test_single_type_kv_cache_manager.py"),
    Module(f"{_CONNECTOR}/test_bidirectional_kv_transfer.py"),
    Module(f"{_CONNECTOR}/test_cache_pollution_prevention.py"),
    Module(f"{_CONNECTOR}/test_config.py"),
    Module(f"{_CONNECTOR}/test_error_propagation.py"),
    Module(f"{_CONNECTOR}/test_invalid_blocks_correctness.py"),
    Module(f"{_CONNECTOR}/test_kv_connector_lifecycle.py"),
    Module(f"{_CONNECTOR}/test_kv_load_failure_recovery.py"),
    Module(f"{_CONNECTOR}/test_multi_connector.py"),
    Module(f"{_CONNECTOR}/test_nixl_connector.py"),
    Module(f"{_CONNECTOR}/test_output_aggregator.py"),
    Module(f"{_CONNECTOR}/test_remote_decode_lifecycle.py"),
    Module(f"{_CONNECTOR}/test_remote_prefill_lifecycle.py"),
    Module(f"{_CONNECTOR}/test_scheduler_kv_connector_override.py"),
)

_NO_IMAGES = "images, audio and video, which a frontend refuses"
_NO_POOLING = "embeddings, scores and classes, which a frontend does not serve"
_NO_LORA = "adapters with weights, which the cache of models does not have"
_NO_ACTING = "endpoints that act on an engine, which a frontend does not have"
_NOT_OFFLINE = "a vocabulary or a data set that has to be downloaded"
_SEVERAL_RANKS = "several GPUs, or machines"
_NO_COMMAND = "nothing: its servers are not started by a command, or are fakes"

LEFT_OUT = {
    "tests/entrypoints/multimodal/*": _NO_IMAGES,
    "tests/entrypoints/speech_to_text/*": _NO_IMAGES,
    "tests/entrypoints/scale_out/*multimodal*": _NO_IMAGES,
    f"{_SERVE}/tokenize/*_vlm.py": _NO_IMAGES,
    f"{_OPENAI}/test_openai_schema.py": _NO_IMAGES,
    f"{_OPENAI}/chat_completion/test_extra_content_fields.py": _NO_IMAGES,
    "tests/entrypoints/pooling/*": _NO_POOLING,
    f"{_SERVE}/lora/*": _NO_LORA,
    f"{_SERVE}/sagemaker/test_sagemaker_lora_adapters.py": _NO_LORA,
    "tests/entrypoints/rl/*": _NO_ACTING,
    f"{_SERVE}/dev/rpc/*": _NO_ACTING,
    f"{_OPENAI}/*prompt_embeds.py": "prompts of embeddings, which a frontend refuses",
    f"{_OPENAI}/completion/test_tensorizer_entrypoint.py": "weights in a format of Tensorizer's",
    f"{_OPENAI}/chat_completion/test_serving_chat.py": _NOT_OFFLINE,
    f"{_OPENAI}/correctness/*": _NOT_OFFLINE,
    f"{_OPENAI}/responses/test_harmony.py": _NOT_OFFLINE,
    f"{_OPENAI}/responses/test_harmony_utils.py": _NO_COMMAND,
    f"{_OPENAI}/responses/test_mcp_tools.py": _NOT_OFFLINE,
    f"{_OPENAI}/responses/test_parsable_context.py": _NOT_OFFLINE,
    "tests/entrypoints/tool_parsers/test_granite4_tool_parser.py": _NOT_OFFLINE,
    "tests/entrypoints/tool_parsers/test_openai_tool_parser.py": _NOT_OFFLINE,
    "tests/entrypoints/cohere/*": "Cohere's SDK",
    "tests/v1/sample/test_logprobs_e2e.py": _NOT_OFFLINE,
    "tests/v1/*distributed*": _SEVERAL_RANKS,
    "tests/v1/determinism/*": _SEVERAL_RANKS,
    "tests/v1/ec_connector/*": _NO_IMAGES,
    "tests/v1/fault_tolerance/*": _SEVERAL_RANKS,
    "tests/v1/core/prefix_cache/*": "a model with Mamba layers",
    "tests/v1/logits_processors/*": _NO_COMMAND,
    "tests/entrypoints/unit_tests/*": _NO_COMMAND,
    "tests/tool_use/*": "models that were taught to call tools",
}
"""By pattern, what a module needs that is not here."""


def undecided(source: Path) -> list[str]:
    """Return the modules that start a server and are neither in the plan nor left out.

    A new version of vLLM has new ones: somebody has to decide. source: vLLM's tests.
    """
    planned = {module.path for module in PLAN}
    return [
        path
        for path in _starting_a_server(source)
        if path not in planned and not any(fnmatch(path, pattern) for pattern in LEFT_OUT)
    ]


def _starting_a_server(source: Path) -> list[str]:
    found = []
    for folder in FOLDERS:
        for path in sorted((source / folder).rglob("test_*.py")):
            text, near = path.read_text(), path.parent / "conftest.py"
            by_fixture = near.exists() and SERVER in near.read_text() and _ASKS.search(text)
            if SERVER in text or by_fixture:
                found.append(path.relative_to(source).as_posix())
    return found


def chosen(pattern: str) -> Sequence[Module]:
    """Return the modules whose path contains a word; all for an empty one."""
    return [module for module in PLAN if pattern in module.path]
