"""Gauges of workers that have ended, however that was."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import warnings
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.unit.frontend.test_options import parse
    from vllm_pd_plugin.frontend.processes import workers

WORKER = """
import os, sys, time, warnings
warnings.simplefilter("ignore")
from vllm_pd_plugin.frontend.requests.endings import Ending
from vllm_pd_plugin.frontend.routing.choice import Role
from vllm_pd_plugin.frontend.telemetry.metrics import FrontendMetrics
metrics = FrontendMetrics({})
metrics.set_requests(8, {Ending.NO_ENGINE: 3}, 100)
metrics.set_engines({Role.DECODE: 2})
timeline = metrics.begin(0.0, None)
metrics.finished(timeline)
metrics.ended(timeline, None)
with open(sys.argv[1], "a") as marks:
    print(os.getpid(), os.environ["PROMETHEUS_MULTIPROC_DIR"], file=marks)
time.sleep(600)
"""


def read(folder: str) -> dict[str, float]:
    """What ``/metrics`` adds up of all workers; without what is 0."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)
    return {
        sample.name: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.value
    }


def test_a_worker_that_was_killed_does_not_stay_in_the_gauges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = tmp_path / "marks"

    def is_written(num_workers: int) -> bool:
        return marks.exists() and len(marks.read_text().splitlines()) >= num_workers

    async def all_are_ready(shared: Path, num_workers: int) -> None:
        while not is_written(2):
            await asyncio.sleep(0.05)

    monkeypatch.setattr(workers, "listen", lambda args, reuse_port: socket.socket())
    monkeypatch.setattr(workers, "_wait_until_ready", all_are_ready)
    args = argparse.Namespace(uds=None, shutdown_timeout=5, api_key=None)
    options = parse("--workers", "2", "--decode", "http://127.0.0.1:1")
    command = (sys.executable, "-c", WORKER, str(marks))

    async def run() -> None:
        serving = asyncio.create_task(workers.run_workers(args, options, (), command, os.environ))
        async with asyncio.timeout(100):
            await all_are_ready(tmp_path, 2)
            pid, folder = marks.read_text().split()[:2]
            both = read(folder)
            assert both["pd_frontend_requests_open"] == 16
            assert both["pd_frontend_requests_waiting"] == 6
            await asyncio.sleep(0.5)  # until then, one that ends would end all
            os.kill(int(pid), signal.SIGKILL)
            while (seen := read(folder))["pd_frontend_requests_open"] == 16:
                await asyncio.sleep(0.02)
            assert seen["pd_frontend_requests_open"] == 8
            assert seen["pd_frontend_requests_waiting"] == 3
            assert seen["pd_frontend_engines"] == 2
            # What it has counted stays counted.
            assert seen["pd_frontend_requests_total"] == 2
            while not is_written(3):  # another has taken its place
                await asyncio.sleep(0.05)
            assert read(folder)["pd_frontend_requests_open"] == 16
            signal.raise_signal(signal.SIGTERM)
            await serving

    asyncio.run(run())
