"""Behind a router that we did not write, and in the other ways to start an engine."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import models
from tests.engine import (
    Completion,
    Engine,
    free_port,
    hand_off,
    parse_completion,
    parse_event,
    running,
    start_frontend,
)
from tests.engines import outages, overload
from tests.engines.conftest import Trio, random_prompt
from tests.http_client import HTTP
from tests.parity import FLOAT32, compare

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def router(llama: Trio, logs: Path) -> Iterator[str]:
    """The real vllm-router in front of the producer and the consumer."""
    port, metrics_port = free_port(), free_port()
    command = [
        str(Path(sys.executable).with_name("vllm-router")), "--vllm-pd-disaggregation",
        "--prefill", llama.producer.url, "--decode", llama.consumer.url,
        "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port),
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with (logs / "router.log").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until_healthy(url, process, logs / "router.log")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if HTTP.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError(f"the router did not start:\n{log.read_text()[-2000:]}")


def ask_router(router: str, engine: Engine, prompt: list[int], max_tokens: int) -> Completion:
    body = engine.body(prompt, max_tokens)
    answer = HTTP.post(f"{router}/v1/completions", json=body, timeout=120)
    answer.raise_for_status()
    return parse_completion(answer.json())


def test_answers_through_vllm_router_equal_one_engines(llama: Trio, router: str) -> None:
    prompts = [random_prompt(60 + 61 * i, 400 + i) for i in range(16)]
    expected = [llama.alone.complete(prompt, 8) for prompt in prompts]
    before = llama.consumer.metrics()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda p: ask_router(router, llama.consumer, p, 8), prompts))
    for one, other in zip(expected, answers, strict=True):
        compare(one, other, FLOAT32)
    after = llama.consumer.metrics()
    fetched = after["pd_fetch_seconds_count"] - before.get("pd_fetch_seconds_count", 0)
    assert fetched == len(prompts)
    llama.assert_at_rest()


def test_a_streamed_chat_through_vllm_router_equals_one_engines(llama: Trio, router: str) -> None:
    body = {
        "model": llama.alone.model,
        "messages": [{"role": "user", "content": "Count to twenty, please. " * 30}],
        "max_tokens": 24,
        "temperature": 0,
        "stream": True,
    }
    question = f"a streamed chat: {body}"
    expected = llama.alone.keep(question, lambda one: streamed_text(one.url, body))
    assert streamed_text(router, body) == expected != ""
    llama.assert_at_rest()


def streamed_text(url: str, body: dict[str, object]) -> str:
    text = ""
    with HTTP.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            for choice in (parse_event(line) or {}).get("choices", ()):
                text += choice["delta"].get("content") or ""
    return text


def test_two_choices_share_one_handoff(llama: Trio) -> None:
    prompt = random_prompt(300, 432)
    sampling = {"temperature": 0.9, "seed": 3, "n": 2}
    question = f"two choices of prompt 432, {sampling}"
    expected = llama.alone.keep(question, lambda one: choices_of(one, prompt, None, sampling))
    params = llama.producer.complete(
        prompt, 1, kv_transfer_params={"do_remote_decode": True}
    ).kv_transfer_params
    before = llama.consumer.metrics()["pd_fetch_seconds_count"]
    assert choices_of(llama.consumer, prompt, params, sampling) == expected
    assert llama.consumer.metrics()["pd_fetch_seconds_count"] == before + 1
    llama.assert_at_rest()


def choices_of(
    engine: Engine, prompt: list[int], params: Mapping[str, Any] | None, sampling: dict[str, Any]
) -> list[list[int]]:
    """Return the tokens of every choice."""
    body = engine.body(prompt, 8, params, **sampling)
    answer = HTTP.post(f"{engine.url}/v1/completions", json=body, timeout=60)
    answer.raise_for_status()
    return [choice["token_ids"] for choice in answer.json()["choices"]]


def test_prompt_logprobs_are_computed_on_the_consumer_and_free_the_producer(llama: Trio) -> None:
    prompt = random_prompt(300, 430)
    expected = llama.alone.complete(prompt, 4, prompt_logprobs=1)
    answer = hand_off(llama.producer, llama.consumer, prompt, 4, prompt_logprobs=1)
    compare(expected, answer, FLOAT32)
    llama.assert_at_rest()


def test_min_tokens_and_penalties_survive_the_handoff(llama: Trio) -> None:
    prompt = random_prompt(300, 431)
    options = {"presence_penalty": 1.0, "repetition_penalty": 1.2}
    expected = llama.alone.complete(prompt, 12, min_tokens=6, **options)
    first = llama.producer.complete(
        prompt, 1, kv_transfer_params={"do_remote_decode": True}, **options
    )
    answer = llama.consumer.complete(
        prompt, 12, kv_transfer_params=first.kv_transfer_params, min_tokens=6, **options
    )
    compare(expected, answer, FLOAT32)


# --- engines between which nothing can be handed over ----------------------------------------


def assert_all_are_answered(kind: outages.Kind, num_requests: int, llama: Trio, logs: Path) -> None:
    """Every answer is the right one; how long the first token takes is reported."""
    with outages.outage(kind, llama, logs) as (frontend, decode):
        here, there = [], []
        for number in range(num_requests):
            prompt = random_prompt(300, 800 + number)
            expected = llama.alone.tokens(prompt, 8)
            answer, first_s = outages.streamed(frontend, prompt, 8)
            assert answer == expected, f"request {number}"
            there.append(first_s)
            # Another prompt of the same length: this one is in the engine's cache now.
            here.append(outages.streamed(decode, random_prompt(300, 1800 + number), 8)[1])
        ratio = statistics.median(there[3:]) / statistics.median(here[3:])
        print(f"{kind.__name__}: TTFT from the fourth request on {ratio:.2f} of the engine's alone")
        metrics = frontend.metrics()
        failed = {
            k: v for k, v in metrics.items() if k.startswith("pd_frontend_failures_total") and v
        }
        pool = HTTP.get(f"{frontend.url}/pd/v1/pool", timeout=10).json()["engines"]
        states = {engine["url"]: (engine["state"], engine["problem"]) for engine in pool}
        assert (failed, states[decode.url][0]) == ({}, "up")
        if kind is not outages.other_weights:  # of which nothing is tried
            assert metrics["pd_frontend_pairs_open"] == 1
            assert "handoffs from" in states[decode.url][1]
            assert metrics['pd_frontend_routes_total{reason="disaggregated"}'] < num_requests / 2
        decode.wait_until_at_rest(60)


@pytest.mark.timeout(600)
def test_a_pool_whose_engines_do_not_reach_each_other_answers_every_request(
    llama: Trio, logs: Path
) -> None:
    assert_all_are_answered(outages.control_unreachable, 10, llama, logs)


@pytest.mark.outage
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "kind",
    [
        outages.nixl_unreachable,
        outages.control_unreachable,
        outages.other_weights,
        outages.other_blocks,
    ],
    ids=lambda kind: kind.__name__,
)
def test_whatever_keeps_a_pool_from_handing_off_it_answers_every_request(
    kind: outages.Kind, llama: Trio, logs: Path
) -> None:
    assert_all_are_answered(kind, 50, llama, logs)


@pytest.mark.outage
@pytest.mark.timeout(600)
def test_five_times_the_load_that_a_pool_can_carry_is_turned_away_in_time(
    llama: Trio, logs: Path
) -> None:
    bound_s = 5
    pool = ("--prefill", llama.producer.url, "--decode", llama.consumer.url)
    words = (*pool, "--max-model-len", "4096", "--queue-timeout", str(bound_s))
    frontend = start_frontend("serve", models.tiny_llama(), words, folder=logs)
    with running([frontend]):
        seeds = itertools.count(50_000)
        overload.rate(frontend, 5, seeds)  # engines' rates are learnt
        rate = overload.rate(frontend, 10, seeds)
        outcomes = overload.flood(frontend, 5 * rate, 60, 100_000)
        ended_at = time.monotonic()
        answered = sorted(each.ttft_s for each in outcomes if each.status == 200)
        refused = [each for each in outcomes if each.status != 200]
        p99 = answered[int(0.99 * (len(answered) - 1))]
        print(
            f"{rate:.1f} requests a second; of {len(outcomes)} at five times that "
            f"{len(answered)} were answered, TTFT p50 {statistics.median(answered):.2f} s, "
            f"p99 {p99:.2f} s, and {len(refused)} refused"
        )
        assert {each.status for each in refused} <= {429, 503}
        assert all(int(each.retry_after or 0) >= 1 for each in refused)
        assert not [each.error for each in outcomes if each.error]
        assert len(answered) > 0.6 * rate * 60, "less than it can do"
        assert p99 < bound_s + 2
        engines = HTTP.get(f"{frontend.url}/pd/v1/pool", timeout=10).json()["engines"]
        assert {engine["state"] for engine in engines} == {"up"}
        metrics = frontend.metrics()
        assert metrics["pd_frontend_engines_lost_total"] == 0
        assert not any(v for k, v in metrics.items() if k.startswith("pd_frontend_retries_total"))
        for engine in (llama.producer, llama.consumer):
            engine.wait_until_at_rest(max(1, 10 - (time.monotonic() - ended_at)))
        deadline = time.monotonic() + 5
        while frontend.metrics()["pd_frontend_requests_open"]:  # told a few times a second
            assert time.monotonic() < deadline
            time.sleep(0.2)
