"""A deployment as one file says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.deployment import (
    Deployment,
    parse_deployment,
    read_deployment,
    take_deployment,
)
from vllm_pd_plugin.frontend.option_words import nested, words_of
from vllm_pd_plugin.frontend.routing.choice import Role

EXAMPLE = Path(__file__).parents[3] / "examples" / "ray_serve.yaml"


def make(**content: Any) -> Deployment:
    return parse_deployment({"model": "M", **content}, "this")


def test_the_example_is_a_deployment() -> None:
    deployment = read_deployment(EXAMPLE)
    assert deployment.prefill.replicas == deployment.decode.replicas == 1
    assert deployment.slo["default"].ttft_ms == 2000


def test_a_number_is_how_many_engines_there_are() -> None:
    deployment = make(prefill=2, decode="3", frontend=4)
    assert deployment.prefill.replicas == 2
    assert deployment.decode.replicas == 3
    assert deployment.frontend.replicas == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"modle": "M"}, "modle: Extra inputs"),
        ({"decode": {"replica": 2}}, "decode.replica: Extra inputs"),
        ({"decode": 0}, "at least one engine must decode"),
        ({"decode": {"autoscaling": {"min_replicas": 0, "max_replicas": 2}}}, "must be 1 at least"),
        ({"decode": {"autoscaling": {"min_replicas": 3, "max_replicas": 2}}}, "is less than"),
        ({"prefill": {"role_change": True}}, "for the pool `both` only"),
        (
            {
                "prefill": {"autoscaling": {"min_replicas": 0, "max_replicas": 2}},
                "routing": {"no_prefill": "fail"},
            },
            "no request would ever bring an engine back",
        ),
        (
            {"both": 1, "decode": {"autoscaling": {"max_replicas": 2}}},
            "prefill and decode have a fixed number",
        ),
        ({"frontend": {"args": {"api_key": "secret"}}}, "set VLLM_API_KEY"),
        ({"decode": {"engine_args": {"api-key": "secret"}}}, "set VLLM_API_KEY"),
        ({"both": {"autoscaling": {"max_replicas": 2}}}, "only prefill and decode scale"),
        (
            {"decode": {"autoscaling": {"max_replicas": 2, "initial_replicas": 3}}},
            "initial_replicas is not between",
        ),
        ({"frontend": {"args": {"wait_for_engines": 3}}}, "wait-for-engines cannot be set here"),
        ({"engine_args": {"kv_role": "both"}}, "kv-role cannot be set here"),
        ({"prefill": {"engine_args": {"port": 1}}}, "port cannot be set here"),
        ({"decode": {"engine_args": {"kv-transfer-config": "{}"}}}, "use `kv`"),
        ({"slo": {"default": {"ttft_ms": 0, "tpot_ms": 5}}}, "slo.default.ttft_ms"),
        ({"kv": {"codec": "zip"}}, "kv.codec"),
        ({"model": ""}, "model: "),
    ],
)
def test_what_is_wrong_is_refused_by_name(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match="this is no deployment") as caught:
        make(**content)
    assert message in str(caught.value)


def test_options_become_words() -> None:
    options = {
        "max_model_len": 9,
        "enforce-eager": True,
        "async-scheduling": False,
        "left-out": None,
        "names": ["a", "b"],
        "config": {"a": 1},
    }
    assert words_of(options) == [
        "--max-model-len", "9", "--enforce-eager", "--no-async-scheduling",
        "--names", "a", "b", "--config", '{"a": 1}',
    ]  # fmt: skip


def test_a_pool_s_options_come_on_top_of_those_for_all() -> None:
    deployment = make(
        served_model_name="name",
        engine_args={"dtype": "float32", "max_num_seqs": 8},
        decode={"engine_args": {"max-num-seqs": 4}},
        kv={"codec": "int8", "options": {"integrity": "digest"}},
    )
    words = deployment.engine_words(Role.DECODE)
    assert words[:6] == [
        "--dtype", "float32", "--max-num-seqs", "4", "--served-model-name", "name",
    ]  # fmt: skip
    assert deployment.engine_words(Role.PREFILL)[3] == "8"
    assert words[6] == "--kv-transfer-config"
    assert '"host": "10.0.0.7"' in deployment.engine_words(Role.DECODE, host="10.0.0.7")[7]
    assert '"codec": "int8"' in words[7]
    assert '"integrity": "digest"' in words[7]


def test_a_frontend_gets_what_concerns_it() -> None:
    deployment = make(
        engine_args={"dtype": "float32", "gpu_memory_utilization": 0.5},
        slo={"default": {"ttft_ms": 500, "tpot_ms": 50}, "batch": {"ttft_ms": 9e4, "tpot_ms": 200}},
        routing={"no_prefill": "queue", "local_below": 0},
        frontend={"args": {"queue-timeout": 9, "tool_call_parser": "hermes"}},
    )
    assert deployment.frontend_words() == [
        "--dtype", "float32",
        "--prefill-strategy", "best", "--decode-strategy", "best",
        "--no-prefill", "queue", "--local-below", "0",
        "--queue-timeout", "9", "--tool-call-parser", "hermes",
        "--slo", "default=500/50", "--slo", "batch=90000/200",
    ]  # fmt: skip


def test_a_frontend_samples_as_its_engines_do() -> None:
    said = {
        "reasoning_parser": "qwen3",
        "logprobs-mode": "raw_logits",
        "structured-outputs-config.disable_any_whitespace": True,
        "enforce_eager": True,
    }
    assert make(engine_args=said).frontend_words()[:5] == [
        "--reasoning-parser", "qwen3", "--logprobs-mode", "raw_logits",
        "--structured-outputs-config.disable_any_whitespace",
    ]  # fmt: skip
    assert "--enforce-eager" not in make(engine_args=said).frontend_words()


def test_a_change_for_all_engines_is_another_generation() -> None:
    first = make(engine_args={"dtype": "float32"})
    assert first.generation == make(engine_args={"dtype": "float32"}, decode=3).generation
    assert first.generation != make(engine_args={"dtype": "half"}).generation
    other = parse_deployment({"model": "N", "engine_args": {"dtype": "float32"}}, "this")
    assert first.generation != other.generation


def test_environment_is_for_all_engines_or_those_of_a_pool() -> None:
    deployment = make(env={"A": "1", "B": "1"}, prefill={"env": {"B": "2"}})
    assert deployment.engine_environ(Role.PREFILL) == {"A": "1", "B": "2"}
    assert deployment.engine_environ(Role.DECODE) == {"A": "1", "B": "1"}


def test_this_machine_runs_it_too_but_does_not_scale() -> None:
    assert make(prefill=2, both=1).up_words()[:6] == [
        "--prefill", "2", "--decode", "1", "--both", "1",
    ]  # fmt: skip
    scaling = make(decode={"autoscaling": {"max_replicas": 2}})
    with pytest.raises(ConfigError, match="decode scales .* needs Ray Serve"):
        scaling.up_words()


def test_a_deployment_comes_from_a_plain_file_too(tmp_path: Path) -> None:
    path = tmp_path / "deployment.yaml"
    path.write_text("model: M\nprefill: 2\n")
    deployment, rest = take_deployment(["--deployment", str(path), "--port", "80"])
    assert deployment == make(prefill=2)
    assert rest == ["--port", "80"]
    assert take_deployment(["M"]) == (None, ["M"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is no YAML"),
        ("model: M\nprefil: 2", "prefil: Extra inputs"),
        ("applications: []", "has 0 applications"),
        ("just text", "it: "),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "deployment.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="deployment.yaml") as caught:
        read_deployment(path)
    assert message in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_deployment(tmp_path / "none.yaml")


def test_dotted_names_are_a_tree() -> None:
    given = {
        "model": "M",
        "decode.replicas": "2",
        "decode.engine_args.enforce-eager": "true",
        "decode.engine_args.dtype": "float32",
    }
    assert nested(given) == {
        "model": "M",
        "decode": {"replicas": 2, "engine_args": {"enforce-eager": True, "dtype": "float32"}},
    }


@pytest.mark.parametrize(
    "given", [{"decode": "1", "decode.replicas": "2"}, {"decode.replicas": "2", "decode": "1"}]
)
def test_what_is_said_twice_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="decode"):
        nested(given)
