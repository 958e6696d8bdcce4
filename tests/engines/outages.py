"""Pools of one prefill and one decode engine between which no KV can be handed over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests import models
from tests.engine import Engine, connector_arguments, parse_event, start, start_frontend
from tests.engine import running as running_engines
from tests.engine_site import environ_of
from tests.engines.conftest import ARGUMENTS, Trio
from tests.http_client import HTTP

OPTIONS = {"peer_timeout_s": 1, "fetch_timeout_s": 5}

_NOBODY = {
    # What it sends to other engines goes where nobody listens; frontends come to it as before.
    "vllm_pd_plugin.net.channel": {
        r"self\._socket\.connect\(endpoint\(address\)\)": (
            "self._socket.connect(endpoint((address[0], 9)))"
        )
    }
}


def _decode(name: str, logs: Path, environ: dict[str, str]) -> Engine:
    words = (*ARGUMENTS["tiny-llama"], *connector_arguments("decode", **OPTIONS))
    return start(name, models.tiny_llama(), words, cores="1", folder=logs, environ=environ)


def _prefill(
    name: str, logs: Path, model: Path, *more: str, environ: dict[str, str] | None = None
) -> Engine:
    words = (*ARGUMENTS["tiny-llama"], *connector_arguments("prefill", lease_s=2), *more)
    return start(name, model, words, cores="0", folder=logs, environ=environ)


def nixl_unreachable(llama: Trio, logs: Path) -> tuple[Engine, Engine, list[Engine]]:
    """NIXL uses the loopback device on one engine, and another one on the other."""
    device = next(
        name for name, state in psutil.net_if_stats().items() if state.isup and name != "lo"
    )
    prefill = _prefill("nixl-on-lo", logs, models.tiny_llama(), environ=_only_on("lo"))
    decode = _decode("nixl-elsewhere", logs, _only_on(device))
    return prefill, decode, [prefill, decode]


def _only_on(device: str) -> dict[str, str]:
    return {"UCX_TLS": "tcp", "UCX_NET_DEVICES": device}


def control_unreachable(llama: Trio, logs: Path) -> tuple[Engine, Engine, list[Engine]]:
    """The decode engine cannot reach the other one's control channel."""
    decode = _decode("alone-control", logs, environ_of(_NOBODY))
    return llama.producer, decode, [decode]


def other_weights(llama: Trio, logs: Path) -> tuple[Engine, Engine, list[Engine]]:
    """The prefill engine runs another model of the same shape."""
    prefill = _prefill("other-weights", logs, models.tiny_llama_other())
    return prefill, llama.consumer, [prefill]


def other_blocks(llama: Trio, logs: Path) -> tuple[Engine, Engine, list[Engine]]:
    """The prefill engine's blocks have another size: every handoff is `peer_incompatible`."""
    prefill = _prefill("other-blocks", logs, models.tiny_llama(), "--block-size", "64")
    return prefill, llama.consumer, [prefill]


Kind = Callable[[Trio, Path], tuple[Engine, Engine, list[Engine]]]
"""Returns a prefill and a decode engine, and those of them that were started for this."""


@contextmanager
def outage(kind: Kind, llama: Trio, logs: Path) -> Iterator[tuple[Engine, Engine]]:
    """A frontend over such a pool, and the decode engine."""
    prefill, decode, started = kind(llama, logs)
    pool = ("--prefill", prefill.url, "--decode", decode.url)
    words = (*pool, "--local-below", "0", "--max-model-len", "4096")
    frontend = start_frontend("serve", models.tiny_llama(), words, folder=logs)
    with ExitStack() as stack:
        stack.enter_context(running_engines([*started, frontend]))
        yield frontend, decode


def streamed(server: Engine, prompt: list[int], num_tokens: int) -> tuple[list[Any], float]:
    """Return the tokens of a streamed answer with its finish reason, or the error at its end, and
    the time to its first token in seconds."""
    body = server.body(prompt, num_tokens, ignore_eos=True, stream=True)
    body.pop("logprobs")
    got: list[Any] = []
    started, first_s = time.monotonic(), 0.0
    with HTTP.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as answer:
        for line in answer.iter_lines():
            if not (part := parse_event(line)):
                continue
            if "error" in part:
                return [*got, part["error"]["message"]], first_s
            choice = part["choices"][0]
            got += choice["token_ids"] or []
            first_s = first_s or time.monotonic() - started
            if choice["finish_reason"]:
                got.append(choice["finish_reason"])
    return got, first_s
