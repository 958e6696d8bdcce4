"""A plain server, and frontends over engines of the same model."""

from __future__ import annotations

from pathlib import Path

from openai import OpenAI

from tests import models
from tests.engine import Engine, engine_urls, start, start_frontend
from tests.engines.conftest import ARGUMENTS


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


def client_of(server: Engine) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
