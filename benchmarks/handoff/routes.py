"""The ways in which `benchmarks.handoff` has a request answered: an arm behind what asks it."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from benchmarks.common.arms import Arm, start_arm, stop_all, wait_until_paused
from benchmarks.common.client import Prompts, RequestFailed, ask
from benchmarks.common.network import Network
from benchmarks.common.processes import Cores, family, own_cpu_seconds, part_of, pin
from benchmarks.common.routers import Router, start_frontend, start_proxy, start_vllm_router
from tests.engine import Engine, EngineError, say

SETTLE_S = 0.5
WARM_UP_TOKENS = 160
WARM_UP_TRIES = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """An arm, and how its engines are asked. ``router`` is None if the client asks by itself.

    A frontend is stopped together with its engines: it would look for them all the time.
    """

    arm: Arm
    dispatch: str
    codec: str
    url: str
    router: Router | None
    cores: Cores

    @property
    def name(self) -> str:
        codec = () if self.codec == "raw" else (self.codec,)
        way = () if self.router is None else (self.dispatch,)
        return ", ".join((self.arm.name, *way, *codec))

    @property
    def model(self) -> str:
        return next(iter(self.arm.engines.values())).model

    def wake(self, prompts: Prompts, warm_up_tokens: int = WARM_UP_TOKENS) -> None:
        """Let the arm's engines run, send a request that is not measured, share the cores out.

        The cores come last: the request may start threads, and vLLM's NixlConnector pins one.

        Raises:
            RequestFailed: the route does not answer.
            EngineError: an engine has ended.
        """
        for engine in self.arm.engines.values():
            if engine.process.poll() is not None:
                raise EngineError(f"{engine.name} has ended:\n{engine.log_tail()}")
        self.arm.signal(signal.SIGCONT)
        self._signal_frontend(signal.SIGCONT)
        time.sleep(SETTLE_S)
        self.share_cores()
        for attempt in range(1, WARM_UP_TRIES + 1):
            try:
                ask(self.url, self.model, prompts.next(warm_up_tokens), 4, self.codec)
                break
            except RequestFailed as error:
                if attempt == WARM_UP_TRIES:
                    text = f"{self.name} does not answer: {error}"
                    raise RequestFailed(f"{text}\n{self.tails()}") from error
                time.sleep(1)
        self.share_cores()
        time.sleep(SETTLE_S)

    def pause(self) -> None:
        """Wait until no request holds KV, then stop the engines, and their frontend."""
        self.arm.pause()
        self._signal_frontend(signal.SIGSTOP)

    def _signal_frontend(self, number: signal.Signals) -> None:
        if self.router and self.router.kind == "frontend":
            self.router.signal(number)

    def tails(self) -> str:
        """Return the ends of the engines' logs, and of the router's."""
        parts = [f"-- {role}:\n{e.log_tail(12)}" for role, e in self.arm.engines.items()]
        if self.router:
            text = self.router.log.read_text(errors="replace").splitlines()[-12:]
            parts.append(f"-- {self.router.kind}:\n" + "\n".join(text))
        return "\n".join(parts)

    def share_cores(self) -> None:
        """Pin each thread: the worker's main thread computes, and has a core; the rest share one.

        With one core given to OpenMP, the main thread of vLLM's worker process is the only one
        that computes. This also undoes the pinning of vLLM's NixlConnector.
        """
        for engine in self.arm.engines.values():
            computing = engine.worker_pid()
            for process in family(engine.process.pid):
                pin(process.pid, self.cores.other, {computing: self.cores.compute})
        if self.router:
            for process in family(self.router.process.pid):
                pin(process.pid, self.cores.other)
        pin(os.getpid(), self.cores.other)

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU seconds of each process so far, by what it is."""
        used: dict[str, float] = {"client": own_cpu_seconds(psutil.Process())}
        for role, engine in self.arm.engines.items():
            for process in family(engine.process.pid):
                label = f"{role}_{part_of(process, engine)}"
                used[label] = used.get(label, 0.0) + own_cpu_seconds(process)
        if self.router:
            used[self.router.kind] = sum(map(own_cpu_seconds, family(self.router.process.pid)))
        return used


def start(
    arms: Sequence[str],
    dispatches: Sequence[str],
    codecs: Sequence[str],
    model: Path,
    network: Network,
    folder: Path,
    stack: ExitStack,
    source: Path | None = None,
) -> list[Route]:
    """Start everything, and return the routes with all their engines paused.

    folder: where the logs go.
    stack: gets what stops it all.
    source: of the arm `before`.

    Raises:
        EngineError: an engine or a router did not start.
        RequestFailed: a route does not answer.
    """
    cores = Cores.choose()
    say(f"starting {', '.join(arms)}: one to five minutes; logs in {folder}")
    engines: list[Engine] = []
    stack.callback(stop_all, engines)
    started = [start_arm(name, model, network, cores, folder, engines, source) for name in arms]
    wait_until_paused(engines)
    routes: list[Route] = []
    for arm in started:
        arm.signal(signal.SIGCONT)
        own = routes_of(arm, dispatches, codecs, cores, folder, stack)
        own[0].pause()
        routes += own
    # Only now, because waking a route pins this process, and what it starts would be pinned too.
    prompts = Prompts(1)
    for route in routes:
        for _ in range(2):  # the first brings the handshakes
            route.wake(prompts)
        route.pause()
        say(f"{route.name} answers")
    return routes


def routes_of(
    arm: Arm,
    dispatches: Sequence[str],
    codecs: Sequence[str],
    cores: Cores,
    folder: Path,
    stack: ExitStack,
) -> list[Route]:
    """Return the ways to ask an arm, with their routers started. Its engines must be running."""
    if arm.kind == "alone":
        return [Route(arm, "serial", "raw", arm.engines["alone"].url, None, cores)]
    producer, consumer = arm.engines["producer"], arm.engines["consumer"]
    if arm.kind == "frontend":
        assert arm.access is not None
        model, key = arm.access.model, arm.access.cluster_key
        log = folder / f"{arm.name}-serve.log"
        router = start_frontend(model, producer.url, consumer.url, key, log, stack)
        return [Route(arm, "concurrent", codec, router.url, router, cores) for codec in codecs]
    routes: list[Route] = []
    # NixlConnector's handoff gets its name in the prefill engine's answer: serial only.
    for dispatch in ("serial",) if arm.kind == "nixl" else dispatches:
        if dispatch == "serial":
            log = folder / f"{arm.name}-router.log"
            router = start_vllm_router(producer.url, consumer.url, log, stack)
        else:
            log = folder / f"{arm.name}-proxy.log"
            place = arm.places["producer"]
            router = start_proxy(producer.url, place, consumer.url, log, stack)
        # vllm-router passes on what the producer answers, and no codec of a client's.
        routes += [
            Route(arm, dispatch, codec, router.url, router, cores)
            for codec in (codecs if dispatch == "concurrent" else ("raw",))
        ]
    return routes
