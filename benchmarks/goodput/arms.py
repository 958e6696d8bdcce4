"""The arms of `benchmarks.goodput`: two engines each, one a core, and what stands before them.

All engines of all arms are up during the whole run, but only one arm is awake at a time. The arms
with a frontend have the same engines, of role both: for more there is not the memory.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx

from benchmarks.common.arms import START_TIMEOUT_S, stop_all, wait_until_paused
from benchmarks.common.client import Prompts, RequestFailed, ask
from benchmarks.common.engines import is_ready, nixl_arguments
from benchmarks.common.processes import Cores, family
from benchmarks.common.routers import Router, start_vllm_router
from tests.engine import (
    Engine,
    EngineError,
    connector_arguments,
    free_port,
    say,
    start,
    start_frontend,
)

ARMS = {
    "alone x2": "two engines without a connector, the client asks them in turn",
    "nixl": "a prefill and a decode engine with vLLM's NixlConnector, behind vllm-router",
    "pdplugin": "two engines with pdplugin behind `vllm-pd serve --prefill … --decode … "
    "--local-below 0`: one only prefills, the other only decodes, every prompt is handed off",
    "pdplugin-auto": "the same two engines behind `vllm-pd serve --both`, which decides for each "
    "request where it is decoded and whether its prompt is handed off",
}

_ROLES = {
    "alone x2": ("first", "second"),
    "nixl": ("prefill", "decode"),
    "pdplugin": ("both", "both"),
}

_SETTLE_S = 1.5
"""A frontend that was stopped finds its engines silent, and attaches anew."""
_WARM_UP_REQUESTS, _WARM_UP_TOKENS, _WARM_UP_TRIES = 4, 160, 5
_READY_S, _REST_S = 60.0, 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class Arm:
    """engines: the first one computes on the first core, the second one on the second. Prefill and
    decode, where they are not alike.

    urls: what the client asks, in turn. front: the router or frontend; None where there is none.
    """

    name: str
    engines: tuple[Engine, Engine]
    urls: tuple[str, ...]
    front: Engine | Router | None
    cores: Cores

    @property
    def model(self) -> str:
        return self.engines[0].model

    @property
    def servers(self) -> list[Engine]:
        """Return what is stopped and resumed: vllm-router does nothing while it is not asked."""
        front = [self.front] if isinstance(self.front, Engine) else []
        return [*front, *self.engines]

    def wake(self, prompts: Prompts) -> None:
        """Let the servers run, empty the prefix caches, send requests that are not measured.

        The cores come last: a request may start threads, and vLLM's NixlConnector pins one.

        Raises:
            RequestFailed: the arm does not answer.
            EngineError: a server has ended.
        """
        for server in self.servers:
            if server.process.poll() is not None:
                raise EngineError(f"{server.name} has ended:\n{server.log_tail()}")
        self.signal(signal.SIGCONT)
        time.sleep(_SETTLE_S)
        for server in self.servers:
            _wait_until_ready(server)
        self.share_cores()
        for engine in self.engines:
            _forget_prefixes(engine)
        for number in range(_WARM_UP_REQUESTS):
            self._ask(self.urls[number % len(self.urls)], prompts)
        self.share_cores()

    def pause(self) -> None:
        """Wait until no request holds KV, then stop the servers' processes."""
        for engine in self.engines:
            _wait_until_at_rest(engine)
        self.signal(signal.SIGSTOP)

    def signal(self, number: signal.Signals) -> None:
        for server in self.servers:
            server.signal_all(number)

    def share_cores(self) -> None:
        """Pin the thread that computes of each engine to the engine's core; free all others.

        With one core given to OpenMP, that is the main thread of vLLM's worker process. This also
        undoes the pinning of vLLM's NixlConnector.
        """
        both = {self.cores.compute, self.cores.other}
        own = (self.cores.compute, self.cores.other)
        for engine, core in zip(self.engines, own, strict=True):
            computing = engine.worker_pid()
            for process in family(engine.process.pid):
                allow(process.pid, both, {computing: {core}})
        if self.front:
            for process in family(self.front.process.pid):
                allow(process.pid, both)
        allow(os.getpid(), both)

    def routes(self) -> dict[str, float]:
        """Return what a frontend has counted so far: requests by how they went, and failures."""
        if not isinstance(self.front, Engine):
            return {}
        told = ("pd_frontend_routes_total", "pd_frontend_retries_total")
        return {
            key.partition('reason="')[2].rstrip('"}'): value
            for key, value in self.front.metrics().items()
            if key.startswith(told)
        }

    def tails(self) -> str:
        """Return the ends of the servers' logs."""
        parts = [f"-- {server.name}:\n{server.log_tail(12)}" for server in self.servers]
        if isinstance(self.front, Router):
            text = self.front.log.read_text(errors="replace").splitlines()[-12:]
            parts.append(f"-- {self.front.kind}:\n" + "\n".join(text))
        return "\n".join(parts)

    def _ask(self, url: str, prompts: Prompts) -> None:
        for attempt in range(1, _WARM_UP_TRIES + 1):
            try:
                ask(url, self.model, prompts.next(_WARM_UP_TOKENS), 4)
                return
            except RequestFailed as error:
                if attempt == _WARM_UP_TRIES:
                    text = f"{self.name} does not answer: {error}"
                    raise RequestFailed(f"{text}\n{self.tails()}") from error
                time.sleep(1)


def allow(pid: int, cores: set[int], exceptions: Mapping[int, set[int]] | None = None) -> None:
    """Let all threads of a process run on these cores, but those in ``exceptions`` on theirs."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for name in os.listdir(f"/proc/{pid}/task"):
            thread = int(name)
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, (exceptions or {}).get(thread, cores))


def start_arms(
    names: Sequence[str], model: Path, flags: Sequence[str], folder: Path, stack: ExitStack
) -> list[Arm]:
    """Start everything, and return the arms with all their servers stopped.

    flags: of every engine. folder: where the logs go. stack: gets what stops it all.

    Raises:
        EngineError: a server did not start.
        RequestFailed: an arm does not answer.
    """
    cores = Cores.choose()
    say(f"starting {', '.join(names)}: one to five minutes; logs in {folder}")
    servers: list[Engine] = []
    stack.callback(stop_all, servers)
    kinds = dict.fromkeys(map(_kind, names))
    pairs = {kind: _start_pair(kind, model, flags, cores, folder, servers) for kind in kinds}
    wait_until_paused(servers)
    arms: list[Arm] = []
    for kind, pair in pairs.items():
        for engine in pair:
            engine.signal_all(signal.SIGCONT)
        wanted = [name for name in names if _kind(name) == kind]
        own = [_with_front(name, pair, model, cores, folder, servers, stack) for name in wanted]
        for server in (server for arm in own for server in arm.servers):
            _wait_until_ready(server, START_TIMEOUT_S)
        for arm in own:
            arm.signal(signal.SIGSTOP)
        arms += own
    prompts = Prompts(1)
    for arm in arms:
        arm.wake(prompts)
        arm.pause()
        say(f"{arm.name} answers")
    return sorted(arms, key=lambda arm: list(names).index(arm.name))


def _kind(name: str) -> str:
    """Return which engines an arm has: the arms with a frontend share theirs."""
    return "pdplugin" if name.startswith("pdplugin") else name


def _start_pair(
    kind: str,
    model: Path,
    flags: Sequence[str],
    cores: Cores,
    folder: Path,
    servers: list[Engine],
) -> tuple[Engine, Engine]:
    """Start two engines and return at once; each is added to ``servers``."""
    for role, core in zip(_ROLES[kind], (cores.compute, cores.other), strict=True):
        # Of the development mode only the request that empties the prefix cache is used.
        environ = {"VLLM_SERVER_DEV_MODE": "1"}
        connector: list[str] = []
        if kind == "nixl":
            connector = nixl_arguments()
            environ |= {
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            }
        elif kind == "pdplugin":
            connector = connector_arguments(role)
        name = f"{kind.replace(' ', '-')}-{role}-on-{core}"
        words = [*flags, *connector]
        servers.append(start(name, model, words, cores=str(core), folder=folder, environ=environ))
    return servers[-2], servers[-1]


def _with_front(
    name: str,
    pair: tuple[Engine, Engine],
    model: Path,
    cores: Cores,
    folder: Path,
    servers: list[Engine],
    stack: ExitStack,
) -> Arm:
    """Return an arm with its router or frontend started; the engines must be running."""
    first, second = pair
    if name == "alone x2":
        return Arm(name, pair, (first.url, second.url), None, cores)
    if name == "nixl":
        log = folder / "nixl-router.log"
        router = start_vllm_router(first.url, second.url, log, stack)
        return Arm(name, pair, (router.url,), router, cores)
    pool = ("--prefill", first.url, "--decode", second.url, "--local-below", "0")
    if name == "pdplugin-auto":
        pool = ("--both", first.url, second.url)
    arguments = (*pool, "--disable-uvicorn-access-log")
    frontend = start_frontend("serve", model, arguments, folder=folder)
    frontend.name = f"{name} frontend"
    servers.append(frontend)
    return Arm(name, pair, (frontend.url,), frontend, cores)


def _wait_until_ready(server: Engine, timeout_s: float = _READY_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_ready(server.url, server.process, server.name, server.log):
        if time.monotonic() > deadline:
            raise EngineError(f"{server.name} is not ready:\n{server.log_tail()}")
        time.sleep(0.25)


def _wait_until_at_rest(engine: Engine) -> None:
    try:
        engine.wait_until_at_rest(_REST_S)
    except (AssertionError, httpx.HTTPError) as problem:
        say(f"{engine.name}: {problem}")


def _forget_prefixes(engine: Engine) -> None:
    answer = httpx.post(f"{engine.url}/reset_prefix_cache", timeout=30)
    if answer.status_code != 200:
        say(f"{engine.name} has not emptied its prefix cache: {answer.status_code} {answer.text}")
