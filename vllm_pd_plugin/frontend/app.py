"""``vllm-pd serve`` and ``vllm-pd up``: vLLM's own OpenAI application over a pool of engines."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
from collections.abc import Coroutine, Sequence
from typing import Any

import aiohttp
from vllm import AsyncEngineArgs, envs
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.entry import build_and_serve
from vllm.entrypoints.launchers.launcher import setup_server

from vllm_pd_plugin.async_channel import close_context, new_context
from vllm_pd_plugin.errors import PdError
from vllm_pd_plugin.frontend.client import PoolCore, PoolLLM
from vllm_pd_plugin.frontend.dispatch import Dispatch
from vllm_pd_plugin.frontend.link import Connection
from vllm_pd_plugin.frontend.local import LocalEngine, Supervisor
from vllm_pd_plugin.frontend.options import FrontendOptions
from vllm_pd_plugin.ids import new_incarnation
from vllm_pd_plugin.vllm_hooks import log_like_vllm

logger = logging.getLogger(__name__)

_PROGRESS_S = 5.0


class NoEnginesError(PdError):
    """No engines came up that could serve a request; the message says what is wrong with each."""


async def serve(
    args: argparse.Namespace, options: FrontendOptions, local: Sequence[LocalEngine] = ()
) -> None:
    """Serve until SIGINT or SIGTERM, then let what is under way end.

    local: engines to run for as long.

    Raises:
        NoEnginesError: none came up in time.
        EngineStartError: a local engine ended before it was up.
    """
    log_like_vllm()
    signal.signal(signal.SIGTERM, _interrupt)  # until the server has handlers of its own
    listen_address, sock = setup_server(args, reuse_port=False)
    context = new_context()
    supervisor = Supervisor(local)
    try:
        supervisor.start()
        async with aiohttp.ClientSession() as session:
            connection = Connection(
                f"{socket.gethostname()}:{os.getpid()}",
                new_incarnation(),
                options.keys,
                context,
                session,
            )
            core = PoolCore(options.policy, options.limits)
            try:
                for url, role in options.engines:
                    core.dispatch.add_engine(url, role, connection)
                await _until(supervisor.failure, wait_for_engines(core.dispatch, options.wait_s))
                supervisor.all_are_up()
                await _serve(args, core, listen_address, sock)
            finally:
                await core.dispatch.close()
    finally:
        await supervisor.stop()
        sock.close()
        close_context(context)


async def _until(failure: asyncio.Future[None], work: Coroutine[Any, Any, None]) -> None:
    """Await work, unless something fails meanwhile."""
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({failure, task}, return_when=asyncio.FIRST_COMPLETED)
        if failure.done():
            failure.result()
        await task
    finally:
        task.cancel()


async def _serve(
    args: argparse.Namespace, core: PoolCore, listen_address: str, sock: socket.socket
) -> None:
    lengths = [m.link.description.max_model_len for m in core.dispatch.pool if m.is_up]
    config = frontend_config(args, min(lengths))
    client = PoolLLM(config, core, args.enable_log_requests)
    shutdown = await build_and_serve(client, listen_address, sock, args)
    await shutdown


async def wait_for_engines(dispatch: Dispatch, wait_s: float) -> None:
    """Wait until a request can be served, and say from time to time what is missing.

    Raises:
        NoEnginesError: it took too long.
    """
    loop = asyncio.get_running_loop()
    deadline, next_word = loop.time() + wait_s, loop.time() + _PROGRESS_S
    while not _is_complete(dispatch):
        if loop.time() > deadline:
            if dispatch.serves() is None:
                return  # without prefill engines, as configured
            raise NoEnginesError(f"no engines after {wait_s:g} s: {_problems(dispatch)}")
        if loop.time() > next_word:
            next_word = loop.time() + _PROGRESS_S
            logger.info("waiting for engines: %s", _problems(dispatch))
        await asyncio.sleep(0.1)


def _is_complete(dispatch: Dispatch) -> bool:
    """Whether a request can be served, and handed off if any engine was named for that."""
    prefills = [member.is_up for member in dispatch.pool if member.role.prefills]
    return dispatch.serves() is None and (not prefills or any(prefills))


def _problems(dispatch: Dispatch) -> str:
    missing = [f"{m.key} ({m.role}): {m.link.problem}" for m in dispatch.pool if not m.is_up]
    return "; ".join(missing) or "no engine of the other role was named"


def frontend_config(args: argparse.Namespace, max_model_len: int) -> VllmConfig:
    """Return vLLM's configuration for a process that has no engine.

    max_model_len: what every engine takes.
    """
    engine_args = AsyncEngineArgs.from_cli_args(args)
    model_config = engine_args.create_model_config()
    model_config.quantization = None  # no weights are loaded here
    model_config.max_model_len = min(model_config.max_model_len, max_model_len)
    envs.VLLM_CPU_KVCACHE_SPACE = 0  # nor is there a KV cache
    config = VllmConfig(
        model_config=model_config,
        logging_config=engine_args.create_logging_config(),
        structured_outputs_config=engine_args.create_structured_outputs_config(),
        observability_config=engine_args.create_observability_config(),
    )
    config.scheduler_config.stream_interval = engine_args.stream_interval
    config.scheduler_config.max_num_queued_reqs = engine_args.max_num_queued_reqs
    config.scheduler_config.max_num_queued_tokens = engine_args.max_num_queued_tokens
    config.shutdown_timeout = engine_args.shutdown_timeout
    return config


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt("terminated")
