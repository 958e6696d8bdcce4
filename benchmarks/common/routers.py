"""One router, proxy or frontend in front of an arm: start and stop."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from benchmarks.common.engines import Place, is_ready
from benchmarks.common.processes import family
from tests.engine import EngineError, free_port

START_TIMEOUT_S = 180.0  # a frontend imports vLLM
PR_SET_PDEATHSIG = 1  # linux/prctl.h

REPO = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True, slots=True)
class Router:
    """``kind``: router (asks serially), proxy (asks both engines at once), or frontend (both at
    once, and over their control channels)."""

    kind: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and all its children."""
        for process in family(self.process.pid):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def stop(self) -> None:
        self.signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)


def start_vllm_router(prefill_url: str, decode_url: str, log: Path, stack: ExitStack) -> Router:
    """Start vllm-router in front of two engines that are running, and will be paused."""
    # Engines that are paused must not be taken for dead.
    never = ("--health-check-interval-secs", "86400", "--health-failure-threshold", "1000000")
    return start_vllm_router_over([prefill_url], [decode_url], never, log, stack)


def start_vllm_router_over(
    prefill_urls: Sequence[str],
    decode_urls: Sequence[str],
    options: Sequence[str],
    log: Path,
    stack: ExitStack,
) -> Router:
    """Start vllm-router in front of engines that are running; ``options`` are its own."""
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("vllm-router")), "--vllm-pd-disaggregation",
        "--host", "127.0.0.1", "--port", str(port),
        "--prometheus-port", str(free_port()), *options,
    ]  # fmt: skip
    for url in prefill_urls:
        command += ["--prefill", url]
    for url in decode_urls:
        command += ["--decode", url]
    return _start("router", command, port, log, stack)


def start_frontend(
    model: Path, prefill_url: str, decode_url: str, cluster_key: str, log: Path, stack: ExitStack
) -> Router:
    """Start ``vllm-pd serve`` in front of two engines that are running; it hands off every prompt,
    and rather lets a request wait than have the decode engine compute its prompt."""
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("vllm-pd")), "serve", str(model),
        "--prefill", prefill_url, "--decode", decode_url,
        "--local-below", "0", "--no-prefill", "queue",
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", model.name,
        "--disable-uvicorn-access-log",
    ]  # fmt: skip
    environ = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PD_CLUSTER_KEY": cluster_key,
    }
    return _start("frontend", command, port, log, stack, environ)


def start_proxy(
    prefill_url: str, prefill: Place, decode_url: str, log: Path, stack: ExitStack
) -> Router:
    """Start the concurrent proxy of the examples in front of two engines."""
    port = free_port()
    command = [
        sys.executable, str(REPO / "examples" / "concurrent_proxy.py"),
        "--prefill", prefill_url, "--prefill-control", f"{prefill.kv_host}:{prefill.kv_port}",
        "--decode", decode_url, "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    return _start("proxy", command, port, log, stack)


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent dies, however that happens.

    Engines do not need it: the next run finds them by their namespace.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _start(
    kind: str,
    command: Sequence[str],
    port: int,
    log: Path,
    stack: ExitStack,
    environ: Mapping[str, str] | None = None,
) -> Router:
    """Start it and wait for its health check. Raises EngineError if that does not come."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environ or {})},
            process_group=0,
            preexec_fn=_end_with_parent,
        )
    router = Router(kind, f"http://127.0.0.1:{port}", process, log)
    stack.callback(router.stop)
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_ready(router.url, process, kind, log):
        if time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            raise EngineError(f"the {kind} was not ready after {START_TIMEOUT_S:.0f} s:\n{tail}")
        time.sleep(0.2)
    return router
