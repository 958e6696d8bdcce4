"""The command line and `LLM()`, as a new user meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import models
from tests.engine import hand_off, running, start
from tests.engines.conftest import ARGUMENTS, Trio, random_prompt
from tests.parity import FLOAT32, compare

pytestmark = pytest.mark.engine

REPO = Path(__file__).resolve().parents[2]


def run(*arguments: str, environ: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a command to its end; return its status and all that it printed."""
    outcome = subprocess.run(
        [sys.executable, *arguments] if arguments[0].endswith(".py") else list(arguments),
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **(environ or {})},
        cwd=REPO,
    )
    return outcome.returncode, outcome.stdout + outcome.stderr


def vllm_serve(*arguments: str, environ: dict[str, str] | None = None) -> tuple[int, str]:
    command = str(Path(sys.executable).with_name("vllm"))
    return run(command, "serve", *arguments, environ=environ)


def test_help_shows_the_flags() -> None:
    status, text = vllm_serve("--help=all")
    assert status == 0
    assert "--kv-connector {pdplugin}" in text
    assert "--kv-role {prefill,decode,both}" in text


def test_a_wrong_role_is_refused_with_the_allowed_ones() -> None:
    status, text = vllm_serve("model", "--kv-connector", "pdplugin", "--kv-role", "prefiller")
    assert status == 2
    assert "invalid choice: 'prefiller'" in text
    assert "decode" in text


REFUSED = {
    "unknown option": (
        ["--kv-transfer-config.kv_connector_extra_config.leese_s", "3"],
        ["has no option 'leese_s'", "lease_s"],
    ),
    "open address without a key": (
        ["--kv-transfer-config.kv_connector_extra_config.host", "10.0.0.1"],
        ["host='10.0.0.1'", "VLLM_PD_CLUSTER_KEY"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_option_is_refused_before_anything_is_loaded(name: str) -> None:
    arguments, expected = REFUSED[name]
    status, text = vllm_serve("model", "--kv-connector", "pdplugin", *arguments)
    assert status == 2
    last = text.strip().splitlines()[-1]
    assert all(part in last for part in expected), last


def test_an_unsupported_layout_is_refused_before_anything_is_loaded() -> None:
    status, text = vllm_serve(
        str(models.tiny_llama()), "--kv-connector", "pdplugin", "--pipeline-parallel-size", "2"
    )
    assert status == 1
    assert "--pipeline-parallel-size=2 is not supported by pdplugin yet; use 1" in text
    assert "Loading weights" not in text


def test_a_refused_config_of_llm_says_what_to_do() -> None:
    code = (
        "from vllm import LLM; import sys; "
        f"LLM({str(models.tiny_llama())!r}, kv_transfer_config={{'kv_connector': 'pdplugin', "
        "'kv_role': 'kv_both', 'kv_connector_extra_config': {'lease_s': -1}})"
    )
    status, text = run(sys.executable, "-c", code)
    assert status == 1
    assert "lease_s=-1 is not a time; allowed are 0.05 to 86400 seconds" in text


def test_json_yaml_and_the_role_both_start_engines_that_work(
    logs: Path, tmp_path: Path, llama: Trio
) -> None:
    """One engine of each form, with an encrypted control channel, each fetching from the other."""
    key = {"VLLM_PD_CLUSTER_KEY": "0123456789abcdef0123456789abcdef"}
    path, common = models.tiny_llama(), ARGUMENTS["tiny-llama"]
    yaml = tmp_path / "engine.yaml"
    yaml.write_text("kv-connector: pdplugin\nkv-role: both\n")
    as_json = {
        "kv_connector": "pdplugin",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"host": "0.0.0.0", "advertise_host": "127.0.0.1"},
    }
    engines = [
        start("yaml", path, (*common, "--config", str(yaml)), cores="0", folder=logs, environ=key),
        start(
            "json",
            path,
            (*common, "--kv-transfer-config", json.dumps(as_json)),
            cores="1",
            folder=logs,
            environ=key,
        ),
    ]
    with running(engines) as (one, other):
        for producer, consumer, seed in ((one, other, 500), (other, one, 501)):
            prompt = random_prompt(400, seed)
            expected = llama.alone.complete(prompt, 8)
            compare(expected, hand_off(producer, consumer, prompt, 8), FLOAT32)
        for engine in engines:
            engine.wait_until_at_rest()
        assert "encrypted" in one.log.read_text()
        assert key["VLLM_PD_CLUSTER_KEY"] not in one.log.read_text()
        # An engine without the key cannot talk to them.
        with pytest.raises(AssertionError, match="still holds KV"):
            _fetch_without_key(one, llama)
    llama.assert_at_rest()


def _fetch_without_key(producer: object, llama: Trio) -> None:
    from tests.engine import PRODUCE, Engine

    assert isinstance(producer, Engine)
    prompt = random_prompt(300, 502)
    first = producer.complete(prompt, 1, kv_transfer_params=PRODUCE)
    before = llama.consumer.metrics().get('pd_handoff_failures_total{reason="peer_unreachable"}', 0)
    import httpx

    with pytest.raises(httpx.HTTPStatusError):
        llama.consumer.complete(prompt, 4, kv_transfer_params=first.kv_transfer_params)
    after = llama.consumer.metrics()['pd_handoff_failures_total{reason="peer_unreachable"}']
    assert after == before + 1
    producer.wait_until_at_rest(1)


def test_vllm_pd_check_finds_everything() -> None:
    status, text = run(str(Path(sys.executable).with_name("vllm-pd")), "check")
    assert status == 0
    assert text.count("ok ") == 5
    assert "native extension: built" in text


def test_the_offline_example_answers_alike() -> None:
    status, text = run("examples/offline_llm.py", str(models.smollm2()))
    assert status == 0, text[-3000:]
    assert "identical: yes" in text
    assert "Paris" in text
