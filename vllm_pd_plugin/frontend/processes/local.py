"""Processes that ``vllm-pd`` runs here: what each engine gets of the machine; keeping all up."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from vllm_pd_plugin.errors import ConfigError, PdError
from vllm_pd_plugin.frontend.deployment import Deployment
from vllm_pd_plugin.frontend.routing.choice import EngineKey, Role

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 1.0, 30.0
_STEADY_S = 60.0
"""An engine that has run for so long starts again without a longer pause."""
_STOP_S = 30.0
_LOG_TAIL_LINES = 25
_PR_SET_PDEATHSIG = 1

_API_OPTIONS = {
    "--host", "--port", "--uds", "--api-key", "--root-path", "--allowed-origins",
    "--allowed-methods", "--allowed-headers", "--allow-credentials", "--ssl-keyfile",
    "--ssl-certfile", "--ssl-ca-certs", "--enable-ssl-refresh", "--ssl-cert-reqs",
    "--ssl-ciphers", "--middleware", "--api-server-count", "-asc", "--otlp-traces-endpoint",
    "--max-num-queued-reqs", "--max-num-queued-tokens",
}  # fmt: skip
"""Options of ``vllm serve`` that are the frontend's alone."""


class EngineStartError(PdError):
    """An engine ended before it could serve; the message has the end of its log."""


@dataclasses.dataclass(frozen=True, slots=True)
class LocalProcess:
    """How one process is started. environ: all of it; vLLM changes this process's own as it sees
    fit for this process. log: None for this process's own output."""

    name: str
    command: tuple[str, ...]
    environ: Mapping[str, str]
    log: Path | None


@dataclasses.dataclass(frozen=True, slots=True)
class EngineSettings:
    """What all engines of a role get: options of ``vllm serve``, and environment on top of this
    process's."""

    arguments: Sequence[str] = ()
    environ: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class LocalEngine(LocalProcess):
    """How one engine is started, and where it will be."""

    role: Role
    url: EngineKey


def engine_arguments(parser: Any, arguments: Sequence[str], own: set[str]) -> list[str]:
    """Return what is for the engines too, of the options that ``vllm-pd up`` was given.

    own: the options that ``vllm serve`` does not have.
    """
    return without(parser, arguments, _API_OPTIONS | own)


def without(parser: Any, arguments: Sequence[str], dropped: set[str]) -> list[str]:
    """Return the arguments without some options and their values."""
    kept: list[str] = []
    left = list(arguments)
    while left:
        token = left.pop(0)
        name, equals, _ = token.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        action = parser._option_string_actions.get(name)
        if name not in dropped:
            kept.append(token)
            continue
        if equals or action is None or action.nargs == 0:
            continue
        if action.nargs in ("+", "*"):
            while left and not left[0].startswith("-"):
                left.pop(0)
        elif left:
            left.pop(0)
    return kept


def divide(items: Sequence[int], num_engines: int, each: int = 0) -> list[list[int]]:
    """Divide cores or GPUs among engines, in order; there must be one for each at least.

    each: how many an engine must have; 0 divides all of them evenly.
    """
    size = each or max(1, len(items) // num_engines)
    return [list(items[engine * size : (engine + 1) * size]) for engine in range(num_engines)]


def engine_command(
    model: str, arguments: Sequence[str], host: str, port: int, role: Role
) -> tuple[str, ...]:
    """Return what starts an engine with the connector."""
    return (
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *arguments,
        "--host", host, "--port", str(port), "--disable-uvicorn-access-log",
        "--kv-connector", "pdplugin", "--kv-role", role.value,
    )  # fmt: skip


def engine_settings(
    deployment: Deployment | None, arguments: Sequence[str]
) -> dict[Role, EngineSettings]:
    """Return what engines get: what a deployment says, if there is one, and these arguments."""
    if deployment is None:
        return dict.fromkeys(Role, EngineSettings(arguments))
    return {
        role: EngineSettings(
            [*deployment.engine_words(role), *arguments], deployment.engine_environ(role)
        )
        for role in Role
    }


def plan_engines(
    counts: Mapping[Role, int],
    model: str,
    settings: Mapping[Role, EngineSettings],
    logs: Path,
    tp_size: int,
    environ: Mapping[str, str],
) -> list[LocalEngine]:
    """Return the engines to start, each with its part of this machine.

    environ: what each gets of its surroundings, beside that.

    Raises:
        ConfigError: there are fewer GPUs than the engines need.
    """
    names = [(f"{role.value}-{i}", role) for role, count in counts.items() for i in range(count)]
    parts = _environs(len(names), tp_size, environ)
    engines = []
    for (name, role), part in zip(names, parts, strict=True):
        port = free_port()
        command = engine_command(model, settings[role].arguments, "127.0.0.1", port, role)
        url = f"http://127.0.0.1:{port}"
        log = logs / f"{name}.log"
        own = {**environ, **part, **settings[role].environ}
        engines.append(LocalEngine(name, command, own, log, role, url))
    return engines


def _environs(num_engines: int, tp_size: int, environ: Mapping[str, str]) -> list[dict[str, str]]:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        cores = sorted(os.sched_getaffinity(0))
        if num_engines * tp_size > len(cores):
            # Engines that are bound to the same core hold each other up, however idle the others.
            parts = [{"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}] * num_engines
        else:
            parts = [
                {
                    "VLLM_CPU_OMP_THREADS_BIND": "|".join(
                        ",".join(map(str, rank)) for rank in divide(part, tp_size)
                    )
                }
                for part in divide(cores, num_engines)
            ]
        chosen = {k: v for k, v in environ.items() if k == "VLLM_CPU_OMP_THREADS_BIND"}
        return [
            {
                **part,
                **chosen,
                "VLLM_CPU_KVCACHE_SPACE": environ.get(
                    "VLLM_CPU_KVCACHE_SPACE", str(kv_gib(num_engines))
                ),
            }
            for part in parts
        ]
    import torch

    names = (environ.get("CUDA_VISIBLE_DEVICES") or "").split(",")
    visible = names if names != [""] else list(map(str, range(torch.cuda.device_count())))
    num_gpus = len(visible)
    if num_gpus < num_engines * tp_size:
        raise ConfigError(
            f"{num_engines} engines of {tp_size} GPUs each need {num_engines * tp_size} GPUs, and "
            f"this machine has {num_gpus}; start fewer with --prefill and --decode"
        )
    gpus = divide(range(num_gpus), num_engines, tp_size)
    return [{"CUDA_VISIBLE_DEVICES": ",".join(visible[i] for i in part)} for part in gpus]


def kv_gib(num_engines: int) -> int:
    """Return a KV cache size that leaves room for the weights: vLLM would take almost all memory
    for each engine."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(8, int(available / 2**30 / 3 / num_engines)))


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nothing listens on there."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


class Supervisor:
    """Keeps processes up: one that dies is started again, after a pause that grows.

    stop_s: how long they may take to end when they are told to.
    """

    def __init__(self, processes: Sequence[LocalProcess], stop_s: float = _STOP_S) -> None:
        self._wanted = processes
        self._stop_s = stop_s
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._has_served = False
        self._stopping = asyncio.Event()
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails with EngineStartError when one ends before all were up."""

    def start(self) -> None:
        for process in self._wanted:
            if isinstance(process, LocalEngine):
                logger.info("starting %s at %s, log in %s", process.name, process.url, process.log)
            self._tasks.append(asyncio.create_task(self._keep_up(process), name=process.name))

    def all_are_up(self) -> None:
        """From now on one that ends is started again."""
        self._has_served = True

    async def stop(self) -> None:
        """End all, in good order if they let us."""
        self._stopping.set()
        self._signal_all(signal.SIGTERM)
        if not self._tasks:
            return
        _, pending = await asyncio.wait(self._tasks, timeout=self._stop_s)
        if pending:
            names = ", ".join(task.get_name() for task in pending)
            logger.warning("%s did not end in %.0f s: killed", names, self._stop_s)
            self._signal_all(signal.SIGKILL)
            await asyncio.wait(pending)

    def _signal_all(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            if process.returncode is None:
                signal_family(process, number)

    async def _keep_up(self, wanted: LocalProcess) -> None:
        loop = asyncio.get_running_loop()
        backoff_s = _FIRST_BACKOFF_S
        while True:
            started_at = loop.time()
            status = await self._run(wanted)
            if self._stopping.is_set():
                return
            if not self._has_served:
                if not self.failure.done():
                    text = f"{wanted.name} ended with status {status}" + tail(wanted.log)
                    self.failure.set_exception(EngineStartError(text))
                return
            if loop.time() - started_at > _STEADY_S:
                backoff_s = _FIRST_BACKOFF_S
            text = "%s ended with status %s; starting it again in %.0f s"
            logger.warning(text, wanted.name, status, backoff_s)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff_s)
                return
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    async def _run(self, wanted: LocalProcess) -> int:
        process = await spawn(wanted)
        self._processes[wanted.name] = process
        if self._stopping.is_set():
            signal_family(process, signal.SIGTERM)
        status = await process.wait()
        signal_family(process, signal.SIGKILL)  # what is left of its children
        return status


async def spawn(wanted: LocalProcess) -> asyncio.subprocess.Process:
    """Start a process that ends when the calling thread does."""
    with ExitStack() as stack:
        log = stack.enter_context(wanted.log.open("ab")) if wanted.log else None
        return await asyncio.create_subprocess_exec(
            *wanted.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(wanted.environ),
            preexec_fn=_set_apart,
        )


def tail(log: Path | None) -> str:
    """Return the end of a log, to follow a message."""
    if log is None:
        return ""
    lines = log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    return "\n".join([":", *lines])


def _set_apart() -> None:
    """In the child: be in a process group of its own, as Ctrl-C is the parent's, who lets what is
    under way end; and end when the parent does, however that ends.

    Not in a session of its own: Linux may schedule sessions against each other, and one engine
    that spins then starves another.
    """
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def signal_family(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Signal a process and all its children."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def parse_counts(args: argparse.Namespace) -> dict[Role, int]:
    """Read how many engines of each role are wanted."""
    counts = {Role.PREFILL: args.prefill, Role.DECODE: args.decode, Role.BOTH: args.both}
    if not counts[Role.DECODE] and not counts[Role.BOTH]:
        raise ConfigError("at least one engine must decode: --decode 1 or --both 1")
    return counts
