"""The two engines of a chaos run: where and how they start, and how they are disturbed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx

from benchmarks import network
from benchmarks.chaos_account import Ending, Life, Side, failure_counts, num_blocks, used_blocks
from tests import models
from tests.engine import START_TIMEOUT_S, Engine, connector_arguments, say

ARMS = ("pdplugin", "nixl")
COMMON = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096")

LEASE_S = 10
"""The same for both arms: so long a producer holds KV for a consumer that is silent."""

PEER_TIMEOUT_S, FETCH_TIMEOUT_S = 5.0, 30.0
MAX_FAILED_STARTS = 3

_CORES = {Side.PRODUCER: "0", Side.CONSUMER: "1"}
_ROLES = {Side.PRODUCER: "prefill", Side.CONSUMER: "decode"}


class ChaosError(RuntimeError):
    """The run cannot go on; the message says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Address:
    """What stays the same when an engine is killed and started again.

    command_prefix: runs a command where the engine lives.
    kv_port: of the control channel, or of NixlConnector's side channel.
    """

    command_prefix: tuple[str, ...]
    environ: Mapping[str, str]
    http_host: str
    http_port: int
    kv_host: str
    kv_port: int


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """Where both engines live. ``link`` is None if they share a network: nothing can be cut."""

    addresses: Mapping[Side, Address]
    link: Link | None


class Link:
    """The link between two hosts. While it is cut, packets vanish and the devices stay up."""

    def __init__(self, joined: network.Network) -> None:
        self._joined = joined

    def cut(self) -> None:
        # A bucket smaller than any packet: tbf drops what can never fit.
        bucket = ("tbf", "rate", "8bit", "burst", "10b", "limit", "10b")
        for host in self._joined.hosts:
            root = ("qdisc", "replace", "dev", network.KV_DEVICE, "root")
            subprocess.run(["tc", "-n", host.namespace, *root, *bucket], check=True)

    def mend(self) -> None:
        self._joined.limit(0)


@contextmanager
def site() -> Iterator[Site]:
    """Give each engine a network namespace, or both this machine's loopback if that cannot be."""
    with ExitStack() as stack:
        try:
            joined = stack.enter_context(network.two_hosts())
        except network.NetworkError as error:
            say(f"the link will not be dropped: {error}")
            where = Site({side: _on_loopback() for side in Side}, None)
        else:
            hosts = zip(Side, joined.hosts, strict=True)
            where = Site({side: _on_host(host) for side, host in hosts}, Link(joined))
        yield where


def _on_loopback() -> Address:
    return Address((), {}, "127.0.0.1", lasting_port(), "127.0.0.1", lasting_port())


def _on_host(host: network.Host) -> Address:
    environ = {
        # Both hosts share /dev/shm, and UCX would take that, or the interface for HTTP.
        "UCX_TLS": "tcp,self",
        "UCX_NET_DEVICES": network.KV_DEVICE,
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return Address(tuple(host.command()), environ, host.http_ip, 8000, host.kv_ip, 5600)


def lasting_port() -> int:
    """Return a port that nobody is given by chance while its engine is down."""
    for port in random.sample(range(20_000, 30_000), 100):  # below Linux's ephemeral ports
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ChaosError("no free port between 20000 and 30000 on 127.0.0.1")


def launcher(
    arm: str, side: Side, address: Address, policy: str, folder: Path, cluster_key: str
) -> Callable[[int], Engine]:
    """Return what starts the arm's engine of that side; it takes the number of its life.

    policy: vLLM's ``kv_load_failure_policy``.
    folder: where the logs go.
    """
    environ = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": _CORES[side],
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **address.environ,
    }
    if arm == "pdplugin":
        environ["VLLM_PD_CLUSTER_KEY"] = cluster_key
        connector = connector_arguments(
            _ROLES[side],
            kv_load_failure_policy=policy,
            host=address.kv_host,
            port=address.kv_port,
            lease_s=LEASE_S,
            peer_timeout_s=PEER_TIMEOUT_S,
            fetch_timeout_s=FETCH_TIMEOUT_S,
        )
    else:
        environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = address.kv_host
        environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(address.kv_port)
        config = {
            "kv_connector": "NixlConnector",
            "kv_role": "kv_both",
            "kv_buffer_device": "cpu",
            "kv_load_failure_policy": policy,
            "kv_connector_extra_config": {"kv_lease_duration": LEASE_S},
        }
        connector = ["--kv-transfer-config", json.dumps(config)]
    model = models.tiny_llama()
    command = [
        *address.command_prefix,
        str(Path(sys.executable).with_name("vllm")), "serve", str(model),
        "--host", address.http_host, "--port", str(address.http_port),
        "--served-model-name", model.name, "--disable-uvicorn-access-log", *COMMON, *connector,
    ]  # fmt: skip
    url = f"http://{address.http_host}:{address.http_port}"

    def launch(life: int) -> Engine:
        name = f"{arm}-{side}"
        log = folder / f"{name}-{life}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environ},
                process_group=0,
            )
        return Engine(name, url, model.name, process, log)

    return launch


class Seat:
    """An engine's place: the address stays, the process behind it may change.

    ``up`` is set while an engine is there and ready. ``lives`` is its history, for the account.
    """

    def __init__(self, address: Address, launch: Callable[[int], Engine]) -> None:
        self.address = address
        self._launch = launch
        self._failed_starts = 0
        self._num_blocks = 0
        self.up = asyncio.Event()
        self.lives: list[Life] = []
        self.engine = self._begin_life()

    @property
    def life(self) -> Life:
        return self.lives[-1]

    async def tend(self) -> None:
        """See the engine come up, read its counts once a second, restart it if it dies.

        Runs until cancelled. Raises ChaosError if it dies at start again and again.
        """
        while True:
            life = self.life
            if life.ending is None:
                if self.engine.process.poll() is not None:
                    self._bury()
                elif self.up.is_set():
                    await self.read_counts()
                else:
                    await self._look_whether_up()
            await asyncio.sleep(1.0)

    async def wait_until_up(self) -> None:
        """Raises ChaosError when that takes too long."""
        try:
            await asyncio.wait_for(self.up.wait(), START_TIMEOUT_S)
        except TimeoutError:
            raise ChaosError(
                f"{self.engine.name} was not ready after {START_TIMEOUT_S:.0f} s:\n"
                f"{self.engine.log_tail()}"
            ) from None

    async def kill_and_restart(self) -> None:
        """Kill the engine as a power cut does, and start another at the same address."""
        await self._step()  # counts leave an engine with its steps
        await self.read_counts()
        if self.life.ending is not None:  # it died meanwhile, and is tended to
            return
        self._end_life(Ending.KILLED)
        await asyncio.to_thread(self.engine.kill)
        self.engine = self._begin_life()

    async def stop_for(self, seconds: float) -> None:
        """Stop the engine (SIGSTOP), and let it go on after a while, whatever happens."""
        engine, life, since = self.engine, self.life, time.monotonic()
        try:
            engine.signal_all(signal.SIGSTOP)
            await asyncio.sleep(seconds)
        finally:
            engine.signal_all(signal.SIGCONT)
            life.stops.append((since, time.monotonic()))

    async def read_counts(self) -> None:
        """Read the failures that this life has counted; keep the last if it does not answer."""
        life = self.life
        with suppress(httpx.HTTPError):
            life.failures = failure_counts(await asyncio.to_thread(self.engine.metrics))

    async def is_at_rest(self) -> bool:
        """Say whether the engine holds nothing, by gauges that a step has brought up to date."""
        if not await self._step():
            return False
        try:
            return await asyncio.to_thread(self.engine.is_at_rest)
        except httpx.HTTPError:
            return False

    async def used_blocks(self) -> int | None:
        """Return the blocks in use by the engine's gauges; None if it does not tell."""
        try:
            now = await asyncio.to_thread(self.engine.metrics)
            return used_blocks(now["vllm:kv_cache_usage_perc"], self._num_blocks)
        except (httpx.HTTPError, LookupError):
            return None

    def close(self) -> None:
        """End the engine and whatever it started."""
        self.engine.signal_all(signal.SIGCONT)
        self.engine.stop()
        self._kill_group()

    async def _step(self) -> bool:
        """Make the engine step, by a tiny request of its own; say whether it answered."""
        try:
            await asyncio.to_thread(self.engine.complete, [5, 6, 7, 8], 2, timeout_s=10.0)
        except httpx.HTTPError:
            return False
        await asyncio.sleep(0.2)
        return True

    async def _look_whether_up(self) -> None:
        life = self.life
        with suppress(httpx.HTTPError):
            metrics = await asyncio.to_thread(self._metrics_if_healthy)
            if metrics is not None:
                self._num_blocks = num_blocks(metrics)
                self._failed_starts = 0
                life.ready_s = time.monotonic()
                self.up.set()

    def _metrics_if_healthy(self) -> dict[str, float] | None:
        if httpx.get(f"{self.engine.url}/health", timeout=5).status_code != 200:
            return None
        return self.engine.metrics()

    def _begin_life(self) -> Engine:
        self.lives.append(Life(started_s=time.monotonic()))
        return self._launch(len(self.lives) - 1)

    def _end_life(self, ending: Ending) -> None:
        self.up.clear()
        self.life.ending, self.life.ended_s = ending, time.monotonic()

    def _bury(self) -> None:
        """The engine has ended by itself: say so, clear up, start another."""
        status = self.engine.process.returncode
        say(f"{self.engine.name} died by itself, status {status}:\n{self.engine.log_tail()}")
        self._failed_starts += not self.up.is_set()
        self._end_life(Ending.DIED)
        self._kill_group()
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise ChaosError(f"{self.engine.name} died at start {MAX_FAILED_STARTS} times")
        self.engine = self._begin_life()

    def _kill_group(self) -> None:
        """Kill what the engine's server left: it was the first of a session, and so of a group."""
        with suppress(ProcessLookupError):
            os.killpg(self.engine.process.pid, signal.SIGKILL)
