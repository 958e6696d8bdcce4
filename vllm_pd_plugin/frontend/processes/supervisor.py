"""Processes that ``vllm-pd`` runs here, and keeps up."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from vllm_pd_plugin.errors import PdError
from vllm_pd_plugin.frontend.routing.choice import EngineKey, Role

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 1.0, 30.0
_STEADY_S = 60.0
"""An engine that has run for so long starts again without a longer pause."""
_STOP_S = 30.0
_LOG_TAIL_LINES = 25
_PR_SET_PDEATHSIG = 1


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
class LocalEngine(LocalProcess):
    """How one engine is started, and where it will be."""

    role: Role
    url: EngineKey


class Supervisor:
    """Keeps processes up: one that dies is started again, after a pause that grows.

    stop_s: how long they may take to end when they are told to.
    on_end: takes the id of each that has ended, however that was.
    """

    def __init__(
        self,
        processes: Sequence[LocalProcess],
        stop_s: float = _STOP_S,
        on_end: Callable[[int], None] = lambda pid: None,
    ) -> None:
        self._wanted = processes
        self._stop_s = stop_s
        self._on_end = on_end
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
        self._on_end(process.pid)
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
