"""The CPU that an answer costs the process which faces clients: a frontend, a frontend of another
checkout over the same engines, and the API server of `vllm serve`, whose engine answers alone."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.common.client import Prompts
from benchmarks.common.engines import SMALL_FLAGS
from benchmarks.common.processes import family, own_cpu_seconds
from benchmarks.common.statistics import Row, rotated
from benchmarks.frontend.answer_rows import answers_row
from benchmarks.frontend.load import CHUNK_MARK, bodies, closed_loop, run
from benchmarks.frontend.run import SETTLE_S, start_canned
from tests.engine import Engine, connector_arguments, running, say, start, start_frontend

ANSWER_TOKENS = 64
CONCURRENCY = 8
STEP_MS = 5.0
"""Of canned engines: tiny-llama's are about as fast."""
OURS, BEFORE, ALONE = "vllm-pd serve", "before", "vllm serve"


@dataclasses.dataclass(frozen=True, slots=True)
class Answers:
    """servers: by name. prompts: no two alike."""

    servers: dict[str, Engine]
    prompts: Prompts
    prompt_tokens: int

    def rows(self, number: int, repeat: int, idle_s: float) -> list[Row]:
        """Let every server answer so many prompts in each repetition; they take turns. Before
        that, leave all of them alone for so many seconds."""
        taken: dict[str, list[float]] = {name: [] for name in self.servers}
        for name in self.servers:
            self._turn(name, CONCURRENCY)
        idle_ms = self._idle(idle_s)
        for repetition in range(repeat):
            for name in rotated(list(self.servers), repetition):
                taken[name].append(self._turn(name, number))
            shown = ", ".join(f"{name} {samples[-1]:.2f}" for name, samples in taken.items())
            say(f"{repetition + 1} of {repeat}, CPU ms an answer: {shown}")
        return [answers_row(name, samples, idle_ms[name]) for name, samples in taken.items()]

    def _idle(self, seconds: float) -> dict[str, float]:
        """Return the CPU of an idle second in ms, of each server."""
        time.sleep(SETTLE_S)
        before = {name: _cpu_s(name, server) for name, server in self.servers.items()}
        time.sleep(seconds)
        return {
            name: 1e3 * (_cpu_s(name, server) - before[name]) / seconds
            for name, server in self.servers.items()
        }

    def _turn(self, name: str, number: int) -> float:
        """Return the CPU of an answer in ms."""
        server = self.servers[name]
        prompts = (self.prompts.next(self.prompt_tokens) for _ in range(number))
        sent = bodies(server.url, server.model, prompts, ANSWER_TOKENS)
        before = _cpu_s(name, server)
        run(closed_loop(server.url, CHUNK_MARK, sent, CONCURRENCY))
        return 1e3 * (_cpu_s(name, server) - before) / number


def _cpu_s(name: str, server: Engine) -> float:
    # The children of `vllm serve` are the engine; those of a frontend are the frontend.
    processes = family(server.process.pid)
    return sum(map(own_cpu_seconds, processes[:1] if name == ALONE else processes))


def start_servers(
    model: Path, before: Path | None, folder: Path, stack: ExitStack
) -> dict[str, Engine]:
    """Start what is compared. before: another checkout of this project, whose engines are this
    one's. stack: gets what stops it all."""
    engines = [
        start("alone", model, SMALL_FLAGS, cores="0", folder=folder),
        start("prefill", model, (*SMALL_FLAGS, *connector_arguments("prefill")), cores="0",
              folder=folder),
        start("decode", model, (*SMALL_FLAGS, *connector_arguments("decode")), cores="1",
              folder=folder),
    ]  # fmt: skip
    alone, prefill, decode = stack.enter_context(running(engines))
    words = (
        "--prefill", prefill.url, "--decode", decode.url, "--local-below", "0",
        "--disable-uvicorn-access-log",
    )  # fmt: skip
    return {**_start_frontends(model, before, words, folder, stack), ALONE: alone}


def start_over_canned(
    model: Path, before: Path | None, folder: Path, stack: ExitStack
) -> dict[str, Engine]:
    """Start frontends over engines that compute nothing; else see ``start_servers``."""
    engines: list[Engine] = []
    _, words = start_canned(model, STEP_MS, folder, engines)
    stack.enter_context(running(engines))
    return _start_frontends(model, before, words, folder, stack)


def _start_frontends(
    model: Path, before: Path | None, words: Sequence[str], folder: Path, stack: ExitStack
) -> dict[str, Engine]:
    places = {OURS: {}} if before is None else {OURS: {}, BEFORE: {"PYTHONPATH": str(before)}}
    frontends = [
        start_frontend("serve", model, words, folder=folder, environ=place)
        for place in places.values()
    ]
    stack.enter_context(running(frontends))
    return dict(zip(places, frontends, strict=True))
