"""A Ray cluster on this machine, and Ray Serve on it by its REST API.

Its head and its other nodes have processes of their own, and can be lost and brought back.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.engine import free_port, spawn
from tests.http_client import HTTP

START_TIMEOUT_S = 120.0


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str = "") -> None:
    """Wait for something. Raises AssertionError when time is up."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not after {timeout_s:.0f} s: {what}"
        time.sleep(0.1)


class RayCluster:
    """environ: of every process on it. Its dashboard and ingress are on loopback, Ray's own ports
    are not. ``stop`` leaves nothing behind."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        # Short: paths of sockets have little room.
        self.folder = Path(tempfile.mkdtemp(prefix="pd-ray-", dir="/tmp"))
        self._gcs_port, self._dashboard_port, self.http_port = (free_port() for _ in range(3))
        self._environ = {
            "RAY_USAGE_STATS_ENABLED": "0",
            # What the head knows outlives it.
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(self.folder / "gcs"),
            **environ,
        }
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        """Of Serve's ingress."""
        return f"http://127.0.0.1:{self.http_port}"

    def start_head(self) -> None:
        """Start the head, or start it again; nothing but Serve's own actors is placed there."""
        words = [
            "--head", f"--port={self._gcs_port}", "--include-dashboard=true",
            f"--dashboard-port={self._dashboard_port}", "--dashboard-host=127.0.0.1",
            f"--ray-client-server-port={free_port()}", f"--temp-dir={self.folder}",
        ]  # fmt: skip
        (self.folder / "gcs").mkdir(exist_ok=True)
        # Left by a head that was lost; Ray would take it for one that runs.
        (self.folder / "ray_current_cluster").unlink(missing_ok=True)
        self._start("head", 0, words)
        wait_until(self._answers, START_TIMEOUT_S, f"Ray's head is up, see {self.folder}")

    def add(self, name: str, num_cpus: int, **resources: float) -> None:
        """Add a node."""
        words = [f"--address=127.0.0.1:{self._gcs_port}", f"--resources={json.dumps(resources)}"]
        self._start(name, num_cpus, words)

    def _start(self, name: str, num_cpus: int, words: list[str]) -> None:
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats",
            f"--num-cpus={num_cpus}",
            "--object-store-memory=100000000",
            f"--dashboard-agent-listen-port={free_port()}",
            f"--dashboard-agent-grpc-port={free_port()}", f"--metrics-export-port={free_port()}",
            *words,
        ]  # fmt: skip
        log = self.folder / f"{name}-{free_port()}.log"
        self._nodes[name] = spawn(command, self._environ, log)

    def lose(self, name: str) -> None:
        """A node dies at once, and everything on it."""
        for process in self.processes(name):
            with_signal(process, signal.SIGKILL)
        self._nodes.pop(name).wait(30)

    def processes(self, name: str) -> list[psutil.Process]:
        """Return every process of a node."""
        parent = psutil.Process(self._nodes[name].pid)
        return [parent, *parent.children(recursive=True)]

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Do what ``serve deploy`` does with a file that says this."""
        answer = HTTP.put(f"{self._api}/", json=dict(config), timeout=60)
        assert answer.status_code == 200, answer.text

    def application(self, name: str = "default") -> dict[str, Any]:
        """Return what Serve says of an application; empty when it does not."""
        try:
            answer = HTTP.get(f"{self._api}/", timeout=10)
            answer.raise_for_status()
        except httpx.HTTPError:
            return {}
        applications: dict[str, dict[str, Any]] = answer.json()["applications"]
        return applications.get(name, {})

    def replicas(self, deployment: str) -> list[dict[str, Any]]:
        """Return the replicas that run."""
        deployments = self.application().get("deployments", {})
        every = deployments.get(deployment, {}).get("replicas", [])
        return [replica for replica in every if replica["state"] == "RUNNING"]

    def wait_until_running(self, timeout_s: float = 240.0) -> None:
        """Wait until Serve has done what it was told. Raises AssertionError if it gives up."""

        def is_running() -> bool:
            status = self.application().get("status")
            assert status != "DEPLOY_FAILED", json.dumps(self.application(), indent=1)[:4000]
            return status == "RUNNING"

        wait_until(is_running, timeout_s, f"the application runs, see {self.folder}")

    def stop(self) -> None:
        """End everything."""
        families = [
            self.processes(name)
            for name, node in self._nodes.items()
            if psutil.pid_exists(node.pid)
        ]
        for node in self._nodes.values():
            node.terminate()
        _, left = psutil.wait_procs([each for family in families for each in family], timeout=20)
        for process in left:
            with_signal(process, signal.SIGKILL)
        for node in self._nodes.values():
            node.wait(30)
        self._nodes.clear()
        if "PD_KEEP_RAY_LOGS" not in os.environ:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _api(self) -> str:
        return f"http://127.0.0.1:{self._dashboard_port}/api/serve/applications"

    def _answers(self) -> bool:
        try:
            return HTTP.get(f"{self._api}/", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False


def kill_family(pid: int) -> None:
    """Kill a process and all its children, as a crash does."""
    process = psutil.Process(pid)
    for each in (*process.children(recursive=True), process):
        with_signal(each, signal.SIGKILL)


def with_signal(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
