"""``vllm-pd serve`` and ``vllm-pd up``: vLLM's own OpenAI application over a pool of engines."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
from collections.abc import Collection, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
from fastapi import FastAPI
from vllm import envs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import serve_http
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.version import __version__ as vllm_version

from vllm_pd_plugin.edge.hooks import log_like_vllm
from vllm_pd_plugin.engine_port.link import Connection
from vllm_pd_plugin.engine_port.served_options import served_options
from vllm_pd_plugin.errors import ConfigError, PdError
from vllm_pd_plugin.frontend.api.adapters import refuse_without_lora
from vllm_pd_plugin.frontend.api.admin import make_router
from vllm_pd_plugin.frontend.api.beams import keep_beams_together
from vllm_pd_plugin.frontend.api.client import PoolCore, PoolLLM
from vllm_pd_plugin.frontend.api.configuration import (
    frontend_config,
    keep_environment,
    one_line,
)
from vllm_pd_plugin.frontend.api.guard import NeedsKey
from vllm_pd_plugin.frontend.api.headers import CheckHeaders
from vllm_pd_plugin.frontend.api.patience import impatient
from vllm_pd_plugin.frontend.api.probes import make_probe_router
from vllm_pd_plugin.frontend.api.served import SayRoute
from vllm_pd_plugin.frontend.api.stored_responses import Holder, ToHolder, taking_from_workers
from vllm_pd_plugin.frontend.api.unserved import SayUnserved
from vllm_pd_plugin.frontend.dispatch import Dispatch
from vllm_pd_plugin.frontend.options import FrontendOptions
from vllm_pd_plugin.frontend.pool.fitness import Requirement
from vllm_pd_plugin.frontend.pool.membership import Membership
from vllm_pd_plugin.frontend.processes.listening import findable, listen
from vllm_pd_plugin.frontend.processes.open_files import raise_open_files
from vllm_pd_plugin.frontend.processes.progress import showing
from vllm_pd_plugin.frontend.processes.supervisor import LocalEngine, Supervisor
from vllm_pd_plugin.frontend.processes.workers import (
    ENGINES_FILE_VARIABLE,
    WORKER_VARIABLE,
    run_workers,
    say_ready,
)
from vllm_pd_plugin.frontend.requests.context import ContextMiddleware
from vllm_pd_plugin.frontend.routing.choice import Role
from vllm_pd_plugin.frontend.telemetry.outcomes import DEFAULT_CLASS
from vllm_pd_plugin.ids import new_incarnation
from vllm_pd_plugin.net.async_channel import close_context, new_context

logger = logging.getLogger(__name__)

_PROGRESS_S, _PROGRESS_OF_LOCAL_S = 5.0, 60.0
"""How often it is said what is missing; of engines that start here their stages are shown."""
_LOOK_S = 0.25


class NoEnginesError(PdError):
    """No engines came up that could serve a request; the message says what is wrong with each."""


async def serve(
    args: argparse.Namespace,
    options: FrontendOptions,
    local: Sequence[LocalEngine],
    worker: Sequence[str],
    environ: Mapping[str, str],
) -> None:
    """Serve until SIGINT or SIGTERM, then let what is under way end.

    local: engines to run for as long. worker, environ: what starts one of several workers.

    Raises:
        NoEnginesError: none came up in time.
        EngineStartError: a local engine ended before it was up.
        ConfigError: it cannot serve where it is to.
    """
    log_like_vllm()
    if options.workers > 1 and ENGINES_FILE_VARIABLE not in os.environ:
        await run_workers(args, options, local, worker, environ)
        return
    signal.signal(signal.SIGTERM, _interrupt)  # until the server has handlers of its own
    shared = os.environ.get(ENGINES_FILE_VARIABLE)
    sock = listen(args, reuse_port=shared is not None)
    membership = Membership.open(options.engines, Path(shared) if shared else None)
    raise_open_files(len(membership.engines))
    context = new_context()
    supervisor = Supervisor(local)
    try:
        async with aiohttp.ClientSession() as session:
            connection = Connection(
                f"{socket.gethostname()}:{os.getpid()}",
                new_incarnation(),
                options.keys,
                context,
                session,
            )
            core = PoolCore(options.policy, options.limits, options.slos)
            try:
                core.dispatch.use(membership.engines, connection)
                every_s = _PROGRESS_OF_LOCAL_S if local else _PROGRESS_S
                async with showing(local):
                    supervisor.start()
                    await _until(
                        supervisor.failure,
                        wait_for_engines(core.dispatch, options.wait_s, every_s=every_s),
                    )
                supervisor.all_are_up()
                with findable(options.admin_key, sock):
                    await _serve(args, options, core, connection, membership, sock)
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


async def make_app(
    args: argparse.Namespace,
    core: PoolCore,
    several_kinds: bool = False,
    is_alone: bool = True,
    holder: Holder | None = None,
) -> FastAPI:
    """Return vLLM's OpenAI application over engines that are there.

    several_kinds: engines of the same model whose KV differs are used, too; those that hand KV to
        each other must be alike. Else all must be like the decode engines.
    is_alone: no other frontend is behind the same address.
    holder: which of several workers this is, where responses are stored.

    Raises:
        NoEnginesError: they do not serve this model.
    """
    there = [member.link.description for member in core.dispatch.pool if member.is_up]
    config = frontend_config(args, min(each.max_model_len for each in there))
    core.dispatch.require(
        Requirement(
            config.model_config.max_model_len,
            config.model_config.get_vocab_size(),
            several_kinds,
            vllm_version,
            served_options(config),
        )
    )
    if problem := core.dispatch.serves():
        problems = _problems(core.dispatch)
        raise NoEnginesError(f"the engines do not serve {args.model} ({problem}): {problems}")
    if args.lora_modules:
        try:
            refuse_without_lora(core.dispatch.pool)
        except VLLMValidationError as error:
            raise NoEnginesError(f"--lora-modules: {error}") from error
    try:
        client = PoolLLM(config, core, args.enable_log_requests)
    except (OSError, ValueError, VLLMError) as error:  # a tokenizer that is not there, for one
        raise ConfigError(f"{args.model} cannot be served: {one_line(error)}") from error
    keep_beams_together()
    core.dispatch.gate.tells_keys_apart = bool(args.api_key or envs.VLLM_API_KEY)
    tasks = await client.get_supported_tasks()
    args.middleware = [*args.middleware, f"{ContextMiddleware.__module__}.ContextMiddleware"]
    app = build_app(args, tasks, client.model_config)
    app.middleware_stack = None  # made anew, with these, at the first request
    app.add_middleware(CheckHeaders, classes={DEFAULT_CLASS, *core.dispatch.metrics.slos})
    if args.say_route:
        app.add_middleware(SayRoute)
    app.add_middleware(SayUnserved, is_alone=is_alone)
    if holder is not None:
        app.add_middleware(ToHolder, holder=holder)
    if args.api_key:
        app.add_middleware(NeedsKey, tokens=args.api_key)
    await init_app_state(client, app.state, args, tasks)
    app.include_router(make_probe_router(client))
    keep_environment()
    return app


async def _serve(
    args: argparse.Namespace,
    options: FrontendOptions,
    core: PoolCore,
    connection: Connection,
    membership: Membership,
    sock: socket.socket,
) -> None:
    holder = None
    if membership.path is not None and envs.VLLM_ENABLE_RESPONSES_API_STORE:
        holder = Holder.parse(os.environ[WORKER_VARIABLE], membership.path.parent)
    app = await make_app(args, core, is_alone=membership.path is None, holder=holder)
    follower = asyncio.create_task(_follow(membership, core.dispatch, connection))
    app.include_router(
        make_router(
            core.dispatch,
            membership,
            lambda: core.dispatch.use(membership.engines, connection),
            options.engine_hosts,
            options.admin_key.text,
        )
    )
    async with AsyncExitStack() as stack:
        if holder is not None:
            await stack.enter_async_context(taking_from_workers(app, holder))
        if membership.path is not None:
            say_ready(membership.path)
        log_config = get_uvicorn_log_config(args)
        shutdown = await serve_http(
            app,
            sock=sock,
            http=impatient(core.dispatch.metrics.client_dropped),
            enable_ssl_refresh=args.enable_ssl_refresh,
            host=args.host,
            port=args.port,
            log_level=args.uvicorn_log_level,
            access_log=not args.disable_uvicorn_access_log,
            timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            ssl_ca_certs=args.ssl_ca_certs,
            ssl_cert_reqs=args.ssl_cert_reqs,
            ssl_ciphers=args.ssl_ciphers,
            h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
            h11_max_header_count=args.h11_max_header_count,
            **({"log_config": log_config} if log_config is not None else {}),
        )
        await shutdown
    follower.cancel()


async def _follow(membership: Membership, dispatch: Dispatch, connection: Connection) -> None:
    """Use the engines that other workers were told to use, where there are others."""
    while membership.path is not None:
        await asyncio.sleep(_LOOK_S)
        try:
            if membership.look():
                dispatch.use(membership.engines, connection)
        except (OSError, PdError):
            logger.exception("the list of engines cannot be read")


async def wait_for_engines(
    dispatch: Dispatch,
    wait_s: float,
    expected: Collection[Role] = (),
    every_s: float = _PROGRESS_S,
) -> None:
    """Wait until a request can be served, and say from time to time what is missing.

    expected: roles of which one engine at least is waited for, too, if one request could be served
    without them. every_s: how often that is said.

    Raises:
        NoEnginesError: it took too long, or never will be.
    """
    loop = asyncio.get_running_loop()
    deadline, next_word = loop.time() + wait_s, loop.time() + every_s
    while not _is_complete(dispatch, expected):
        _refuse_contradiction(dispatch)
        if loop.time() > deadline:
            if dispatch.serves() is None:
                return  # without prefill engines, as configured
            raise NoEnginesError(f"no engines after {wait_s:g} s: {_problems(dispatch)}")
        if loop.time() > next_word:
            next_word = loop.time() + every_s
            logger.info("waiting for engines: %s", _problems(dispatch))
        await asyncio.sleep(0.1)


def _is_complete(dispatch: Dispatch, expected: Collection[Role]) -> bool:
    """Whether a request can be served, and handed off if any engine was named for that and can be
    used."""
    usable = [m for m in dispatch.pool if m.role.prefills and not m.mismatch]
    there = {member.role for member in dispatch.pool if member.is_up}
    handed_off = not usable or any(member.is_up for member in usable)
    return dispatch.serves() is None and handed_off and there.issuperset(expected)


def _refuse_contradiction(dispatch: Dispatch) -> None:
    """Raise NoEnginesError where one engine was named twice, and as two things."""
    for member in dispatch.pool:
        twin = dispatch.pool.get(member.link.twin) if member.link.twin else None
        if twin is not None and twin.role is not member.role:
            raise NoEnginesError(
                f"{twin.key} and {member.key} are one engine, and were named as {twin.role} and "
                f"{member.role}; name it once, or with --both"
            )


def _problems(dispatch: Dispatch) -> str:
    missing = [f"{m.key} ({m.role}): {m.problem}" for m in dispatch.pool if not m.is_up]
    if not missing:
        return "no engine of the other role is known" if len(dispatch.pool) else "none is known yet"
    return "; ".join(missing)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt("terminated")
