"""Real vLLM servers for the tests, the demo and the benchmarks: start, ask, watch, stop."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import httpx
import psutil

from tests.http_client import HTTP

START_TIMEOUT_S = 240.0


PRODUCE = {"do_remote_decode": True}
"""What a router sends to a producer."""


class EngineError(RuntimeError):
    """An engine did not start; the message ends with the tail of its log."""


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """One answer. ``logprobs[i]`` holds the most likely tokens at i and their log-probabilities."""

    text: str
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    logprobs: tuple[Mapping[str, float], ...]
    finish_reason: str
    kv_transfer_params: Mapping[str, Any] | None


@dataclasses.dataclass(slots=True)
class Engine:
    """One ``vllm serve`` process, and its children."""

    name: str
    url: str
    model: str
    process: subprocess.Popen[bytes]
    log: Path
    control_port: int = 0
    """Of a producer that a dispatcher is to name before it has answered."""

    def complete(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 16,
        *,
        kv_transfer_params: Mapping[str, Any] | None = None,
        timeout_s: float = 120.0,
        **sampling: Any,
    ) -> Completion:
        """Ask for a completion. Raises httpx.HTTPStatusError when the engine refuses."""
        body = self.body(prompt, max_tokens, kv_transfer_params, **sampling)
        answer = HTTP.post(f"{self.url}/v1/completions", json=body, timeout=timeout_s)
        answer.raise_for_status()
        return parse_completion(answer.json())

    def body(
        self,
        prompt: str | Sequence[int],
        max_tokens: int,
        kv_transfer_params: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> dict[str, Any]:
        """Return the request that ``complete`` sends."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": 5,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if kv_transfer_params is not None:
            body["kv_transfer_params"] = dict(kv_transfer_params)
        return body | sampling

    def metrics(self) -> dict[str, float]:
        """Return every Prometheus sample: ``name{label="value"}`` without engine and model."""
        samples: dict[str, float] = {}
        for line in HTTP.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            if line.startswith("#") or " " not in line:
                continue
            key, value = line.rsplit(" ", 1)
            name, _, labels = key.partition("{")
            kept = [
                label
                for label in labels.rstrip("}").split(",")
                if label and not label.startswith(("engine=", "model_name="))
            ]
            samples[name + ("{" + ",".join(kept) + "}" if kept else "")] = float(value)
        return samples

    def forget_prefixes(self) -> None:
        """Empty the prefix cache; for an engine with VLLM_SERVER_DEV_MODE and nothing to do."""
        self.wait_until_at_rest()
        HTTP.post(f"{self.url}/reset_prefix_cache", timeout=30).raise_for_status()

    def is_at_rest(self) -> bool:
        """Say whether no KV block is used, no request is known and no handoff is open."""
        now = self.metrics()
        names = (
            "vllm:kv_cache_usage_perc",
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            'pd_handoffs_open{side="producer"}',
            'pd_handoffs_open{side="consumer"}',
        )
        return all(now.get(name, 0.0) == 0.0 for name in names)

    def holds_blocks(self) -> bool:
        """Say whether a request has KV blocks."""
        return self.metrics()["vllm:kv_cache_usage_perc"] > 0

    def wait_until_at_rest(self, timeout_s: float = 30.0) -> None:
        """Wait until nothing is held any more; raise AssertionError when something leaks."""
        deadline = time.monotonic() + timeout_s
        while not self.is_at_rest():
            if time.monotonic() > deadline:
                held = {k: v for k, v in self.metrics().items() if v and "handoffs_open" in k}
                usage = self.metrics()["vllm:kv_cache_usage_perc"]
                raise AssertionError(f"{self.name} still holds KV: usage {usage}, {held}")
            time.sleep(0.1)

    def worker_pid(self) -> int:
        """Return the process that holds the KV cache (tensor parallel size 1)."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        titles = {child.pid: " ".join(child.cmdline()) for child in children}
        for title in ("VLLM::Worker", "VLLM::EngineCore"):
            for pid, found in titles.items():
                if found.startswith(title):
                    return pid
        raise AssertionError(f"{self.name} has no worker process: {titles}")

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to the server and all its children."""
        try:
            server = psutil.Process(self.process.pid)
            family = [server, *server.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def kill(self) -> None:
        """Die at once, as a machine does."""
        self.signal_all(signal.SIGKILL)
        self.process.wait(30)

    def stop(self) -> None:
        """Shut down in good order; kill what has not ended after 30 s."""
        self.signal_all(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S, path: str = "/health") -> None:
        """Wait for the health check. Raises EngineError when the process ends or time is up."""
        deadline = time.monotonic() + timeout_s
        problem = "it was not asked"
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise EngineError(
                    f"{self.name} ended with status {self.process.returncode}:\n{self.log_tail()}"
                )
            try:
                answer = HTTP.get(self.url + path, timeout=5)
                if answer.status_code == 200:
                    return
                problem = f"status {answer.status_code}"
            except httpx.TransportError as error:
                problem = repr(error)
            time.sleep(0.25)
        raise EngineError(
            f"{self.name} was not ready after {timeout_s:.0f} s ({problem}):\n{self.log_tail()}"
        )

    def log_tail(self, lines: int = 25) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def start(
    name: str,
    model: Path,
    arguments: Sequence[str],
    *,
    cores: str,
    folder: Path,
    kv_gib: int = 1,
    control_port: int = 0,
    environ: Mapping[str, str] | None = None,
    programs: Path | None = None,
) -> Engine:
    """Start ``vllm serve`` on a free port and return at once; see ``wait_until_ready``.

    cores: as VLLM_CPU_OMP_THREADS_BIND takes it: "0", or "0|1" for two ranks.
    folder: where the log goes.
    control_port: what the arguments say of it.
    programs: where ``vllm`` lies, if not in this environment; it then runs in ``folder``.
    """
    port = free_port()
    log = folder / f"{name}-{port}.log"
    command = [
        str((programs or Path(sys.executable).parent) / "vllm"), "serve", str(model),
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", model.name,
        "--disable-uvicorn-access-log", *arguments,
    ]  # fmt: skip
    settings = {"VLLM_CPU_KVCACHE_SPACE": str(kv_gib), "VLLM_CPU_OMP_THREADS_BIND": cores}
    cwd = folder if programs else None
    process = spawn(command, {**settings, **(environ or {})}, log, cwd)
    return Engine(name, f"http://127.0.0.1:{port}", model.name, process, log, control_port)


def start_frontend(
    command: str,
    model: Path,
    arguments: Sequence[str],
    *,
    folder: Path,
    environ: Mapping[str, str] | None = None,
) -> Engine:
    """Start ``vllm-pd up`` or ``vllm-pd serve`` on a free port and return at once.

    Its engines have a GiB of KV cache each.
    """
    port = free_port()
    log = folder / f"frontend-{port}.log"
    words = [
        str(Path(sys.executable).with_name("vllm-pd")), command, str(model),
        "--port", str(port), "--served-model-name", model.name, *arguments,
    ]  # fmt: skip
    process = spawn(words, {"VLLM_CPU_KVCACHE_SPACE": "1", **(environ or {})}, log)
    return Engine(f"frontend {command}", f"http://127.0.0.1:{port}", model.name, process, log)


def spawn(
    command: Sequence[str], environ: Mapping[str, str], log: Path, cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a server offline and in a process group of its own; ``log`` gets what it prints."""
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as out:
        return subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **offline, **environ},
            process_group=0,
            cwd=cwd,
        )


@contextmanager
def running(engines: Sequence[Engine]) -> Iterator[Sequence[Engine]]:
    """Wait until all are ready; stop all at the end, whatever happens."""
    try:
        for engine in engines:
            engine.wait_until_ready()
        yield engines
    finally:
        for engine in engines:
            engine.process.terminate()
        for engine in engines:
            engine.stop()


def hand_off(
    producer: Engine,
    consumer: Engine,
    prompt: str | Sequence[int],
    max_tokens: int = 16,
    **sampling: Any,
) -> Completion:
    """Prefill on one engine, decode on another, as a router does."""
    first = producer.complete(prompt, 1, kv_transfer_params=PRODUCE, **sampling)
    return consumer.complete(
        prompt, max_tokens, kv_transfer_params=first.kv_transfer_params, **sampling
    )


def at_once(producer: Engine) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters for a producer and a consumer that are asked at the same moment."""
    handoff_id = secrets.token_hex(16)
    produce = {**PRODUCE, "handoff_id": handoff_id}
    consume = {
        "do_remote_prefill": True,
        "remote_host": "127.0.0.1",
        "remote_port": producer.control_port,
        "remote_handoff_id": handoff_id,
    }
    return produce, consume


def hand_off_at_once(
    producer: Engine,
    consumer: Engine,
    prompt: str | Sequence[int],
    max_tokens: int = 16,
    **sampling: Any,
) -> Completion:
    """Ask both engines at the same moment, as a dispatcher does that need not wait."""
    produce, consume = at_once(producer)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(producer.complete, prompt, 1, kv_transfer_params=produce, **sampling)
        answer = consumer.complete(prompt, max_tokens, kv_transfer_params=consume, **sampling)
        first.exception(120)  # ended with an error when the consumer had no need of it
    return answer


def parse_event(line: str) -> dict[str, Any] | None:
    """Return what one line of a streamed answer says: a chunk, or an error; nothing where the
    stream ends; None for a line that says nothing."""
    name, found, data = line.partition(": ")
    if name != "data" or not found:
        return None
    event: dict[str, Any] = {} if data.strip() == "[DONE]" else json.loads(data)
    return event


def parse_completion(answer: Mapping[str, Any]) -> Completion:
    """Read the one choice of an OpenAI completion that has token ids and log-probabilities."""
    choice = answer["choices"][0]
    logprobs = choice["logprobs"] or {"token_logprobs": (), "top_logprobs": ()}
    return Completion(
        choice["text"],
        tuple(choice["token_ids"] or ()),
        tuple(logprobs["token_logprobs"]),
        tuple(logprobs["top_logprobs"] or ()),
        choice["finish_reason"],
        answer.get("kv_transfer_params"),
    )


_FIRST_PORT, _NUM_PORTS = 20_000, 6_000
"""Of a worker of the tests. Below those that the system gives out: an engine must find its own
still free when it has started."""
_ports = itertools.count(random.randrange(_NUM_PORTS))


def free_port() -> int:
    """Return a port on which nobody listens, and which no other worker of the tests is given."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for number in _ports:
        port = _FIRST_PORT + worker * _NUM_PORTS + number % _NUM_PORTS
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable")


def engine_urls(up: Engine) -> dict[str, str]:
    """Return the URLs of the engines that ``vllm-pd up`` has started, by their names."""
    words = [line.split() for line in up.log.read_text().splitlines() if "] starting " in line]
    return {w[w.index("starting") + 1]: w[w.index("at") + 1].rstrip(",") for w in words}


def connector_arguments(role: str, **options: Any) -> list[str]:
    """Return the flags that choose ``pdplugin`` with a role and its options."""
    policy = options.pop("kv_load_failure_policy", "fail")
    config = {"kv_load_failure_policy": policy, "kv_connector_extra_config": options}
    return [
        "--kv-connector", "pdplugin", "--kv-role", role,
        "--kv-transfer-config", json.dumps(config),
    ]  # fmt: skip


def say(text: str, out: TextIO = sys.stderr) -> None:
    """Print progress at once."""
    print(text, file=out, flush=True)
