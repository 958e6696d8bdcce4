"""The engines and routers of `benchmarks.handoff`: start, share the cores out, pause, stop.

All engines of all arms are up during the whole run, but only one arm is awake at a time: the
others are stopped with SIGSTOP, because an idle engine with vLLM's NixlConnector still spins.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import psutil

from benchmarks.client import Prompts, RequestFailed, ask
from benchmarks.network import KV_DEVICE, Host, Network
from tests.engine import Engine, EngineError, connector_arguments, free_port, say

ENGINE_FLAGS = (
    "--dtype", "float32", "--enforce-eager",
    "--max-model-len", "9216", "--max-num-batched-tokens", "2048",
)  # fmt: skip
"""What every engine of every arm is started with."""

KV_GIB = 1
START_TIMEOUT_S = 900.0  # five engines import vLLM on two cores at the same time
ROUTER_START_TIMEOUT_S = 120.0
REST_TIMEOUT_S = 120.0
SETTLE_S = 0.5
WARM_UP_TOKENS = 160
WARM_UP_TRIES = 3

HTTP_PORTS = {"alone": 8000, "nixl": 8001, "pdplugin": 8002}
NIXL_PORT = 5600
PD_PORT = 5700

PR_SET_PDEATHSIG = 1  # linux/prctl.h

REPO = Path(__file__).resolve().parents[1]


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


@dataclasses.dataclass(frozen=True, slots=True)
class Arm:
    """One engine, or a producer and a consumer, by role."""

    name: str
    engines: Mapping[str, Engine]

    def signal(self, number: signal.Signals) -> None:
        for engine in self.engines.values():
            engine.signal_all(number)

    def pause(self) -> None:
        """Wait until no request holds KV, then stop the engines' processes."""
        for role, engine in self.engines.items():
            try:
                engine.wait_until_at_rest(REST_TIMEOUT_S)
            except (AssertionError, httpx.HTTPError) as problem:
                say(f"{self.name}, {role}: {problem}")
        self.signal(signal.SIGSTOP)

    def descriptors(self) -> float | None:
        """Return how many read descriptors the consumer has used so far; None if it cannot say."""
        names = {
            "nixl": "vllm:nixl_num_descriptors_sum",
            "pdplugin": "pd_fetch_descriptors_total",
        }
        if self.name not in names:
            return None
        samples = self.engines["consumer"].metrics().items()
        found = [value for key, value in samples if key.partition("{")[0] == names[self.name]]
        return sum(found) if found else None


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """A router or a proxy in front of an arm."""

    kind: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """One way to have a request answered: an arm, and how its two engines are asked."""

    arm: Arm
    dispatch: str
    url: str
    front: Server | None
    cores: Cores

    @property
    def name(self) -> str:
        return self.arm.name if self.front is None else f"{self.arm.name}, {self.dispatch}"

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
        time.sleep(SETTLE_S)
        self.share_cores()
        for attempt in range(1, WARM_UP_TRIES + 1):
            try:
                ask(self.url, self.model, prompts.next(warm_up_tokens), 4)
                break
            except RequestFailed as error:
                if attempt == WARM_UP_TRIES:
                    text = f"{self.name} does not answer: {error}"
                    raise RequestFailed(f"{text}\n{self.tails()}") from error
                time.sleep(1)
        self.share_cores()
        time.sleep(SETTLE_S)

    def tails(self) -> str:
        """Return the ends of the engines' logs, and of the router's."""
        parts = [f"-- {role}:\n{e.log_tail(12)}" for role, e in self.arm.engines.items()]
        if self.front:
            text = self.front.log.read_text(errors="replace").splitlines()[-12:]
            parts.append(f"-- {self.front.kind}:\n" + "\n".join(text))
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
        if self.front:
            for process in family(self.front.process.pid):
                pin(process.pid, self.cores.other)
        pin(os.getpid(), self.cores.other)

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU seconds of each process so far, by what it is."""
        used: dict[str, float] = {"client": own_cpu_seconds(psutil.Process())}
        for role, engine in self.arm.engines.items():
            for process in family(engine.process.pid):
                label = f"{role}_{part_of(process, engine)}"
                used[label] = used.get(label, 0.0) + own_cpu_seconds(process)
        if self.front:
            used[self.front.kind] = sum(map(own_cpu_seconds, family(self.front.process.pid)))
        return used


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


def pin(pid: int, core: int, exceptions: Mapping[int, int] | None = None) -> None:
    """Pin all threads of a process to a core, but those in ``exceptions`` to theirs."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for name in os.listdir(f"/proc/{pid}/task"):
            thread = int(name)
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, {(exceptions or {}).get(thread, core)})


def start(
    arms: Sequence[str],
    dispatches: Sequence[str],
    model: Path,
    network: Network,
    folder: Path,
    stack: ExitStack,
) -> list[Route]:
    """Start everything, and return the routes with all their engines paused.

    folder: where the logs go.
    stack: gets what stops it all.

    Raises:
        EngineError: an engine or a router did not start.
        RequestFailed: a route does not answer.
    """
    cores = Cores.choose()
    say(f"starting {', '.join(arms)}: one to five minutes; logs in {folder}")
    engines: list[Engine] = []
    stack.callback(stop_all, engines)
    started = [start_arm(name, model, network, cores, folder, engines) for name in arms]
    wait_until_paused(engines)
    routes: list[Route] = []
    for arm in started:
        arm.signal(signal.SIGCONT)
        routes += routes_of(arm, dispatches, network, cores, folder, stack)
        arm.pause()
    # Only now, because waking a route pins this process, and what it starts would be pinned too.
    prompts = Prompts(1)
    for route in routes:
        for _ in range(2):  # the first brings the handshakes
            route.wake(prompts)
        route.arm.pause()
        say(f"{route.name} answers")
    return routes


def start_arm(
    name: str, model: Path, network: Network, cores: Cores, folder: Path, running: list[Engine]
) -> Arm:
    """Start the engines of an arm and return at once; each is added to ``running``."""
    roles: list[tuple[str, Host, Sequence[str], Mapping[str, str]]]
    if name == "alone":
        roles = [("alone", network.hosts[0], (), {})]
    elif name == "nixl":
        config = {
            "kv_connector": "NixlConnector",
            "kv_role": "kv_both",
            "kv_buffer_device": "cpu",
        }
        chosen = ("--kv-transfer-config", json.dumps(config))
        roles = [(role, host, chosen, nixl_settings(host)) for role, host in pairs(network)]
    else:
        key = {"VLLM_PD_CLUSTER_KEY": secrets.token_hex(32)}
        roles = [
            (role, host, connector_arguments(pd_role, host=host.kv_ip, port=PD_PORT), key)
            for (role, host), pd_role in zip(pairs(network), ("prefill", "decode"), strict=True)
        ]
    engines: dict[str, Engine] = {}
    for role, host, flags, settings in roles:
        engine = start_engine(name, role, host, model, flags, settings, cores, folder)
        running.append(engine)
        engines[role] = engine
    return Arm(name, engines)


def pairs(network: Network) -> list[tuple[str, Host]]:
    return list(zip(("producer", "consumer"), network.hosts, strict=True))


def nixl_settings(host: Host) -> dict[str, str]:
    return {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": host.kv_ip,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(NIXL_PORT),
    }


def start_engine(
    arm: str,
    role: str,
    host: Host,
    model: Path,
    flags: Sequence[str],
    settings: Mapping[str, str],
    cores: Cores,
    folder: Path,
) -> Engine:
    """Start ``vllm serve`` on a host and return at once. Only KV may use the link."""
    log = folder / f"{arm}-{role}.log"
    command = host.command(
        str(Path(sys.executable).with_name("vllm")), "serve", str(model),
        "--host", host.http_ip, "--port", str(HTTP_PORTS[arm]),
        "--served-model-name", model.name, "--disable-uvicorn-access-log",
        *ENGINE_FLAGS, *flags,
    )  # fmt: skip
    common = {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": str(cores.compute),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # What the ranks of one engine say to each other stays in its namespace.
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        # Both namespaces share /dev/shm: without this UCX would not use the link.
        "UCX_TLS": "tcp,self",
        "UCX_NET_DEVICES": KV_DEVICE,
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **common, **settings},
            process_group=0,
        )
    url = f"http://{host.http_ip}:{HTTP_PORTS[arm]}"
    name = arm if role == arm else f"{arm} {role}"
    return Engine(name, url, model.name, process, log)


def stop_all(engines: Sequence[Engine]) -> None:
    """Stop the engines together; those that are paused too."""
    for engine in engines:
        engine.signal_all(signal.SIGCONT)
        engine.process.terminate()
    for engine in engines:
        engine.stop()


def wait_until_paused(engines: Sequence[Engine]) -> None:
    """Stop each engine with SIGSTOP as soon as it is ready, so that the others start sooner."""
    began = time.monotonic()
    waiting = list(engines)
    while waiting:
        for engine in list(waiting):
            if is_ready(engine.url, engine.process, engine.name, engine.log):
                engine.signal_all(signal.SIGSTOP)
                waiting.remove(engine)
                say(f"{engine.name} is ready after {time.monotonic() - began:.0f} s")
        if waiting and time.monotonic() - began > START_TIMEOUT_S:
            late = waiting[0]
            raise EngineError(
                f"{late.name} was not ready after {START_TIMEOUT_S:.0f} s:\n{late.log_tail()}"
            )
        time.sleep(0.5)


def is_ready(url: str, process: subprocess.Popen[bytes], name: str, log: Path) -> bool:
    """Ask for the health check. Raises EngineError if the process has ended."""
    if process.poll() is not None:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise EngineError(f"{name} ended with status {process.returncode}:\n{tail}")
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def routes_of(
    arm: Arm,
    dispatches: Sequence[str],
    network: Network,
    cores: Cores,
    folder: Path,
    stack: ExitStack,
) -> list[Route]:
    """Return the ways to ask an arm, with their routers started. Its engines must be running."""
    if arm.name == "alone":
        return [Route(arm, "serial", arm.engines["alone"].url, None, cores)]
    producer, consumer = arm.engines["producer"], arm.engines["consumer"]
    routes: list[Route] = []
    # NixlConnector's handoff gets its name in the prefill engine's answer: serial only.
    for dispatch in ("serial",) if arm.name == "nixl" else dispatches:
        port = free_port()
        if dispatch == "serial":
            kind = "router"
            command = [
                str(Path(sys.executable).with_name("vllm-router")), "--vllm-pd-disaggregation",
                "--prefill", producer.url, "--decode", consumer.url,
                "--host", "127.0.0.1", "--port", str(port),
                "--prometheus-port", str(free_port()),
                # Engines that are paused must not be taken for dead.
                "--health-check-interval-secs", "86400",
                "--health-failure-threshold", "1000000",
            ]  # fmt: skip
        else:
            kind = "proxy"
            command = [
                sys.executable, str(REPO / "examples" / "concurrent_proxy.py"),
                "--prefill", producer.url,
                "--prefill-control", f"{network.hosts[0].kv_ip}:{PD_PORT}",
                "--decode", consumer.url, "--host", "127.0.0.1", "--port", str(port),
            ]  # fmt: skip
        front = start_server(kind, command, port, folder / f"{arm.name}-{kind}.log", stack)
        routes.append(Route(arm, dispatch, front.url, front, cores))
    return routes


def end_with_parent() -> None:
    """Have the kernel end this process when its parent dies, however that happens.

    Engines do not need it: the next run finds them by their namespace.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def start_server(
    kind: str, command: Sequence[str], port: int, log: Path, stack: ExitStack
) -> Server:
    """Start a router or proxy and wait for its health check."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=end_with_parent,
        )
    server = Server(kind, f"http://127.0.0.1:{port}", process, log)
    stack.callback(server.stop)
    deadline = time.monotonic() + ROUTER_START_TIMEOUT_S
    while not is_ready(server.url, process, kind, log):
        if time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            raise EngineError(f"the {kind} was not ready:\n{tail}")
        time.sleep(0.2)
    return server
