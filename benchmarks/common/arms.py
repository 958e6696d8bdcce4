"""One arm of `benchmarks.handoff`: the engines that answer together, paused and resumed as one.

All engines of all arms are up during the whole run, but only one arm is awake at a time: the
others are stopped with SIGSTOP, because an idle engine with vLLM's NixlConnector still spins.
"""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common.engines import Place, is_ready, launch, nixl_arguments, nixl_settings
from benchmarks.common.network import KV_DEVICE, Network, NetworkError
from benchmarks.common.processes import Cores
from tests.engine import Engine, EngineError, connector_arguments, say

ENGINE_FLAGS = (
    "--dtype", "float32", "--enforce-eager",
    "--max-model-len", "9216", "--max-num-batched-tokens", "2048",
)  # fmt: skip
"""What every engine of every arm is started with."""

START_TIMEOUT_S = 900.0  # five engines import vLLM on two cores at the same time
REST_TIMEOUT_S = 120.0

_PORTS = {
    "alone": (8000, 0),
    "nixl": (8001, 5600),
    "pdplugin": (8002, 5700),
    "frontend": (8003, 5800),
    "before": (8004, 5900),
}
"""Of HTTP and of KV; the namespaces are the benchmark's own."""

_PD_SERIES = {
    "descriptors": "pd_fetch_descriptors_total",
    "stretches": "pd_fetch_stretches_total",
    "packed": "pd_fetch_packed_stretches_total",
    "control_bytes": "pd_control_bytes_total",
}
_SERIES = {
    "alone": {},
    "nixl": {"descriptors": "vllm:nixl_num_descriptors_sum"},
    "pdplugin": _PD_SERIES,
    "frontend": _PD_SERIES,
}
"""What the consumer of each arm counts of its handoffs."""


@dataclasses.dataclass(frozen=True, slots=True)
class Access:
    """What a frontend must know of an arm, beside its engines' addresses."""

    model: Path
    cluster_key: str = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Arm:
    """One engine, or a producer and a consumer, by role.

    kind: alone, nixl, pdplugin, or frontend: pdplugin where a frontend reaches its control channel.
    access: where pdplugin is.
    """

    name: str
    kind: str
    engines: Mapping[str, Engine]
    places: Mapping[str, Place]
    access: Access | None = None

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

    def counts(self) -> dict[str, float]:
        """Return what the consumer has counted so far, by name; without what it does not tell."""
        wanted = _SERIES[self.kind]
        if not wanted:
            return {}
        samples = self.engines["consumer"].metrics().items()
        found = {
            name: [value for key, value in samples if key.partition("{")[0] == series]
            for name, series in wanted.items()
        }
        return {name: sum(values) for name, values in found.items() if values}


def start_arm(
    name: str,
    model: Path,
    network: Network,
    cores: Cores,
    folder: Path,
    running: list[Engine],
    source: Path | None = None,
) -> Arm:
    """Start the engines of an arm and return at once; each is added to ``running``.

    source: where the arm `before` has its ``vllm_pd_plugin``, with the native extension built.
    """
    if name in ("pdplugin", "frontend", "before"):  # each request says which codec it wants
        options = {"lossy_max": "int2"}
        kind = "frontend" if name == "frontend" else "pdplugin"
        environ = {"PYTHONPATH": str(source)} if name == "before" else {}
        return start_pair(
            name, _PORTS[name], options, (), model, network, cores, folder, running, kind, environ
        )
    roles = ("alone",) if name == "alone" else ("producer", "consumer")
    places = {
        role: Place.on_host(host, *_PORTS[name])
        for role, host in zip(roles, network.hosts, strict=False)
    }
    engines: dict[str, Engine] = {}
    for role, place in places.items():
        environ = {"VLLM_CPU_OMP_THREADS_BIND": str(cores.compute)}
        flags = list(ENGINE_FLAGS)
        if name == "nixl":
            flags += nixl_arguments()
            environ |= nixl_settings(place)
        shown = name if role == name else f"{name} {role}"
        log = folder / f"{name}-{role}.log"
        engines[role] = launch(shown, model, place, flags, environ, log)
        running.append(engines[role])
    return Arm(name, name, engines, places)


def start_pair(
    name: str,
    ports: tuple[int, int],
    options: Mapping[str, Any],
    flags: Sequence[str],
    model: Path,
    network: Network,
    cores: Cores,
    folder: Path,
    running: list[Engine],
    kind: str = "pdplugin",
    more_environ: Mapping[str, str] | None = None,
) -> Arm:
    """Start a producer and a consumer with pdplugin, with these options of the consumer's and flags
    of both, and return at once; each is added to ``running``.

    kind: "frontend" has control channels that are reached from outside as well.
    """
    cluster_key = secrets.token_hex(32)
    if kind == "frontend":
        join_http_addresses(network)
    engines: dict[str, Engine] = {}
    places: dict[str, Place] = {}
    for role, host in zip(("producer", "consumer"), network.hosts, strict=True):
        place = Place.on_host(host, *ports)
        if kind == "frontend":
            place = dataclasses.replace(place, kv_host=host.http_ip)
        places[role] = place
        pd_role, more = ("prefill", {}) if role == "producer" else ("decode", options)
        connector = connector_arguments(pd_role, host=place.kv_host, port=place.kv_port, **more)
        environ = {
            "VLLM_CPU_OMP_THREADS_BIND": str(cores.compute),
            "VLLM_PD_CLUSTER_KEY": cluster_key,
            **(more_environ or {}),
        }
        log = folder / f"{name.replace(', ', '-')}-{role}.log"
        engines[role] = launch(
            f"{name} {role}", model, place, [*ENGINE_FLAGS, *flags, *connector], environ, log
        )
        running.append(engines[role])
    return Arm(name, kind, engines, places, Access(model, cluster_key))


def join_http_addresses(network: Network) -> None:
    """Let each host reach the other's HTTP address, over the link.

    A control channel has one address, for other engines and for frontends. Those are outside, where
    only the HTTP addresses are known; between the engines it has to use the link all the same.

    Raises:
        NetworkError: the route cannot be set.
    """
    for here, there in itertools.permutations(network.hosts):
        route = ("route", "replace", f"{there.http_ip}/32", "via", there.kv_ip, "dev", KV_DEVICE)
        done = subprocess.run(
            here.command("ip", *route), capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise NetworkError(f"no route to {there.http_ip}: {done.stderr.strip()}")


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
