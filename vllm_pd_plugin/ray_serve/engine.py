"""A replica of a pool: one vLLM server with the connector, started here and kept in view.

Ray chooses the node and its devices, and starts another replica when this one is unhealthy. Tokens
and KV do not pass through it: they go between the server, the frontends and the other engines.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import ray
from ray import serve
from ray.exceptions import RayError

from vllm_pd_plugin.config import CLUSTER_KEY_VARIABLE, read_secret
from vllm_pd_plugin.engine_port.messages import DESCRIPTION_PATH
from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.admin_keys import private_folder
from vllm_pd_plugin.frontend.deployment import parse_deployment
from vllm_pd_plugin.frontend.processes.local import (
    engine_command,
    free_port,
    has_api_key,
    kv_gib,
)
from vllm_pd_plugin.frontend.processes.supervisor import (
    EngineStartError,
    LocalProcess,
    signal_family,
    spawn,
    tail,
)
from vllm_pd_plugin.frontend.routing.choice import Role
from vllm_pd_plugin.net.hosts import in_url, is_loopback
from vllm_pd_plugin.ray_serve.registry import RegistryClient
from vllm_pd_plugin.ray_serve.roster import BEAT_S, Beat

logger = logging.getLogger("ray.serve")

_PROBE_TIMEOUT_S = 5.0
_CORE_TIMEOUT_S = 25.0
_PROGRESS_S = 15.0
_STOP_S = 20.0
_NOTICE_S = 1.0
"""Every frontend has seen by then that an engine takes nothing new."""
_NOTICES = 3
"""How often that is said to a registry that does not answer."""


class EngineReplica:
    """Made by Ray Serve; usable when the constructor returns.

    deployment: as ``Deployment`` writes it down. role: of its pool.

    Raises:
        EngineStartError: the server ended before it could serve; the message has the end of its
            log.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, deployment: Mapping[str, Any], role: str
    ) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._beats: asyncio.Task[None] | None = None
        self._deployment = parse_deployment(deployment, "the deployment")
        self._pool = self._deployment.pools[Role(role)]
        self._role = Role(role)
        self._id = secrets.token_hex(8)
        app_name = serve.get_replica_context().app_name
        self._registry = RegistryClient(app_name)
        self._drain_until: float | None = None
        host = reachable_host()
        self._url = f"http://{in_url(host)}:{free_port(host)}"
        folder = private_folder(Path(tempfile.gettempdir()) / f"vllm-pd-{os.geteuid()}")
        self._log = folder / f"{app_name}-{role}-{self._id}.log"
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(_PROBE_TIMEOUT_S))
        self._process = await spawn(self._plan(host))
        logger.info("starting an engine of role %s at %s, log in %s", role, self._url, self._log)
        await self._wait_until_ready()
        self._beats = asyncio.create_task(self._beat(), name="beats")

    def _plan(self, host: str) -> LocalProcess:
        port = int(self._url.rsplit(":", 1)[1])
        words = self._deployment.engine_words(self._role, host=host)
        is_private = not is_loopback(host) or has_api_key(
            {**os.environ, **self._deployment.frontend.env}
        )
        command = engine_command(self._deployment.model, words, host, port, self._role, is_private)
        environ = {
            **os.environ,
            **({} if ray.get_gpu_ids() else _cpu_environ(self._pool.num_cpus)),
            **self._deployment.engine_environ(self._role),
        }
        return LocalProcess(self._url, command, environ, self._log)

    async def _wait_until_ready(self) -> None:
        assert self._process is not None
        began_at = said_at = time.monotonic()
        while not await self._answers("/health"):
            now = time.monotonic()
            if self._process.returncode is not None:
                text = f"the engine ended with status {self._process.returncode}" + tail(self._log)
                raise EngineStartError(text)
            if now - began_at > self._pool.start_timeout_s:
                await self._stop()
                text = f"the engine was not ready after {self._pool.start_timeout_s:g} s"
                raise EngineStartError(text + tail(self._log))
            if now - said_at > _PROGRESS_S:
                said_at = now
                logger.info("waiting for the engine: %.0f s", now - began_at)
            await asyncio.sleep(0.25)

    async def _answers(self, path: str, timeout_s: float = _PROBE_TIMEOUT_S) -> bool:
        timeout = aiohttp.ClientTimeout(timeout_s)
        try:
            async with self._session.get(self._url + path, timeout=timeout) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _beat(self) -> None:
        """Say that the engine is there, as long as it is."""
        assert self._process is not None
        while self._process.returncode is None:
            try:
                await self._registry.beat(self._as_beat())
            except (RayError, TimeoutError) as error:
                logger.warning("the registry does not answer: %s", type(error).__name__)
            except Exception:
                logger.exception("unexpected error with the registry")
            await asyncio.sleep(BEAT_S)

    def _as_beat(self) -> Beat:
        return Beat(
            self._url,
            self._id,
            self._role,
            self._pool.role_change,
            self._drain_until,
            self._deployment.generation,
        )

    async def check_health(self) -> None:
        """Called by Ray Serve. Raises RuntimeError when another replica should take its place."""
        process = self._process
        if process is None or process.returncode is not None:
            status = None if process is None else process.returncode
            raise RuntimeError(f"the engine ended with status {status}" + tail(self._log))
        # Answered by the engine core, between two steps.
        if not await self._answers(DESCRIPTION_PATH, _CORE_TIMEOUT_S):
            raise RuntimeError(f"the engine core at {self._url} does not answer")

    async def __del__(self) -> None:
        """Let what is under way on the engine end, or go on elsewhere; then end it.

        Called by Ray Serve, also when the constructor has failed.
        """
        try:
            if self._beats is not None:
                await self._drain(self._beats)
        finally:
            if self._process is not None:
                await self._stop()
            if (session := getattr(self, "_session", None)) is not None:
                await session.close()

    async def _drain(self, beats: asyncio.Task[None]) -> None:
        assert self._process is not None
        drain_s = self._pool.drain_timeout_s
        self._drain_until = time.time() + drain_s
        deadline = time.monotonic() + drain_s + 2 * _NOTICE_S
        for _ in range(_NOTICES):
            with suppress(RayError, TimeoutError):
                await self._registry.beat(self._as_beat())
                break
        await asyncio.sleep(_NOTICE_S)
        while time.monotonic() < deadline and self._process.returncode is None:
            if not await self._is_busy():
                break
            await asyncio.sleep(0.25)
        beats.cancel()
        await asyncio.wait([beats])
        with suppress(RayError, TimeoutError):  # it will notice
            await self._registry.leave(self._url, self._id)
        await asyncio.sleep(_NOTICE_S)

    async def _is_busy(self) -> bool:
        """Whether the engine works on a request, or holds KV that another engine wants."""
        try:
            async with self._session.get(self._url + "/metrics") as answer:
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError):
            return True  # as far as is known
        return any(
            float(line.rsplit(" ", 1)[1]) > 0
            for line in text.splitlines()
            if line.startswith(_BUSY_SERIES)
        )

    async def _stop(self) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            signal_family(self._process, signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_S)
            except TimeoutError:
                logger.warning("the engine did not end in %.0f s: killed", _STOP_S)
        signal_family(self._process, signal.SIGKILL)
        await self._process.wait()


_BUSY_SERIES = ("vllm:num_requests_running{", "vllm:num_requests_waiting{", "pd_handoffs_open{")


def reachable_host() -> str:
    """Return the address that an engine binds: the node's with a cluster key, else loopback.

    Raises:
        ConfigError: there are other machines, and no key.
    """
    if read_secret(os.environ, CLUSTER_KEY_VARIABLE):
        return ray.util.get_node_ip_address()
    addresses = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(addresses) > 1:
        raise ConfigError(
            f"the cluster has several machines, and {CLUSTER_KEY_VARIABLE} is not set; put it into "
            "the environment of `ray start` on every node"
        )
    return "127.0.0.1"


def _cpu_environ(num_cpus: float) -> dict[str, str]:
    """Return what vLLM's CPU backend needs where Ray has chosen the node: it would bind every
    engine of a node to the same cores, and take almost all memory for each."""
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, int(num_cpus))),
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", str(kv_gib(1))),
    }
