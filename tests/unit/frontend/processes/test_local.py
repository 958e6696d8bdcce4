"""What ``vllm-pd up`` gives each engine: arguments, cores, GPUs, names."""

from __future__ import annotations

import argparse

import pytest

from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.deployment import parse_deployment
from vllm_pd_plugin.frontend.processes.local import (
    divide,
    engine_arguments,
    engine_settings,
    parse_counts,
)
from vllm_pd_plugin.frontend.routing.choice import Role
from vllm_pd_plugin.frontend.typed_words import TypedWords


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    for name in ("--host", "--port", "--dtype", "--max-model-len", "--local-below"):
        parser.add_argument(name)
    parser.add_argument("--api-key", nargs="*")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--enable-ssl-refresh", action="store_true")
    return parser


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--dtype float32 --port 80", "--dtype float32"),
        ("--port=80 --dtype=float32", "--dtype=float32"),
        ("--api-key a b --enforce-eager", "--enforce-eager"),
        ("--enable-ssl-refresh --enforce-eager", "--enforce-eager"),
        ("--served-model-name a b --host 0.0.0.0", "--served-model-name a b"),
        ("--local-below 5 --max_model_len 9", "--max_model_len 9"),
        ("--max-model-len 9 --local_below 5", "--max-model-len 9"),
        ("--api-key", ""),
    ],
)
def test_an_engine_gets_what_is_not_the_frontends_alone(arguments: str, expected: str) -> None:
    got = engine_arguments(TypedWords(make_parser()), arguments.split(), {"--local-below"})
    assert got == expected.split()


def test_engines_get_what_a_deployment_says_and_then_what_was_typed() -> None:
    content = {"model": "M", "engine_args": {"dtype": "half"}, "decode": {"env": {"A": "1"}}}
    deployment = parse_deployment(content, "this")
    settings = engine_settings(deployment, ["--dtype", "float32"])
    words = settings[Role.DECODE].arguments
    assert [*words[:2], *words[-2:]] == ["--dtype", "half", "--dtype", "float32"]
    assert settings[Role.DECODE].environ == {"A": "1"}
    assert settings[Role.PREFILL].environ == {}
    assert engine_settings(None, ["--x"])[Role.BOTH].arguments == ["--x"]


@pytest.mark.parametrize(
    ("num_items", "num_engines", "each", "expected"),
    [
        (2, 2, 0, [[0], [1]]),
        (8, 2, 0, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (5, 2, 0, [[0, 1], [2, 3]]),
        (8, 2, 2, [[0, 1], [2, 3]]),
    ],
)
def test_cores_and_gpus_are_divided_and_none_is_given_twice(
    num_items: int, num_engines: int, each: int, expected: list[list[int]]
) -> None:
    assert divide(range(num_items), num_engines, each) == expected


def counts(prefill: int, decode: int, both: int) -> dict[Role, int]:
    return parse_counts(argparse.Namespace(prefill=prefill, decode=decode, both=both))


def test_somebody_must_decode() -> None:
    assert counts(1, 1, 0)[Role.DECODE] == 1
    assert counts(0, 0, 2)[Role.BOTH] == 2
    with pytest.raises(ConfigError, match="--decode 1 or --both 1"):
        counts(2, 0, 0)
