"""What a frontend and its engines must both be told: LoRA adapters, and how a model thinks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import models
from tests.adapters import RANK, write_adapter
from tests.engine import HTTP, Engine, connector_arguments, running, start, start_frontend
from tests.engines.conftest import ARGUMENTS, random_prompt

pytestmark = pytest.mark.engine

LORA = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2")
THINKING = (
    "--reasoning-config", '{"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}',
)  # fmt: skip
assert RANK <= 8


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    names = ("first", "second", "later")
    return {
        name: write_adapter(folder / name, models.tiny_llama(), seed)
        for seed, name in enumerate(names)
    }


@pytest.fixture(scope="module")
def servers(logs: Path, adapters: dict[str, Path]) -> Iterator[dict[str, Engine]]:
    path, common = models.tiny_llama(), (*ARGUMENTS["tiny-llama"], *LORA, *THINKING)
    known = ("--lora-modules", *(f"{name}={adapters[name]}" for name in ("first", "second")))
    updating = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    engines = [
        start("alone", path, (*common, *known), cores="0", folder=logs, environ=updating),
        start("p", path, (*common, *connector_arguments("prefill")), cores="0", folder=logs),
        start("d", path, (*common, *connector_arguments("decode")), cores="1", folder=logs),
    ]
    with running(engines):
        _, p, d = engines
        words = ("--prefill", p.url, "--decode", d.url, "--local-below", "0", "--enable-lora")
        words = (*words, *THINKING, *known)
        frontend = start_frontend("serve", path, words, folder=logs, environ=updating)
        with running([frontend]):
            yield {engine.name: engine for engine in engines} | {"frontend": frontend}


def tokens(server: Engine, model: str, prompt: list[int]) -> list[int]:
    answer = HTTP.post(
        f"{server.url}/v1/completions", json=server.body(prompt, 12) | {"model": model}, timeout=120
    )
    answer.raise_for_status()
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


def test_each_adapter_answers_as_on_one_server_and_its_kv_is_its_own(
    servers: dict[str, Engine],
) -> None:
    """The same prompt again and again: whose KV was mixed up with another's would answer as it."""
    base = servers["frontend"].model
    prompt = random_prompt(300, 7)
    expected = {name: tokens(servers["alone"], name, prompt) for name in (base, "first", "second")}
    assert len({tuple(each) for each in expected.values()}) == 3
    for _ in range(2):
        for name, answer in expected.items():
            assert tokens(servers["frontend"], name, prompt) == answer
    routes = 'pd_frontend_routes_total{reason="disaggregated"}'
    assert servers["frontend"].metrics()[routes] == 6


def test_an_adapter_comes_and_goes_while_the_frontend_runs(
    servers: dict[str, Engine], adapters: dict[str, Path]
) -> None:
    frontend, alone = servers["frontend"], servers["alone"]
    load = {"lora_name": "later", "lora_path": str(adapters["later"])}
    for server in (frontend, alone):
        HTTP.post(f"{server.url}/v1/load_lora_adapter", json=load, timeout=60).raise_for_status()
    listed = HTTP.get(f"{frontend.url}/v1/models", timeout=30).json()["data"]
    assert {model["id"] for model in listed} == {frontend.model, "first", "second", "later"}
    prompt = random_prompt(200, 8)
    assert tokens(frontend, "later", prompt) == tokens(alone, "later", prompt)
    unload = {"lora_name": "later"}
    url = f"{frontend.url}/v1/unload_lora_adapter"
    HTTP.post(url, json=unload, timeout=60).raise_for_status()
    body = frontend.body(prompt, 2) | {"model": "later"}
    assert HTTP.post(f"{frontend.url}/v1/completions", json=body, timeout=60).status_code == 404


def test_an_adapter_that_is_not_there_ends_its_request_and_no_engine(
    servers: dict[str, Engine], tmp_path: Path
) -> None:
    frontend = servers["frontend"]
    load = {"lora_name": "nothing", "lora_path": str(tmp_path / "nothing")}
    HTTP.post(f"{frontend.url}/v1/load_lora_adapter", json=load, timeout=60).raise_for_status()
    body = frontend.body(random_prompt(200, 9), 4) | {"model": "nothing"}
    answer = HTTP.post(f"{frontend.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 400
    assert "its LoRA adapter cannot be loaded" in answer.text
    assert len(tokens(frontend, "first", random_prompt(100, 10))) == 12


def test_a_budget_for_thinking_is_kept_as_on_one_server(servers: dict[str, Engine]) -> None:
    prompt = "<think> one two three four five six seven"

    def ask(server: Engine) -> tuple[int, str]:
        body = server.body(prompt, 24, thinking_token_budget=6, ignore_eos=True)
        answer = HTTP.post(f"{server.url}/v1/completions", json=body, timeout=120)
        return answer.status_code, answer.json()["choices"][0]["text"]

    status, text = ask(servers["alone"])
    assert (status, "</think>" in text) == (200, True)
    assert ask(servers["frontend"]) == (status, text)


def test_an_engine_that_was_told_something_else_is_not_used(
    servers: dict[str, Engine], logs: Path
) -> None:
    words = ("--prefill", servers["p"].url, "--decode", servers["d"].url)
    frontend = start_frontend("serve", models.tiny_llama(), words, folder=logs)
    assert frontend.process.wait(60) == 1
    last = frontend.log_tail(1)
    assert "its --reasoning-config is tokens" in last
    assert "and this frontend's is none; give both the same" in last
