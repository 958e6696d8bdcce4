"""One run of vLLM's tests: their surroundings, the process, its deadline, and what it leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Protocol

import psutil

from tests.conformance import outcomes
from tests.conformance.inside.launch import ARM_VARIABLE, OURS, SERVERS_VARIABLE
from tests.conformance.outcomes import Run

THEIRS = "vllm serve"
ARMS = (THEIRS, OURS)

INSIDE = Path(__file__).parent / "inside"
REPO = Path(__file__).parents[2]

TEST_TIMEOUT_S = 600
"""For one test and the start of its server; then it fails, and the next one runs."""

GRACE_S = 90.0

_MARK = "PD_CONFORMANCE_RUN"
_ONLY_VARIABLE = "PD_CONFORMANCE_ONLY"


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """Where things are. source: vLLM's tests. site: packages that only they need. home: HF_HOME."""

    source: Path
    site: Path
    home: Path


def environ(arm: str, site: Site, surroundings: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of an arm.

    Each engine has one thread and 1 GiB for KV, so that one engine and two are told apart by
    nothing but what is asked. vLLM's own arm knows nothing of this plug-in.
    """
    theirs = {"VLLM_PLUGINS": ",".join(other_plugins())} if arm == THEIRS else {}
    programs = [str(INSIDE / "bin"), str(Path(sys.executable).parent), surroundings["PATH"]]
    modules = [str(INSIDE), str(site.site), str(site.source), str(REPO)]
    return {
        **{k: v for k, v in surroundings.items() if not k.startswith(("VLLM_", "PYTEST_"))},
        "PATH": os.pathsep.join(programs),
        "PYTHONPATH": os.pathsep.join(modules),
        "PD_CONFORMANCE_PYTHON": sys.executable,
        "PD_CONFORMANCE_LAUNCH": str(INSIDE / "launch.py"),
        ARM_VARIABLE: arm,
        "HF_HOME": str(site.home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        **theirs,
    }


def other_plugins() -> list[str]:
    """Return vLLM's plug-ins that are installed here, without ours."""
    groups = metadata.entry_points().groups
    names = {
        entry.name
        for group in groups
        if group.startswith("vllm.")
        for entry in metadata.entry_points(group=group)
    }
    return sorted(names - {"pdplugin"})


def pytest_command(module: str, junit: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "pytest", module),
        *("-p", "pd_conformance", "-p", "no:cacheprovider"),
        *("-q", "-rfE", "--color=no", "--tb=short"),
        f"--junitxml={junit}",
        f"--timeout={TEST_TIMEOUT_S}",
    ]


def run(
    module: str,
    arm: str,
    site: Site,
    place: Path,
    deadline_s: float,
    only: Sequence[str] | None = None,
) -> Run:
    """Run a module, or some tests of it. place: of the log and the JUnit file, without a suffix."""
    junit, log = place.with_suffix(".xml"), place.with_suffix(".log")
    servers = place.with_suffix(".servers")
    for path in (junit, servers):
        path.unlink(missing_ok=True)
    mark = secrets.token_hex(8)
    surroundings = environ(arm, site, os.environ) | {_MARK: mark, SERVERS_VARIABLE: str(servers)}
    if only is not None:
        chosen = place.with_suffix(".only.json")
        chosen.write_text(json.dumps(list(only)))
        surroundings[_ONLY_VARIABLE] = str(chosen)
    began_at = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            pytest_command(module, junit),
            cwd=site.source,
            env=surroundings,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        trouble = wait(process, deadline_s)
    finally:
        kill_marked(mark)
        process.wait()
    seconds = round(time.monotonic() - began_at, 1)
    if junit.exists():
        found = outcomes.parse(junit.read_text())
    else:
        ended = f"pytest ended with {process.returncode} and wrote no results"
        found = Run({}, trouble=ended)
    return dataclasses.replace(
        found,
        trouble=trouble or found.trouble,
        seconds=seconds,
        num_servers=len(servers.read_text().splitlines()) if servers.exists() else 0,
    )


class Process(Protocol):
    """The part of a Popen that is needed to wait for it."""

    def wait(self, timeout: float) -> int: ...

    def send_signal(self, number: int) -> None: ...


def wait(process: Process, deadline_s: float) -> str:
    """Wait for pytest's end. Past the deadline interrupt it, and say so.

    An interrupted pytest ends its servers and writes what it has; one that does not within
    ``GRACE_S`` is left to ``kill_marked``.
    """
    try:
        process.wait(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)
        return f"not done in {deadline_s:.0f} s"
    return ""


def kill_marked(mark: str) -> None:
    """End what a run has left: its servers are in sessions of their own, but have its mark."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(_MARK) == mark:
                process.kill()
