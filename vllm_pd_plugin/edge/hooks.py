"""The places where vLLM offers no hook: its command line, the check of a finished config, ending a
request that nobody wants, the arrival of a request, the way of frontends into the engine core, and
the page that tells them where it is.

Each wraps a method of vLLM's once. ``--kv-connector`` and ``--kv-role`` are merged into
``--kv-transfer-config`` while the arguments are parsed, because API server processes build their
engine arguments from the parsed namespace before they load any plugin.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_pd_plugin import CONNECTOR
from vllm_pd_plugin.compat import require_supported_vllm
from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.engine_port.messages import DESCRIPTION_PATH
from vllm_pd_plugin.errors import ConfigError, PdError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ROLES = {"prefill": "kv_producer", "decode": "kv_consumer", "both": "kv_both"}

_MARK = "_vllm_pd_plugin"
_WAKERS: list[Callable[[], None]] = []


def install() -> None:
    """Wrap ``EngineArgs``; does nothing when it is wrapped already."""
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, _MARK, False):
        return
    add_cli_args = EngineArgs.add_cli_args
    create_engine_config = EngineArgs.create_engine_config

    @functools.wraps(add_cli_args)
    def with_flags(parser: Any) -> Any:
        parser = add_cli_args(parser)
        add_flags(parser)
        return parser

    @functools.wraps(create_engine_config)
    def with_check(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        config: VllmConfig = create_engine_config(self, *args, **kwargs)
        if uses_pdplugin(config):
            refuse_bad_config(config)
            add_description_route()
        return config

    EngineArgs.add_cli_args = staticmethod(with_flags)
    EngineArgs.create_engine_config = with_check
    setattr(EngineArgs, _MARK, True)


def end_abandoned_requests() -> None:
    """Let the scheduler end, with an error, what its connector names in ``take_abandoned``.

    A connector cannot end a running request by itself. vLLM's scheduler has a set of requests to
    be ended that way, meant for grammars that do not compile.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    if getattr(Scheduler, _MARK, False):
        return
    update_from_output = Scheduler.update_from_output

    @functools.wraps(update_from_output)
    def with_abandoned(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        if take_abandoned := getattr(self.connector, "take_abandoned", None):
            self.grammar_compile_error_reqs.update(take_abandoned())
        return update_from_output(self, *args, **kwargs)

    Scheduler.update_from_output = with_abandoned
    setattr(Scheduler, _MARK, True)


def call_on_arrival(wake: Callable[[], None]) -> None:
    """Call ``wake`` whenever a request has arrived at an engine of this process, from the thread
    that receives it: the engine's own thread may be resting in a step that computes nothing."""
    from vllm.v1.engine.core import EngineCore

    _WAKERS.append(wake)
    if getattr(EngineCore, _MARK, False):
        return
    preprocess = EngineCore.preprocess_add_request

    @functools.wraps(preprocess)
    def and_wake(self: EngineCore, *args: Any, **kwargs: Any) -> Any:
        result = preprocess(self, *args, **kwargs)
        for waker in _WAKERS:
            waker()
        return result

    EngineCore.preprocess_add_request = and_wake
    setattr(EngineCore, _MARK, True)


def log_like_vllm() -> None:
    """Send this package's log records where vLLM's own go, at vLLM's level."""
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("vllm_pd_plugin")
    ours.handlers = theirs.handlers
    ours.setLevel(theirs.level)
    ours.propagate = theirs.propagate


def admit_frontends() -> None:
    """Let a connector that can (``admit_frontends``) be a client of its engine core.

    Its output thread starts when the core is complete, and before any request can have come.
    """
    from vllm.v1.engine.core import EngineCoreProc

    if _MARK in vars(EngineCoreProc):
        return
    process_output_sockets = EngineCoreProc.process_output_sockets

    @functools.wraps(process_output_sockets)
    def and_frontends(self: EngineCoreProc, *args: Any, **kwargs: Any) -> None:
        if admit := getattr(self.scheduler.get_kv_connector(), "admit_frontends", None):
            admit(self)
        process_output_sockets(self, *args, **kwargs)

    EngineCoreProc.process_output_sockets = and_frontends
    EngineCoreProc.pd_describe_engine = _describe_engine
    setattr(EngineCoreProc, _MARK, True)


def _describe_engine(core: Any) -> dict[str, Any]:
    """A utility method of the engine core, that API servers may call."""
    description: dict[str, Any] = core.scheduler.get_kv_connector().describe_engine()
    return description


def add_description_route() -> None:
    """Let an API server of this process say, at ``DESCRIPTION_PATH``, where frontends attach."""
    launcher: Any = sys.modules.get("vllm.entrypoints.launchers.app")
    if launcher is None or getattr(launcher, _MARK, False):
        return  # no API server: ``LLM()``, or a worker process
    register_api_routers = launcher.register_api_routers

    @functools.wraps(register_api_routers)
    def with_description(args: Any, app: Any, *more: Any, **kwargs: Any) -> None:
        register_api_routers(args, app, *more, **kwargs)

        async def describe() -> dict[str, Any]:
            core = app.state.engine_client.engine_core
            description: dict[str, Any] = await core.call_utility_async("pd_describe_engine")
            return description

        app.add_api_route(DESCRIPTION_PATH, describe, methods=["GET"])

    launcher.register_api_routers = with_description
    setattr(launcher, _MARK, True)


def uses_pdplugin(vllm_config: VllmConfig) -> bool:
    transfer = vllm_config.kv_transfer_config
    return transfer is not None and transfer.kv_connector == CONNECTOR


def refuse_bad_config(vllm_config: VllmConfig) -> None:
    """Refuse what cannot work with pdplugin, before anything is loaded.

    Raises:
        PdError: one line that names the option and what is allowed.
    """
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    from vllm_pd_plugin.edge import geometry

    require_supported_vllm()
    config = PdConfig.parse(transfer.kv_connector_extra_config, os.environ)
    geometry.refuse_unsupported(vllm_config)
    geometry.refuse_shared_port(vllm_config, config.port)


def add_flags(parser: Any) -> None:
    """Add ``--kv-connector`` and ``--kv-role`` to a parser, and merge them when it parses."""
    if "--kv-connector" in parser._option_string_actions:
        return
    group = parser.add_argument_group(
        title="vllm-pd-plugin",
        description="Disaggregated prefill and decode. Example: "
        "vllm serve MODEL --kv-connector pdplugin --kv-role prefill",
    )
    group.add_argument(
        "--kv-connector",
        choices=[CONNECTOR],
        help="Hand KV from engine to engine with this connector. Its options go into "
        "--kv-transfer-config.kv_connector_extra_config.NAME VALUE; other connectors are chosen "
        "with --kv-transfer-config.",
    )
    group.add_argument(
        "--kv-role",
        choices=list(ROLES),
        help="What this engine does: prefill (produces KV), decode (consumes KV), or both. "
        "Default: both.",
    )
    parse_known_args = parser.parse_known_args

    @functools.wraps(parse_known_args)
    def parse_and_merge(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        namespace, rest = parse_known_args(*args, **kwargs)
        try:
            merge_flags(namespace)
        except PdError as error:
            parser.error(str(error))
        return namespace, rest

    parser.parse_known_args = parse_and_merge


def merge_flags(namespace: argparse.Namespace) -> None:
    """Move the flags into ``namespace.kv_transfer_config``; idempotent.

    Raises:
        PdError: the flags contradict each other or the JSON, or an option is refused.
    """
    connector = getattr(namespace, "kv_connector", None)
    role = getattr(namespace, "kv_role", None)
    config = _as_dict(getattr(namespace, "kv_transfer_config", None))
    if (connector or config.get("kv_connector")) != CONNECTOR:
        if role is not None:
            raise ConfigError(f"--kv-role {role} needs --kv-connector {CONNECTOR}")
        return
    wanted = {"kv_connector": connector, "kv_role": ROLES[role] if role else None}
    for key, value in wanted.items():
        if value is not None and config.get(key, value) != value:
            raise ConfigError(
                f"--{key.replace('_', '-')} says {value!r}, --kv-transfer-config says "
                f"{config[key]!r}; give {key} in one place only"
            )
    config |= {key: value for key, value in wanted.items() if value is not None}
    config.setdefault("kv_role", ROLES["both"])
    require_supported_vllm()
    PdConfig.parse(config.get("kv_connector_extra_config") or {}, os.environ)
    from vllm.config import KVTransferConfig

    try:
        namespace.kv_transfer_config = KVTransferConfig(**config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--kv-transfer-config is refused: {error}") from error


def _as_dict(config: Any) -> dict[str, Any]:
    """Return only what was set, so that vLLM's own defaults and checks still apply."""
    if config is None:
        return {}
    if isinstance(config, str):
        config = json.loads(config)
    if isinstance(config, dict):
        return dict(config)
    return {
        name: value
        for name, value in vars(config).items()
        if not name.startswith("_") and value is not None
    }
