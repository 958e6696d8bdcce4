"""What the OpenAI client gets from ``vllm-pd up`` is what it gets from one plain vLLM server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests import models
from tests.engine import Engine, free_port, running, start, start_frontend
from tests.engines.conftest import ARGUMENTS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tell the weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
                "required": ["city"],
            },
        },
    }
]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
QUESTION = [
    {"role": "system", "content": "You are a helpful assistant who answers in short sentences."},
    {"role": "user", "content": "What is the capital of France, and what is it known for?"},
]
STORY = "Once upon a time there was a king who lived in a castle by the sea. " * 6


class Servers:
    """A plain server, and the same model behind a frontend: handed off, and not."""

    def __init__(self, logs: Path) -> None:
        model = models.smollm2()
        api = (
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
            *("--enable-prompt-tokens-details",),
        )
        # Room for fifty prompts in one step: vLLM's CPU backend dies of a seeded prompt that needs
        # several.
        common = (*ARGUMENTS["smollm2"], *api, "--max-num-batched-tokens", "8192")
        self.alone = start("alone", model, common, cores="0", folder=logs)
        self.up = start_frontend("up", model, (*common, "--local-below", "0"), folder=logs)

    def start_local(self, logs: Path) -> Engine:
        """Start another frontend over the same engines, that hands nothing off."""
        pool = engine_urls(self.up)
        arguments = (
            *("--prefill", pool["prefill-0"], "--decode", pool["decode-0"]),
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
            *("--max-model-len", "4096", "--local-below", "100000"),
            *("--enable-prompt-tokens-details",),
        )
        return start_frontend("serve", models.smollm2(), arguments, folder=logs)


def engine_urls(up: Engine) -> dict[str, str]:
    words = [line.split() for line in up.log.read_text().splitlines() if "] starting " in line]
    return {w[w.index("starting") + 1]: w[w.index("at") + 1].rstrip(",") for w in words}


@pytest.fixture(scope="module")
def servers(logs: Path) -> Iterator[dict[str, Engine]]:
    servers = Servers(logs)
    with running([servers.alone, servers.up]):
        local = servers.start_local(logs)
        with running([local]):
            yield {"alone": servers.alone, "handed off": servers.up, "local": local}


@pytest.fixture(params=["handed off", "local"])
def frontend(request: pytest.FixtureRequest, servers: dict[str, Engine]) -> Engine:
    return servers[request.param]


@pytest.fixture
def alone(servers: dict[str, Engine]) -> Engine:
    return servers["alone"]


def client_of(server: Engine) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


Ask = Callable[[OpenAI, str], Any]
CASES: dict[str, Ask] = {}


def case(function: Ask) -> Ask:
    CASES[function.__name__] = function
    return function


def chat(client: OpenAI, model: str, **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 24, "messages": QUESTION, **options}
    return client.chat.completions.create(model=model, **options)


def complete(client: OpenAI, model: str, **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 16, "prompt": STORY, **options}
    return client.completions.create(model=model, **options)


def plain(answer: Any) -> Any:
    """Return what must be the same of an answer: all but ids and times."""
    content = answer.model_dump(mode="json")
    for key in ("id", "created", "system_fingerprint"):
        content.pop(key, None)
    for choice in content.get("choices", []):
        for call in (choice.get("message") or {}).get("tool_calls") or []:
            call.pop("id")
    return content


def streamed(chunks: Any) -> Any:
    """Return what a stream says in all, and how it ends."""
    text: dict[int, str] = {}
    calls: dict[tuple[int, int], str] = {}
    ends: dict[int, Any] = {}
    usage = None
    for chunk in chunks:
        usage = chunk.usage.model_dump() if chunk.usage else usage
        for choice in chunk.choices:
            delta = getattr(choice, "delta", None)
            part = choice.text if delta is None else delta.content
            text[choice.index] = text.get(choice.index, "") + (part or "")
            for call in (delta and delta.tool_calls) or []:
                key = (choice.index, call.index)
                said = (call.function.name or "") + (call.function.arguments or "")
                calls[key] = calls.get(key, "") + said
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    return text, calls, ends, usage


@case
def a_chat(client: OpenAI, model: str) -> Any:
    return plain(chat(client, model))


@case
def a_streamed_chat(client: OpenAI, model: str) -> Any:
    return streamed(
        chat(client, model, stream=True, stream_options={"include_usage": True}, max_tokens=32)
    )


@case
def a_tool_of_the_models_choice(client: OpenAI, model: str) -> Any:
    return plain(chat(client, model, tools=TOOLS, tool_choice="auto", max_tokens=32))


@case
def a_required_tool(client: OpenAI, model: str) -> Any:
    answer = chat(client, model, tools=TOOLS, tool_choice="required", max_tokens=100)
    assert answer.choices[0].message.tool_calls[0].function.name == "get_weather"
    return plain(answer)


@case
def a_named_tool_streamed(client: OpenAI, model: str) -> Any:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    chunks = chat(client, model, tools=TOOLS, tool_choice=choice, stream=True, max_tokens=32)
    return streamed(chunks)


@case
def json_of_a_schema(client: OpenAI, model: str) -> Any:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    answer = chat(client, model, response_format=wanted, max_tokens=48)
    assert set(json.loads(answer.choices[0].message.content)) == {"name", "age"}
    return plain(answer)


@case
def two_choices_with_a_seed(client: OpenAI, model: str) -> Any:
    return plain(chat(client, model, n=2, temperature=1.0, seed=11))


@case
def a_seed(client: OpenAI, model: str) -> Any:
    return plain(complete(client, model, temperature=0.9, top_p=0.95, seed=5))


@case
def a_stop_string(client: OpenAI, model: str) -> Any:
    return plain(complete(client, model, stop=[" king", " and"], max_tokens=48))


@case
def a_stop_string_over_two_tokens_streamed(client: OpenAI, model: str) -> Any:
    return streamed(complete(client, model, stop=["e w"], max_tokens=32, stream=True))


@case
def a_stop_string_in_the_first_token(client: OpenAI, model: str) -> Any:
    return plain(chat(client, model, stop=["The", "France", "Par"]))


@case
def a_minimum_of_tokens(client: OpenAI, model: str) -> Any:
    return plain(chat(client, model, max_tokens=40, extra_body={"min_tokens": 30}))


@case
def penalties(client: OpenAI, model: str) -> Any:
    options = {"frequency_penalty": 0.7, "presence_penalty": 0.4}
    return plain(complete(client, model, **options, extra_body={"repetition_penalty": 1.1}))


@case
def a_bias(client: OpenAI, model: str) -> Any:
    return plain(complete(client, model, logit_bias={"338": 5, "655": -100}))


@case
def one_token(client: OpenAI, model: str) -> Any:
    return plain(complete(client, model, max_tokens=1))


@case
def several_prompts(client: OpenAI, model: str) -> Any:
    return plain(complete(client, model, prompt=["The sea is", "A castle has", STORY]))


@case
def the_prompt_repeated(client: OpenAI, model: str) -> Any:
    return plain(complete(client, model, echo=True, max_tokens=4))


@case
def a_response(client: OpenAI, model: str) -> Any:
    answer = client.responses.create(
        model=model, input=QUESTION, temperature=0, max_output_tokens=16
    )
    return answer.output_text, answer.usage.model_dump() if answer.usage else None


@case
def the_models(client: OpenAI, model: str) -> Any:
    return [(each.id, each.model_dump().get("max_model_len")) for each in client.models.list()]


@case
def tokens_of_a_chat(client: OpenAI, model: str) -> Any:
    root = str(client.base_url).removesuffix("v1/")
    return httpx.post(f"{root}tokenize", json={"model": model, "messages": QUESTION}).json()


@pytest.mark.parametrize("name", CASES)
def test_the_answer_is_that_of_one_server(alone: Engine, frontend: Engine, name: str) -> None:
    ask = CASES[name]
    assert ask(client_of(frontend), frontend.model) == ask(client_of(alone), alone.model)


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
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
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
    assert set(handed_off) <= {"disaggregated", "one_token", "whole_prompt"}
    assert local["short"] > 20
    assert "disaggregated" not in local


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


def test_a_client_that_leaves_frees_every_engine(servers: dict[str, Engine]) -> None:
    frontend = servers["handed off"]
    engines = engine_urls(frontend)
    for tokens in (0, 1, 3):
        chunks = complete(client_of(frontend), frontend.model, max_tokens=2000, stream=True)
        for _ in zip(range(tokens), chunks, strict=False):
            pass
        chunks.close()
    for name, url in engines.items():
        Engine(name, url, frontend.model, frontend.process, frontend.log).wait_until_at_rest()


def test_a_frontend_ends_what_is_under_way_when_it_is_told_to_stop(
    servers: dict[str, Engine], logs: Path
) -> None:
    pool = engine_urls(servers["handed off"])
    arguments = (
        "--decode",
        pool["decode-0"],
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
