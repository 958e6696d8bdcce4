"""The frontend of ``vllm-pd serve`` as a replica of Ray Serve has it: the same application over the
same dispatch, with engines that the registry names.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import aiohttp
from ray.exceptions import RayError
from vllm import envs
from vllm.version import __version__ as vllm_version

from vllm_pd_plugin.compat import moved
from vllm_pd_plugin.edge.hooks import log_like_vllm
from vllm_pd_plugin.engine_port.link import Connection
from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend import options as frontend_options
from vllm_pd_plugin.frontend.api.admin import make_pool_router
from vllm_pd_plugin.frontend.api.app import NoEnginesError, make_app, wait_for_engines
from vllm_pd_plugin.frontend.api.client import PoolCore
from vllm_pd_plugin.frontend.deployment import Deployment
from vllm_pd_plugin.frontend.dispatch import Dispatch
from vllm_pd_plugin.frontend.options import FrontendOptions
from vllm_pd_plugin.frontend.pool.fitness import Requirement
from vllm_pd_plugin.frontend.pool.membership import Engines
from vllm_pd_plugin.frontend.processes.open_files import raise_open_files
from vllm_pd_plugin.frontend.routing.choice import Role
from vllm_pd_plugin.frontend.telemetry.metrics import Totals
from vllm_pd_plugin.frontend.telemetry.outcomes import DEFAULT_CLASS
from vllm_pd_plugin.ids import new_incarnation
from vllm_pd_plugin.net.async_channel import Context, close_context, new_context
from vllm_pd_plugin.ray_serve.demand import Demand, EngineSeen, Targets
from vllm_pd_plugin.ray_serve.registry import RegistryClient
from vllm_pd_plugin.ray_serve.roster import LOOK_S, View
from vllm_pd_plugin.ray_serve.series import RAY_KINDS, point_elsewhere

logger = logging.getLogger(__name__)

_ALL_ROLES_S = 60.0
"""How long a frontend waits for engines of every role, when it could serve without some."""
_WINDOW_S = 10.0
"""Over how long demand is measured."""


def parse_frontend(deployment: Deployment) -> tuple[argparse.Namespace, FrontendOptions]:
    """Return what ``vllm-pd serve`` would have read from its command line.

    Raises:
        ConfigError: an option is wrong; the message is that of vLLM's parser.
    """
    from vllm_pd_plugin.frontend.parsing import make_parser

    moved("cli_env_setup")()
    parser, _ = make_parser("the frontend", "", "A frontend on Ray Serve.", lambda parser: None)
    parser.error = _refuse  # it would end the process
    args = parser.parse_args([deployment.model, *deployment.frontend_words()])
    args.model = args.model_tag or args.model
    moved("validate_parsed_serve_args")(args)
    frontend_options.take_api_key(args)
    return args, frontend_options.parse_options(args, (), os.environ)


def refuse_stores(deployment: Deployment) -> None:
    """Raise ConfigError where responses would be found by chance: each replica would keep those
    that it has made, and Ray Serve sends a client's next request to any."""
    if envs.VLLM_ENABLE_RESPONSES_API_STORE and deployment.frontend.replicas > 1:
        raise ConfigError(
            "VLLM_ENABLE_RESPONSES_API_STORE needs frontend.replicas 1: a stored response is kept "
            "by the replica that has made it, and no other finds it"
        )


def _refuse(message: str) -> None:
    raise ConfigError(f"the frontend's options are wrong: {message}")


def targets_of(deployment: Deployment) -> Targets:
    """Return what pools are sized for."""
    slo = deployment.slo.get(DEFAULT_CLASS)
    return Targets(slo.ttft_ms / 1e3, slo.tpot_ms / 1e3) if slo else Targets()


@dataclasses.dataclass(slots=True)
class DemandMeter:
    """What has changed in the last seconds. clock: seconds that only grow."""

    clock: Callable[[], float]
    window_s: float = _WINDOW_S
    _past: deque[tuple[float, Totals]] = dataclasses.field(default_factory=deque)

    def measure(self, totals: Totals, dispatch: Dispatch) -> Demand:
        """Return the demand now; to be called again and again."""
        now = self.clock()
        self._past.append((now, dataclasses.replace(totals)))
        while len(self._past) > 2 and now - self._past[1][0] >= self.window_s:
            self._past.popleft()
        then, before = self._past[0]
        # At first, too, over the whole window: one request is not a storm.
        seconds = max(self.window_s, now - then)
        answers = totals.answers - before.answers
        intervals = totals.intervals - before.intervals
        return Demand(
            (totals.requests - before.requests) / seconds,
            (totals.prompt_tokens - before.prompt_tokens) / seconds,
            _ratio(totals.answer_tokens - before.answer_tokens, answers)
            or _ratio(totals.answer_tokens, totals.answers),
            (totals.itl_s - before.itl_s) / intervals if intervals else None,
            (totals.itl_s - before.itl_s) / seconds,
            dispatch.num_waiting,
            dispatch.waiting_tokens,
            {
                member.key: EngineSeen(
                    member.role,
                    member.load.waiting_tokens,
                    member.prefill_rate,
                    member.load.running + member.load.waiting,
                    member.link.description.max_num_seqs,
                    member.load.kv_usage,
                )
                for member in dispatch.pool
                if member.is_up and not member.is_draining
            },
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


class RayFrontend:
    """One frontend, from ``start`` to ``close``, all in one event loop."""

    def __init__(
        self, core: PoolCore, connection: Connection, registry: RegistryClient, context: Context
    ) -> None:
        self._core = core
        self._connection = connection
        self._registry = registry
        self._context = context
        self._known: Engines = {}
        self._meter = DemandMeter(asyncio.get_running_loop().time)
        self._follower = asyncio.create_task(self._follow(), name="registry")
        self._client: Any = None
        self.app: Any = None

    @classmethod
    async def start(cls, deployment: Deployment, app_name: str) -> RayFrontend:
        """Wait for engines, and build the application.

        Raises:
            NoEnginesError: none came up in time.
            ConfigError: an option is wrong, or needs a single frontend.
        """
        log_like_vllm()
        refuse_stores(deployment)
        args, options = parse_frontend(deployment)
        raise_open_files(0)
        core = PoolCore(options.policy, options.limits, options.slos, RAY_KINDS)
        context = new_context()
        connection = Connection(
            f"{socket.gethostname()}:{os.getpid()}",
            new_incarnation(),
            options.keys,
            context,
            aiohttp.ClientSession(),
        )
        registry = RegistryClient(app_name, targets_of(deployment))
        frontend = cls(core, connection, registry, context)
        try:
            frontend.app = await frontend._make_app(deployment, args, options)
        except BaseException:
            await frontend.close()
            raise
        return frontend

    async def _make_app(
        self, deployment: Deployment, args: argparse.Namespace, options: FrontendOptions
    ) -> Any:
        pools = deployment.pools.items()
        expected = {role for role, pool in pools if pool.is_wanted and not pool.may_be_empty}
        if deployment.both.role_change:
            expected.discard(Role.BOTH)
        dispatch = self._core.dispatch
        dispatch.prefill_may_be_empty = deployment.prefill.may_be_empty
        if args.max_model_len:
            # While an update replaces engines, those with less are not ours.
            dispatch.require(Requirement(args.max_model_len, None, True, vllm_version))
        with suppress(NoEnginesError):
            await wait_for_engines(dispatch, _ALL_ROLES_S, expected)
        await wait_for_engines(dispatch, deployment.frontend.wait_for_engines_s)
        is_alone = deployment.frontend.replicas == 1
        app = await make_app(args, self._core, several_kinds=True, is_alone=is_alone)
        self._client = app.state.engine_client  # the state goes when the application shuts down
        app.state.server = SimpleNamespace(should_exit=False)  # vLLM's, told to end by its handlers
        point_elsewhere(app)
        app.include_router(make_pool_router(dispatch, options.admin_key.text))
        return app

    async def check_health(self) -> None:
        """Raise RuntimeError when this process cannot go on. Engines that are missing are no
        reason: what waits for them would be lost."""
        if self._follower.done():
            raise RuntimeError("the frontend does not follow the registry any more")
        if self._client is not None and self._client.errored:
            raise RuntimeError("the frontend gives no answers any more; see its log")

    async def close(self) -> None:
        """End what is under way, and the connections."""
        self._follower.cancel()
        if self._client is not None:
            await asyncio.to_thread(self._client.shutdown, 0.0)
        await self._core.dispatch.close()
        await self._connection.session.close()
        close_context(self._context)

    async def _follow(self) -> None:
        """Use the engines that are there, and say what they are needed for."""
        core = self._core
        while True:
            demand = self._meter.measure(core.dispatch.metrics.totals, core.dispatch)
            try:
                view = await self._registry.look(self._connection.incarnation, demand)
                self._use(view)
            except (RayError, TimeoutError) as error:
                # The engines that are known go on; links notice by themselves when one has gone.
                logger.warning("the registry does not answer: %s", type(error).__name__)
            except Exception:
                logger.exception("unexpected error with the registry")
            await asyncio.sleep(LOOK_S)

    def _use(self, view: View) -> None:
        engines = view.engines if view.is_settled else {**self._known, **view.engines}
        if engines != self._known:
            self._known = engines
            self._core.dispatch.use(engines, self._connection)
