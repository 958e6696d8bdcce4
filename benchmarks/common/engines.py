"""One engine of a benchmark: where it lives, with what it starts, and whether it is up."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common.network import KV_DEVICE, Host
from tests.engine import Engine, EngineError, spawn

SMALL_FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096")
"""What the engines of the benchmarks with short prompts are started with."""

KV_GIB = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where an engine lives: what stays the same when it is killed and started again.

    command_prefix: runs a command there.
    kv_port: of the control channel, or of NixlConnector's side channel.
    """

    command_prefix: tuple[str, ...]
    environ: Mapping[str, str]
    http_host: str
    http_port: int
    kv_host: str
    kv_port: int

    @classmethod
    def on_host(cls, host: Host, http_port: int, kv_port: int) -> Place:
        """Return a place in a network namespace. Only KV may use the link."""
        environ = {
            # What the ranks of one engine say to each other stays in its namespace.
            "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            # All namespaces share /dev/shm: without this UCX would not use the link.
            "UCX_TLS": "tcp,self",
            "UCX_NET_DEVICES": KV_DEVICE,
        }
        prefix = tuple(host.command())
        return cls(prefix, environ, host.http_ip, http_port, host.kv_ip, kv_port)


def launch(
    name: str,
    model: Path,
    place: Place,
    flags: Sequence[str],
    environ: Mapping[str, str],
    log: Path,
) -> Engine:
    """Start ``vllm serve`` at a place and return at once; see ``is_ready``."""
    command = [
        *place.command_prefix,
        str(Path(sys.executable).with_name("vllm")), "serve", str(model),
        "--host", place.http_host, "--port", str(place.http_port),
        "--served-model-name", model.name, "--disable-uvicorn-access-log", *flags,
    ]  # fmt: skip
    settings = {"VLLM_CPU_KVCACHE_SPACE": str(KV_GIB), **place.environ, **environ}
    process = spawn(command, settings, log)
    return Engine(name, f"http://{place.http_host}:{place.http_port}", model.name, process, log)


def nixl_arguments(**more: Any) -> list[str]:
    """Return the flags that choose vLLM's NixlConnector; ``more`` goes beside its role."""
    config = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    return ["--kv-transfer-config", json.dumps(config | more)]


def nixl_settings(place: Place) -> dict[str, str]:
    """Return the environment that tells NixlConnector where its side channel is."""
    return {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": place.kv_host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(place.kv_port),
    }


def is_ready(url: str, process: subprocess.Popen[bytes], name: str, log: Path) -> bool:
    """Ask a server for its health check. Raises EngineError if the process has ended."""
    if process.poll() is not None:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise EngineError(f"{name} ended with status {process.returncode}:\n{tail}")
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
