"""Several frontend processes on one port (``--workers N``).

This process serves nothing itself: it keeps the workers up, and the local engines if there are any.
The workers share the port, which the kernel divides among them, and a file that says which engines
to use.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from vllm_pd_plugin.config import ADMIN_KEY_VARIABLE
from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.options import FrontendOptions
from vllm_pd_plugin.frontend.pool.membership import Membership
from vllm_pd_plugin.frontend.processes.listening import findable, listen
from vllm_pd_plugin.frontend.processes.progress import showing
from vllm_pd_plugin.frontend.processes.supervisor import LocalProcess, Supervisor

logger = logging.getLogger(__name__)

ENGINES_FILE_VARIABLE = "VLLM_PD_ENGINES_FILE"
"""Set in workers: the file that says which engines to use."""
WORKER_VARIABLE = "VLLM_PD_WORKER"
"""Set in workers: which of how many each is, as in ``0/4``."""
_DRAIN_MARGIN_S = 15.0
_READY = "ready-"
_LOOK_S = 0.25


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
    sock = listen(args, reuse_port=True)  # the port is ours from here on
    with (
        sock,
        findable(options.admin_key, sock),
        tempfile.TemporaryDirectory(prefix="vllm-pd-workers-") as folder,
    ):
        shared = Path(folder)
        engines = Supervisor(local)
        frontends = Supervisor(
            _make_workers(args, options, command, environ, shared),
            args.shutdown_timeout + _DRAIN_MARGIN_S,
            # What it had under way is over: its gauges must not go on counting it.
            lambda pid: mark_process_dead(pid, str(shared)),  # type: ignore[no-untyped-call]
        )
        try:
            async with showing(local):
                engines.start()
                frontends.start()
                ready = asyncio.create_task(_wait_until_ready(shared, options.workers))
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


def _make_workers(
    args: argparse.Namespace,
    options: FrontendOptions,
    command: Sequence[str],
    environ: Mapping[str, str],
    shared: Path,
) -> list[LocalProcess]:
    """Write what workers share into a folder, and say how each is started."""
    path = shared / "engines.json"
    Membership.open(options.engines, path)
    surroundings = {
        **environ,
        ENGINES_FILE_VARIABLE: str(path),
        "PROMETHEUS_MULTIPROC_DIR": str(shared),
    }
    if args.api_key:
        api = shared / "api.yaml"  # not where others can read it
        api.write_text(json.dumps({"api-key": args.api_key}))
        command = [*command, "--config", str(api)]
    if options.admin_key.is_made:
        surroundings[ADMIN_KEY_VARIABLE] = options.admin_key.text
    return [
        LocalProcess(
            f"worker-{number}",
            tuple(command),
            {**surroundings, WORKER_VARIABLE: f"{number}/{options.workers}"},
            None,
        )
        for number in range(options.workers)
    ]


def say_ready(engines_file: Path) -> None:
    """Tell the process that keeps this worker up that it serves. Over a file, because whatever the
    workers listen on (an address of any kind, with TLS that asks for certificates) is its clients'
    affair."""
    (engines_file.parent / f"{_READY}{os.getpid()}").touch()


async def _wait_until_ready(shared: Path, num_workers: int) -> None:
    while len(list(shared.glob(f"{_READY}*"))) < num_workers:
        await asyncio.sleep(_LOOK_S)
