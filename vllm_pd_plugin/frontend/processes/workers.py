"""Several frontend processes on one port (``--workers N``).

This process serves nothing itself: it keeps the workers up, and the local engines if there are any.
The workers share the port, which the kernel divides among them, and a file that says which engines
to use.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from vllm.entrypoints.launchers.launcher import setup_server

from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.options import FrontendOptions
from vllm_pd_plugin.frontend.pool.membership import Membership
from vllm_pd_plugin.frontend.processes.local import LocalProcess, Supervisor

logger = logging.getLogger(__name__)

ENGINES_FILE_VARIABLE = "VLLM_PD_ENGINES_FILE"
"""Set in workers: the file that says which engines to use."""
_DRAIN_MARGIN_S = 15.0


async def run_workers(
    args: argparse.Namespace,
    options: FrontendOptions,
    local: Sequence[LocalProcess],
    command: Sequence[str],
    environ: Mapping[str, str],
) -> None:
    """Run until SIGINT or SIGTERM.

    command, environ: start one worker.

    Raises:
        EngineStartError: an engine or a worker ended before all were up.
    """
    if args.uds:
        raise ConfigError("--uds is of no use with --workers: they share a port")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    _, sock = setup_server(args, reuse_port=True)  # the port is ours from here on
    with tempfile.TemporaryDirectory(prefix="vllm-pd-workers-") as folder, sock:
        shared = Path(folder)
        path = shared / "engines.json"
        Membership.open(options.engines, path)
        environ = {
            **environ,
            ENGINES_FILE_VARIABLE: str(path),
            "PROMETHEUS_MULTIPROC_DIR": str(shared),
        }
        workers = [
            LocalProcess(f"worker-{i}", tuple(command), environ, None)
            for i in range(options.workers)
        ]
        engines = Supervisor(local)
        frontends = Supervisor(workers, args.shutdown_timeout + _DRAIN_MARGIN_S)
        try:
            engines.start()
            frontends.start()
            ready = asyncio.create_task(_wait_until_healthy(args))
            stopped = asyncio.create_task(stop.wait())
            failures = (engines.failure, frontends.failure)
            waits: set[asyncio.Future[Any]] = {*failures, ready, stopped}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for failure in failures:
                if failure.done():
                    failure.result()
            engines.all_are_up()
            frontends.all_are_up()
            await stop.wait()
        finally:
            await frontends.stop()
            await engines.stop()


async def _wait_until_healthy(args: argparse.Namespace) -> None:
    scheme = "https" if args.ssl_certfile else "http"
    url = f"{scheme}://{args.host or '127.0.0.1'}:{args.port}/health"
    timeout = aiohttp.ClientTimeout(total=5)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while True:
            try:
                async with session.get(url, ssl=False) as answer:
                    if answer.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(0.25)
