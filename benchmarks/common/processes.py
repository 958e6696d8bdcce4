"""What a server's processes use, and on which cores their threads run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from contextlib import suppress

import psutil

from tests.engine import Engine, EngineError


@dataclasses.dataclass(frozen=True, slots=True)
class Cores:
    """Which core computes, and which one has everything else."""

    compute: int
    other: int

    @classmethod
    def choose(cls) -> Cores:
        """Take the first two cores that this process may use. Raises EngineError for fewer."""
        allowed = sorted(os.sched_getaffinity(0))
        if len(allowed) < 2:
            raise EngineError("this benchmark needs two cores: one computes, one does the rest")
        return cls(*allowed[:2])


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    try:
        head = psutil.Process(pid)
        return [head, *head.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def part_of(process: psutil.Process, engine: Engine) -> str:
    """Say what a process of an engine is: api, core, worker or other."""
    if process.pid == engine.process.pid:
        return "api"
    try:
        title = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        title = ""
    for prefix, part in (("VLLM::EngineCore", "core"), ("VLLM::Worker", "worker")):
        if title.startswith(prefix):
            return part
    return "other"


def own_cpu_seconds(process: psutil.Process) -> float:
    """Return user and system time of one process, without its children."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def own_pss_bytes(process: psutil.Process) -> int:
    """Return the proportional set size of one process."""
    try:
        return int(process.memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0


def pin(pid: int, core: int, exceptions: Mapping[int, int] | None = None) -> None:
    """Pin all threads of a process to a core, but those in ``exceptions`` to theirs."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for name in os.listdir(f"/proc/{pid}/task"):
            thread = int(name)
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, {(exceptions or {}).get(thread, core)})
