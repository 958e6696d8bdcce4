"""A plain server, and frontends over engines of the same model."""

from __future__ import annotations

import functools
from pathlib import Path

from openai import OpenAI

from tests import models
from tests.engine import Engine, start_frontend
from tests.engines.conftest import API, Trio


def start_frontends(trio: Trio, logs: Path) -> dict[str, Engine]:
    """Start a frontend that hands everything off, and one that hands off nothing."""
    model = models.smollm2()
    pool = ("--prefill", trio.producer.url, "--decode", trio.consumer.url)
    tools = [word for word in API if word not in ("--max-num-batched-tokens", "8192")]
    # Fifty at once may wait for longer than usual: all of them are to be answered.
    patience = ("--max-model-len", "4096", "--queue-timeout", "300")
    words = (*pool, *tools, *patience, "--local-below")
    return {
        "handed off": start_frontend("serve", model, (*words, "0"), folder=logs),
        "local": start_frontend("serve", model, (*words, "100000"), folder=logs),
    }


def client_of(server: Engine) -> OpenAI:
    return _client_at(f"{server.url}/v1")


@functools.cache
def _client_at(base_url: str) -> OpenAI:
    return OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=120)
