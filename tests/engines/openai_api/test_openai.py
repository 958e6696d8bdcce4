"""A frontend over engines answers as one server does."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import models
from tests.engine import Engine, free_port, running, start_frontend
from tests.engines.conftest import Trio
from tests.engines.openai_api.cases import (
    CASES,
    STORY,
    chat,
    complete,
    plain,
)
from tests.engines.openai_api.servers import client_of
from tests.http_client import HTTP

pytestmark = pytest.mark.engine


@pytest.fixture(scope="package")
def expected() -> dict[str, Any]:
    """What one server has answered so far, by case."""
    return {}


@pytest.mark.parametrize("name", CASES)
def test_the_answer_is_that_of_one_server(
    alone: Engine, frontend: Engine, expected: dict[str, Any], name: str
) -> None:
    ask = CASES[name]
    if name not in expected:
        expected[name] = ask(client_of(alone), alone.model)
    assert ask(client_of(frontend), frontend.model) == expected[name]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_one_server(
    alone: Engine, frontend: Engine, stream: bool
) -> None:
    """Of the first token too, which another engine has sampled."""

    def ask(server: Engine) -> list[tuple[str, dict[str, float]]]:
        options = {"logprobs": True, "top_logprobs": 5, "max_tokens": 12, "stream": stream}
        answer = chat(client_of(server), server.model, **options)
        choices = [c for part in answer for c in part.choices] if stream else answer.choices
        return [
            (token.token, {top.token: top.logprob for top in token.top_logprobs})
            for choice in choices
            if choice.logprobs
            for token in choice.logprobs.content
        ]

    expected, got = ask(alone), ask(frontend)
    assert [token for token, _ in got] == [token for token, _ in expected]
    assert len(got) > 4
    for (_, one), (_, other) in zip(expected, got, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_log_probabilities_of_the_prompt_are_those_of_one_server(
    alone: Engine, frontend: Engine
) -> None:
    def ask(server: Engine) -> list[float]:
        answer = complete(client_of(server), server.model, extra_body={"prompt_logprobs": 1})
        rows = answer.choices[0].prompt_logprobs
        return [next(iter(row.values()))["logprob"] for row in rows if row]

    assert ask(frontend) == pytest.approx(ask(alone), abs=1e-3)


REFUSED: dict[str, dict[str, Any]] = {
    "too long": {"prompt": list(range(100, 5000))},
    "too many tokens": {"max_tokens": 100_000},
    "bad temperature": {"temperature": -1},
    "bad token": {"prompt": [10**9]},
    "unknown model": {"model": "nobody"},
    "broken grammar": {"extra_body": {"structured_outputs": {"regex": "(("}}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_server_refuses_is_refused_the_same(
    alone: Engine, frontend: Engine, name: str
) -> None:
    def ask(server: Engine) -> tuple[int, str]:
        options = {"model": server.model, "prompt": "A", "max_tokens": 4, **REFUSED[name]}
        with pytest.raises(openai.APIStatusError) as error:
            client_of(server).completions.create(**options)
        return error.value.status_code, error.value.message

    assert ask(frontend) == ask(alone)


@pytest.mark.parametrize(
    "params",
    [
        {"do_remote_prefill": True, "remote_host": "127.0.0.1", "remote_port": 1},
        {"do_remote_decode": True},
        {"codec": "int2"},
        "x",
        ["codec"],
    ],
)
def test_a_client_cannot_speak_to_the_connector(servers: dict[str, Engine], params: object) -> None:
    server = servers["handed off"]
    body = server.body("A king", 2) | {"vllm_xargs": {"kv_transfer_params": params}}
    answer = HTTP.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert 400 <= answer.status_code <= 502
    assert server.complete("A king", 2).finish_reason == "length"


def test_every_request_was_handed_off_or_none(servers: dict[str, Engine]) -> None:
    """What the tests above have compared was what they say."""

    def routes(server: Engine) -> dict[str, float]:
        name = "pd_frontend_routes_total{reason="
        found = {k: v for k, v in server.metrics().items() if k.startswith(name) and v}
        return {key.removeprefix(name).strip('"}'): value for key, value in found.items()}

    handed_off, local = routes(servers["handed off"]), routes(servers["local"])
    assert handed_off["disaggregated"] > 20
    assert set(handed_off) <= {"disaggregated", "one_token", "whole_prompt", "beam_search"}
    assert handed_off["beam_search"] == local["beam_search"] == 1 + 5 * 2  # beams of each step
    assert local["short"] > 20
    assert "disaggregated" not in local


def test_the_engines_count_what_a_frontend_has_them_do(
    servers: dict[str, Engine], trio: Trio
) -> None:
    def counts() -> list[float]:
        """Prompt tokens, and tokens that were given, of the producer and then of the consumer."""
        told = [engine.metrics() for engine in (trio.producer, trio.consumer)]
        names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
        return [each[name] for each in told for name in names]

    def settled() -> list[float]:
        """Return what they have counted when they have told of all that was before."""
        for engine in (trio.producer, trio.consumer):
            engine.wait_until_at_rest()
        before, deadline = counts(), time.monotonic() + 60
        while True:
            time.sleep(2)  # an engine tells its API server more often
            if before == (before := counts()):
                return before
            assert time.monotonic() < deadline

    frontend, before = servers["handed off"], settled()
    answer = complete(client_of(frontend), frontend.model, prompt=f"{STORY} The new king")
    prompt, given = answer.usage.prompt_tokens, answer.usage.completion_tokens
    # The first token may count as a part of the consumer's prompt.
    expected = [[prompt, 1, prompt + first, given - 1] for first in (0, 1)]
    deadline = time.monotonic() + 10  # an engine tells its API server once in a while
    while True:
        more = [after - then for then, after in zip(before, counts(), strict=True)]
        if more in expected:
            return
        assert time.monotonic() < deadline, (more, expected)
        time.sleep(0.2)


def test_who_has_no_api_key_gets_nothing_generated(trio: Trio, logs: Path) -> None:
    words = ("--decode", trio.consumer.url, "--api-key", "K", "--max-model-len", "4096")
    frontend = start_frontend("serve", models.smollm2(), words, folder=logs)
    with running([frontend]):
        body = frontend.body("A king", 2)
        paths = ("/v1/completions", "/invocations", "/tokenize", "/inference/v1/generate")
        for path, headers in product(paths, ({}, {"Authorization": "Bearer another"})):
            answer = HTTP.post(f"{frontend.url}{path}", json=body, headers=headers)
            assert answer.status_code == 401, (path, answer.text)
        keyed = {"Authorization": "Bearer K"}
        answer = HTTP.post(f"{frontend.url}/v1/completions", json=body, headers=keyed, timeout=60)
        assert answer.status_code == 200
        for path in ("/health", "/healthcheck"):
            assert HTTP.get(frontend.url + path).status_code == 200


def test_fifty_at_once_get_what_each_would_get_alone(alone: Engine, frontend: Engine) -> None:
    def ask(index: int) -> list[Any]:
        options: dict[str, Any] = {
            "prompt": f"{STORY} Number {index} of the kings",
            "max_tokens": 6,
        }
        if index % 5 == 0:
            options |= {"temperature": 1.0, "seed": index}
        if index % 7 == 0:
            options |= {"presence_penalty": 0.5}
        answers = [plain(complete(client_of(server), server.model, **options)) for server in pair]
        for answer in answers:
            answer.pop("usage")  # what is cached depends on who came first
        return answers

    pair = (alone, frontend)
    with ThreadPoolExecutor(50) as pool:
        results = list(pool.map(ask, range(50)))
    for expected, got in results:
        assert got == expected


def test_a_client_that_leaves_frees_every_engine(servers: dict[str, Engine], trio: Trio) -> None:
    frontend = servers["handed off"]
    for tokens in (0, 1, 3):
        chunks = complete(client_of(frontend), frontend.model, max_tokens=2000, stream=True)
        for _ in zip(range(tokens), chunks, strict=False):
            pass
        chunks.close()
    trio.assert_at_rest()


def test_a_frontend_ends_what_is_under_way_when_it_is_told_to_stop(
    servers: dict[str, Engine], trio: Trio, logs: Path
) -> None:
    arguments = (
        "--decode",
        trio.consumer.url,
        "--shutdown-timeout",
        "30",
        "--max-model-len",
        "4096",
    )
    frontend = start_frontend("serve", models.smollm2(), arguments, folder=logs)
    with running([frontend]):
        chunks = complete(client_of(frontend), frontend.model, max_tokens=60, stream=True)
        text = next(iter(chunks)).choices[0].text
        frontend.process.terminate()
        text += "".join(chunk.choices[0].text for chunk in chunks)
        assert frontend.process.wait(30) == 0
    alone = servers["alone"]
    assert text == complete(client_of(alone), alone.model, max_tokens=60).choices[0].text


def test_a_frontend_without_engines_says_what_is_wrong(logs: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    arguments = ("--decode", url, "--wait-for-engines", "1")
    frontend = start_frontend("serve", models.smollm2(), arguments, folder=logs)
    assert frontend.process.wait(60) == 1
    assert f"{url} (decode): nothing listens there" in frontend.log_tail(1)
