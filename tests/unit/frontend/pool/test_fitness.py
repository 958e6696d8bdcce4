"""Which engines can be used together."""

from __future__ import annotations

import dataclasses
import warnings

import pytest

from tests.fakes.engines import make_kv
from vllm_pd_plugin.memory.identity import Weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.fakes.engine_core import describe
    from vllm_pd_plugin.frontend.pool.fitness import Requirement, misfit
    from vllm_pd_plugin.frontend.routing.choice import Role

ENGINE = describe()
WANTED = Requirement(ENGINE.max_model_len, ENGINE.vocab_size, False, ENGINE.vllm_version)
OTHER = make_kv(weights=Weights("sampled:2"))


def test_one_that_is_as_wanted_fits() -> None:
    assert misfit(ENGINE, Role(ENGINE.role), WANTED, ENGINE.kv) == ""
    assert misfit(ENGINE, Role(ENGINE.role), None) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_model_len": 16}, "--max-model-len is 16"),
        ({"vocab_size": 3}, "another vocabulary"),
        ({"vllm_version": "0.1"}, "vLLM 0.1"),
        ({"kv": OTHER}, "weights are sampled:2, expected sampled:1"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, object], words: str) -> None:
    engine = describe(**change)
    assert words in misfit(engine, Role(engine.role), WANTED, ENGINE.kv)


@pytest.mark.parametrize(
    ("role", "changes", "words"),
    [
        ("decode", {"dtype": "float32"}, "dtype is float32, expected bfloat16"),
        ("both", {"dtype": "float32"}, "dtype is float32, expected bfloat16"),
        ("decode", {"kv_cache_dtype": "float16"}, "kv cache dtype is float16"),
        ("prefill", {"dtype": "float32"}, ""),
        ("prefill", {"kv_cache_dtype": "float16"}, ""),
        ("prefill", {"kv_cache_dtype": "fp8"}, "kv cache dtype is fp8, expected bfloat16"),
        ("prefill", {"rope": "{1}"}, "rope is {1}"),
    ],
)
def test_kv_of_another_type_fits_where_it_is_only_computed_and_can_be_converted(
    role: str, changes: dict[str, str], words: str
) -> None:
    """Those that decode are to answer alike."""
    engine = describe(role=role, kv=make_kv(**changes))
    said = misfit(engine, Role(role), WANTED, ENGINE.kv)
    assert words in said
    assert bool(said) is bool(words)


def test_what_becomes_fp8_is_known_only_to_who_is() -> None:
    """A pool that decodes in fp8 has prompts computed in bfloat16, and in nothing wider."""
    pool = make_kv(kv_cache_dtype="fp8")
    for dtype, fits in (("bfloat16", True), ("float16", False), ("float32", False)):
        engine = describe(role="prefill", kv=make_kv(kv_cache_dtype=dtype))
        assert (misfit(engine, Role.PREFILL, WANTED, pool) == "") is fits


@pytest.mark.parametrize(
    ("version", "goes"),
    [
        ("0.32.0", True), ("0.32.1", True), ("0.32.0+cpu", True), ("0.31.0", True),
        ("0.30.9", False), ("0.33.0", False), ("dev", False),
    ],
)  # fmt: skip
def test_an_engine_goes_with_a_frontend_where_their_release_lines_say_the_same(
    version: str, goes: bool
) -> None:
    wanted = dataclasses.replace(WANTED, vllm_version="0.32.0")
    engine = describe(vllm_version=version)
    assert (misfit(engine, Role(engine.role), wanted, ENGINE.kv) == "") is goes


SAMPLING = {"--reasoning-parser": "qwen3", "--logprobs-mode": "raw_logprobs"}


def with_options(options: dict[str, str]) -> str:
    """What is wrong with an engine of these, by a frontend with ``SAMPLING``."""
    wanted = dataclasses.replace(WANTED, options=SAMPLING)
    return misfit(describe(options=options), Role(ENGINE.role), wanted, ENGINE.kv)


def test_an_option_that_both_act_on_must_be_alike_and_is_named_with_both_values() -> None:
    assert with_options(SAMPLING) == ""
    assert with_options(SAMPLING | {"--reasoning-parser": "none"}) == (
        "its --reasoning-parser is none, and this frontend's is qwen3; give both the same"
    )


def test_an_option_of_which_an_engine_says_nothing_is_not_compared() -> None:
    assert with_options({}) == ""
    assert with_options({"--logprobs-mode": "raw_logprobs", "--other": "1"}) == ""


def test_one_that_was_started_for_another_role_is_refused() -> None:
    assert "--kv-role decode" in misfit(describe(role="decode"), Role.PREFILL, WANTED)
