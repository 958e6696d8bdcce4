"""Engines that ``vllm-pd`` starts here: what each gets of the options, and of the machine."""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_pd_plugin.config import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, FILE_SUFFIX
from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.deployment import Deployment
from vllm_pd_plugin.frontend.processes.supervisor import LocalEngine
from vllm_pd_plugin.frontend.routing.choice import Role
from vllm_pd_plugin.frontend.typed_words import TypedWords
from vllm_pd_plugin.net.hosts import in_url

_API_OPTIONS = {
    "--host", "--port", "--uds", "--api-key", "--root-path", "--allowed-origins",
    "--allowed-methods", "--allowed-headers", "--allow-credentials", "--ssl-keyfile",
    "--ssl-certfile", "--ssl-ca-certs", "--enable-ssl-refresh", "--ssl-cert-reqs",
    "--ssl-ciphers", "--middleware", "--api-server-count", "-asc", "--otlp-traces-endpoint",
    "--max-num-queued-reqs", "--max-num-queued-tokens", "--model",
    "--lora-modules",
}  # fmt: skip
"""Options of ``vllm serve`` that are the frontend's alone, and the model, which comes first."""
_FRONTEND_SECRETS = {
    variable + suffix
    for variable in (ADMIN_KEY_VARIABLE, API_KEY_VARIABLE)
    for suffix in ("", FILE_SUFFIX)
}
"""Variables that engines of ``vllm-pd up`` have no use for."""
_HOST = "127.0.0.1"
ONLY_FRONTENDS = "vllm_pd_plugin.frontend.api.only_frontends.OnlyFrontends"


@dataclasses.dataclass(frozen=True, slots=True)
class EngineSettings:
    """What all engines of a role get: options of ``vllm serve``, and environment on top of this
    process's."""

    arguments: Sequence[str] = ()
    environ: Mapping[str, str] = dataclasses.field(default_factory=dict)


def engine_arguments(typed: TypedWords, arguments: Sequence[str], own: set[str]) -> list[str]:
    """Return what is for the engines too, of the options that ``vllm-pd up`` was given.

    own: the options that ``vllm serve`` does not have.
    """
    return typed.without(arguments, _API_OPTIONS | own)


def divide(items: Sequence[int], num_engines: int, each: int = 0) -> list[list[int]]:
    """Divide cores or GPUs among engines, in order; there must be one for each at least.

    each: how many an engine must have; 0 divides all of them evenly.
    """
    size = each or max(1, len(items) // num_engines)
    return [list(items[engine * size : (engine + 1) * size]) for engine in range(num_engines)]


def engine_command(
    model: str, arguments: Sequence[str], host: str, port: int, role: Role, is_private: bool
) -> tuple[str, ...]:
    """Return what starts an engine with the connector.

    is_private: nobody but frontends is served, see ``OnlyFrontends``.
    """
    return (
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *arguments,
        "--host", host, "--port", str(port), "--disable-uvicorn-access-log",
        "--kv-connector", "pdplugin", "--kv-role", role.value,
        *(("--middleware", ONLY_FRONTENDS) if is_private else ()),
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
    is_private: bool,
    port_base: int | None,
) -> list[LocalEngine]:
    """Return the engines to start, each with its part of this machine.

    environ: what each gets of its surroundings, beside that. is_private: see ``engine_command``.
    port_base: the first engine's port; None gives each a free one.

    Raises:
        ConfigError: there are fewer GPUs than the engines need, or none for each, or a port is in
            use.
    """
    if tp_size < 1:
        raise ConfigError(f"--tensor-parallel-size {tp_size} is less than 1")
    names = [(f"{role.value}-{i}", role) for role, count in counts.items() for i in range(count)]
    environ = {name: value for name, value in environ.items() if name not in _FRONTEND_SECRETS}
    parts = _environs(len(names), tp_size, environ)
    ports = engine_ports(len(names), port_base)
    engines = []
    for (name, role), part, port in zip(names, parts, ports, strict=True):
        arguments = settings[role].arguments
        command = engine_command(model, arguments, _HOST, port, role, is_private)
        log = logs / f"{name}.log"
        own = {**environ, **part, **settings[role].environ}
        url = f"http://{in_url(_HOST)}:{port}"
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


def has_api_key(environ: Mapping[str, str]) -> bool:
    """Say whether a frontend with these surroundings asks for an API key."""
    return any(environ.get(API_KEY_VARIABLE + suffix) for suffix in ("", FILE_SUFFIX))


def kv_gib(num_engines: int) -> int:
    """Return a KV cache size that leaves room for the weights: vLLM would take almost all memory
    for each engine."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(8, int(available / 2**30 / 3 / num_engines)))


def engine_ports(num_engines: int, base: int | None) -> list[int]:
    """Return a port for each engine. Raises ConfigError where a fixed one cannot be had."""
    if base is None:
        return [free_port(_HOST) for _ in range(num_engines)]
    if not 0 < base <= 65536 - num_engines:
        raise ConfigError(
            f"--engine-port-base {base} leaves no port for each of {num_engines} engines; "
            f"use 1 to {65536 - num_engines}"
        )
    ports = list(range(base, base + num_engines))
    for port in ports:
        try:
            with socket.create_server((_HOST, port)):
                pass
        except OSError as error:
            raise ConfigError(
                f"port {port} for an engine: {error.strerror}; choose others with "
                "--engine-port-base"
            ) from error
    return ports


def log_folder(wanted: Path | None) -> Path:
    """Return where logs go: a new folder where none is wanted. Raises ConfigError."""
    if wanted is None:
        return Path(tempfile.mkdtemp(prefix="vllm-pd-"))
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--log-dir {wanted} cannot be made: {error.strerror}") from error
    if not os.access(wanted, os.W_OK | os.X_OK):
        raise ConfigError(f"--log-dir {wanted} cannot be written to")
    return wanted


def refuse_shared_port(port: int, num_engines: int, base: int | None) -> None:
    """Raise ConfigError where an engine is to have the frontend's own port."""
    if base is not None and base <= port < base + num_engines:
        raise ConfigError(
            f"--port {port} is one of the engines' ports, {base} to {base + num_engines - 1}; "
            "choose others with --engine-port-base"
        )


def free_port(host: str) -> int:
    """Return a port that nothing listens on there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def parse_counts(args: argparse.Namespace) -> dict[Role, int]:
    """Read how many engines of each role are wanted. Raises ConfigError."""
    counts = {Role.PREFILL: args.prefill, Role.DECODE: args.decode, Role.BOTH: args.both}
    for role, count in counts.items():
        if count < 0:
            raise ConfigError(f"--{role.value} {count}: there cannot be less than none")
    if not counts[Role.DECODE] and not counts[Role.BOTH]:
        raise ConfigError("at least one engine must decode: --decode 1 or --both 1")
    return counts
