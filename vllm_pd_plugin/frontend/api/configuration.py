"""vLLM's configuration of a process that has its model's tokenizer, and no engine."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

from vllm import AsyncEngineArgs, envs
from vllm.config import LoRAConfig, VllmConfig
from vllm.exceptions import VLLMError
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from vllm_pd_plugin.errors import ConfigError


def check_model(args: argparse.Namespace) -> None:
    """Look for the model, before anything is started for it.

    Raises:
        ConfigError: it is not there, or options do not fit it.
    """
    try:
        import_parsers(args)
        if args.reasoning_parser:
            ReasoningParserManager.get_reasoning_parser(args.reasoning_parser)
        model = AsyncEngineArgs.from_cli_args(args).create_model_config()
    except (OSError, ValueError, KeyError, VLLMError) as error:
        raise ConfigError(f"{args.model} cannot be served: {one_line(error)}") from error
    if model.runner_type != "generate":
        raise ConfigError(f"{args.model} cannot be served: it generates no text")


def import_parsers(args: argparse.Namespace) -> None:
    """Let the parsers of ``--tool-parser-plugin`` and ``--reasoning-parser-plugin`` be known."""
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)


def keep_environment() -> None:
    """Let vLLM remember its environment variables as they are now: it looks some of them up for
    every token. What is set later is not seen.

    One whose value vLLM refuses is left to whoever asks for it.
    """
    with contextlib.suppress(ValueError):
        envs.enable_envs_cache()


def one_line(error: Exception) -> str:
    """Return what an exception of a hub, transformers or pydantic says, without the rest."""
    errors: Any = getattr(error, "errors", None)
    text: str = errors()[0]["msg"] if callable(errors) else str(error)
    if isinstance(error, KeyError):
        text = str(*error.args)  # it would be in quotation marks
    return next(iter(text.splitlines()), type(error).__name__)


def frontend_config(args: argparse.Namespace, max_model_len: int) -> VllmConfig:
    """Return vLLM's configuration for a process that has no engine.

    max_model_len: what every engine takes.
    """
    import_parsers(args)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    model_config = engine_args.create_model_config()
    engine_args._set_default_reasoning_config_args()
    model_config.quantization = None  # no weights are loaded here
    model_config.max_model_len = min(model_config.max_model_len, max_model_len)
    envs.VLLM_CPU_KVCACHE_SPACE = 0  # nor is there a KV cache
    config = VllmConfig(
        model_config=model_config,
        logging_config=engine_args.create_logging_config(),
        structured_outputs_config=engine_args.create_structured_outputs_config(),
        reasoning_config=engine_args.reasoning_config,
        observability_config=engine_args.create_observability_config(),
    )
    # What it needs of a device is the engines' affair, and not looked at here.
    config.watermark_config = engine_args.create_watermark_config()
    if engine_args.enable_lora:
        config.lora_config = LoRAConfig()  # that there are adapters; the engines load them
    config.scheduler_config.stream_interval = engine_args.stream_interval
    config.scheduler_config.max_num_queued_reqs = engine_args.max_num_queued_reqs
    config.scheduler_config.max_num_queued_tokens = engine_args.max_num_queued_tokens
    config.shutdown_timeout = engine_args.shutdown_timeout
    return config
