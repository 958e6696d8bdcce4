"""``vllm-pd doctor``: from a command line to an examination."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
from collections.abc import Sequence

import aiohttp
from vllm.version import __version__ as vllm_version

from vllm_pd_plugin.config import CLUSTER_KEY_VARIABLE, FILE_SUFFIX, PdConfig
from vllm_pd_plugin.engine_port.link import Connection
from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.doctor.examination import Examination, Fetched
from vllm_pd_plugin.frontend.doctor.fetches import Fetches
from vllm_pd_plugin.frontend.doctor.findings import Finding
from vllm_pd_plugin.frontend.doctor.witness import Witness
from vllm_pd_plugin.frontend.option_words import some_seconds
from vllm_pd_plugin.frontend.options import engine_url
from vllm_pd_plugin.frontend.pool.membership import Wanted
from vllm_pd_plugin.frontend.routing.choice import EngineKey, Policy, Role
from vllm_pd_plugin.frontend.telemetry.metrics import FrontendMetrics
from vllm_pd_plugin.frontend.underway import Limits
from vllm_pd_plugin.ids import new_incarnation
from vllm_pd_plugin.net.async_channel import close_context, new_context
from vllm_pd_plugin.net.channel import CurveKeys

_DESCRIPTION = f"""\
Make one real handoff between two engines that run, and say of each stage how long it took and
whether it is right. Run it where the frontend is to run, with the same {CLUSTER_KEY_VARIABLE}
(or {CLUSTER_KEY_VARIABLE}{FILE_SUFFIX}). Exit status 0: all is right.

examples:
  vllm-pd doctor http://127.0.0.1:8100 http://127.0.0.1:8200
  vllm-pd doctor 10.0.0.1:8000 10.0.0.2:8000 --timeout 120
  vllm-pd doctor http://[2001:db8::1]:8000 http://d1.example:8000
"""
_METRICS_TIMEOUT_S = 5.0


def doctor(arguments: Sequence[str]) -> int:
    """Run ``vllm-pd doctor``; returns the exit status. Raises ConfigError."""
    args = _parser().parse_args(list(arguments))
    if args.prefill == args.decode:
        raise ConfigError(f"{args.prefill} is named twice; name two engines, P and D")
    # All that it has to say is in its findings.
    logging.getLogger("vllm_pd_plugin").addHandler(logging.NullHandler())
    return asyncio.run(_examine(args.prefill, args.decode, args.timeout))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-pd doctor",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prefill", metavar="P", type=engine_url, help="the engine that prefills")
    parser.add_argument("decode", metavar="D", type=engine_url, help="the engine that decodes")
    parser.add_argument(
        "--timeout",
        type=some_seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long all of it may take (default: %(default)s)",
    )
    return parser


async def _examine(prefill: EngineKey, decode: EngineKey, timeout_s: float) -> int:
    cluster_key = PdConfig.parse({}, os.environ).cluster_key
    context = new_context()
    limits = Limits(timeout_s, timeout_s, timeout_s, timeout_s)
    try:
        async with aiohttp.ClientSession() as session:
            witness = Witness(Policy(local_below=0), limits, FrontendMetrics({}))
            connection = Connection(
                f"doctor on {socket.gethostname()}:{os.getpid()}",
                new_incarnation(),
                CurveKeys.derive(cluster_key) if cluster_key else None,
                context,
                session,
            )
            engines = {prefill: Wanted(Role.PREFILL), decode: Wanted(Role.DECODE)}
            deadline = asyncio.get_running_loop().time() + timeout_s
            try:
                witness.use(engines, connection)
                examination = Examination(
                    witness, prefill, decode, _asking(session), deadline, vllm_version
                )
                return 0 if await examination.run(_print) else 1
            finally:
                await witness.close()
    finally:
        close_context(context)


def _asking(session: aiohttp.ClientSession) -> Fetched:
    async def fetched(url: EngineKey) -> Fetches | None:
        timeout = aiohttp.ClientTimeout(total=_METRICS_TIMEOUT_S)
        try:
            async with session.get(f"{url}/metrics", timeout=timeout) as answer:
                return Fetches.read(await answer.text()) if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None

    return fetched


def _print(finding: Finding) -> None:
    print(finding)
    sys.stdout.flush()
