"""What clients of the OpenAI API ask, and what of the answers is compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from openai import OpenAI

from tests.engines.conftest import random_prompt
from tests.http_client import HTTP

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
def a_seeded_prompt_of_several_steps_and_one_token(client: OpenAI, model: str) -> Any:
    """One engine does all of it, with the seed: that ends a CPU engine of vLLM's own, and would end
    the next one, too."""
    prompt, sampling = random_prompt(1000, 77), {"temperature": 0.9, "seed": 5}
    answer = plain(complete(client, model, prompt=prompt, max_tokens=1, **sampling))
    answer.pop("usage")  # what is cached depends on who came first
    return answer


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
def a_beam_search(client: OpenAI, model: str) -> Any:
    return plain(complete(client, model, n=2, max_tokens=6, extra_body={"use_beam_search": True}))


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
    return HTTP.post(f"{root}tokenize", json={"model": model, "messages": QUESTION}).json()
