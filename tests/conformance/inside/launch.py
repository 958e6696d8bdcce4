"""``vllm``, as vLLM's tests find it on the PATH: the real one, or `vllm-pd up` in its place."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ARM_VARIABLE = "PD_CONFORMANCE_ARM"
SERVERS_VARIABLE = "PD_CONFORMANCE_SERVERS"
"""A file that gets the command line of each server that is started."""

OURS = "vllm-pd up"

_DROPPED = {
    "--enable-lora": 0,
    "--lora-modules": -1,
    "--max-cpu-loras": 1,
    "--max-lora-rank": 1,
    "--runner": 1,
}
"""By option, how many values it has; -1: up to the next option. Left out for both servers: there
are no adapters here, and a test that asks a pooling model for nothing but its name or its key can
ask one that generates."""

_ENTRY = ("-m", "vllm.entrypoints.launchers.api_server.entry")
"""How a test starts a server without `vllm serve`."""

_POOL = ("--prefill", "1", "--decode", "1", "--local-below", "0")
"""One engine of each role, and every prompt is handed off: a short one too."""


def command(arguments: Sequence[str], arm: str) -> list[str]:
    """Return the program and its arguments in the place of ``vllm ARGUMENTS``."""
    name, rest = (arguments[0], list(arguments[1:])) if arguments else ("", [])
    if name != "serve":
        return ["vllm", *arguments]
    model, options = _split_model(_without(rest))
    if arm != OURS:
        return ["vllm", "serve", *model, *options]
    return ["vllm-pd", "up", *model, *options, *_POOL]


def entry_arguments(words: Sequence[str]) -> list[str] | None:
    """Return what `vllm` is to be given instead of this command; None where it is no server."""
    if tuple(words[1:3]) != _ENTRY:
        return None
    return ["serve", *words[3:]]


def _without(options: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skipping = 0
    for word in options:
        is_option = word.startswith("--")
        name, equals, _ = word.partition("=")
        if is_option and name in _DROPPED:
            skipping = 0 if equals else _DROPPED[name]
        elif skipping and not is_option:
            skipping -= 1
        else:
            skipping = 0
            kept.append(word)
    return kept


def _split_model(words: list[str]) -> tuple[list[str], list[str]]:
    """Take the model from where it stands, first or after --model, to the front."""
    for place, word in enumerate(words):
        if word == "--model":
            return words[place + 1 : place + 2], words[:place] + words[place + 2 :]
        if word.startswith("--model="):
            return [word.partition("=")[2]], words[:place] + words[place + 1 :]
    return words[:1], words[1:]


def main() -> None:
    words = command(sys.argv[1:], os.environ[ARM_VARIABLE])
    if words[1:2] in (["serve"], ["up"]):
        with open(os.environ[SERVERS_VARIABLE], "a") as file:
            file.write(shlex.join(words) + "\n")
    program = Path(sys.executable).parent / words[0]
    os.execv(program, words)


if __name__ == "__main__":
    main()
