"""vLLM's configuration of a frontend, which has a model's tokenizer and no engine."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from vllm_pd_plugin.errors import ConfigError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm import envs

    from vllm_pd_plugin.engine_port.served_options import served_options
    from vllm_pd_plugin.frontend import options
    from vllm_pd_plugin.frontend.api.configuration import (
        check_model,
        frontend_config,
        keep_environment,
    )
    from vllm_pd_plugin.frontend.parsing import make_parser

THINKING = '{"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}'


def write_model(folder: Path, **changes: Any) -> Path:
    """A model without weights, and a tokenizer that knows how to think."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 16, "max_position_embeddings": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    words = ["<unk>", "<think>", "</think>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def arguments(model: Path, *words: str) -> argparse.Namespace:
    parser, _ = make_parser("vllm-pd serve", "MODEL ...", "", options.add_engine_options)
    args = parser.parse_args([str(model), "--dtype", "float32", *words])
    args.model = args.model_tag
    assert isinstance(args, argparse.Namespace)
    return args


@pytest.mark.filterwarnings("ignore")  # vLLM's
def test_what_engines_are_told_of_sampling_is_known_here(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    words = ["--reasoning-config", THINKING, "--logprobs-mode", "raw_logits", "--enable-lora"]
    config = frontend_config(arguments(model, *words, "--watermark-config", '{"key": 3}'), 64)
    assert config.model_config.max_model_len == 64
    assert config.reasoning_config is not None
    assert config.reasoning_config.enabled  # else a budget for thinking is refused
    assert config.lora_config is not None
    assert config.watermark_config is not None
    told = served_options(config)
    assert told["--reasoning-config"] == "tokens [1] to [2] or [2]"
    assert told["--logprobs-mode"] == "raw_logits"


@pytest.mark.filterwarnings("ignore")  # vLLM's
def test_a_reasoning_parser_says_how_a_model_thinks(tmp_path: Path) -> None:
    args = arguments(write_model(tmp_path), "--reasoning-parser", "qwen3")
    config = frontend_config(args, 64)
    assert config.reasoning_config is not None
    assert config.reasoning_config.reasoning_start_token_ids == [1]
    assert config.lora_config is None
    assert served_options(config)["--reasoning-parser"] == "qwen3"


@pytest.mark.filterwarnings("ignore")  # vLLM's
def test_a_parser_that_there_is_not_is_said_before_anything_starts(tmp_path: Path) -> None:
    args = arguments(write_model(tmp_path), "--reasoning-parser", "nonesuch")
    with pytest.raises(ConfigError, match="cannot be served: Reasoning parser 'nonesuch' not"):
        check_model(args)
    check_model(arguments(tmp_path))


@pytest.mark.filterwarnings("ignore")  # vLLM's
def test_a_model_that_generates_no_text_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path, architectures=["BertModel"], model_type="bert")
    with pytest.raises(ConfigError, match="it generates no text"):
        check_model(arguments(model))


@pytest.mark.filterwarnings("ignore")  # vLLM's
def test_a_parser_of_the_operator_s_own_is_known(tmp_path: Path) -> None:
    plugin = tmp_path / "own.py"
    plugin.write_text(
        "from vllm.reasoning import ReasoningParserManager\n"
        "from vllm.reasoning.deepseek_r1_reasoning_parser import DeepSeekR1ReasoningParser\n"
        "ReasoningParserManager.register_module('own', module=DeepSeekR1ReasoningParser)\n"
    )
    words = ("--reasoning-parser", "own", "--reasoning-parser-plugin", str(plugin))
    check_model(arguments(write_model(tmp_path), *words))


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Variables that may be kept, and are forgotten at the end."""
    yield monkeypatch
    envs.disable_envs_cache()


def test_a_variable_that_is_set_while_a_frontend_serves_is_not_seen(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "7")
    keep_environment()
    environment.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "8")
    assert envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE == 7


def test_a_variable_that_vllm_refuses_is_refused_to_whoever_asks_for_it_only(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("VLLM_PORT", "tcp://10.0.0.1:8000")  # as Kubernetes has it for its services
    keep_environment()
    with pytest.raises(ValueError, match="appears to be a URI"):
        _ = envs.VLLM_PORT
    environment.setenv("VLLM_COMPUTE_NANS_IN_LOGITS", "0")
    assert not envs.VLLM_COMPUTE_NANS_IN_LOGITS
    environment.setenv("VLLM_COMPUTE_NANS_IN_LOGITS", "1")
    assert not envs.VLLM_COMPUTE_NANS_IN_LOGITS
