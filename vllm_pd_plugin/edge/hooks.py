"""The places where vLLM offers no hook: its command line, the check of a finished config, the size
of a KV cache, ending a request that nobody wants, the arrival of a request, new weights, the way of
frontends into the engine core, and the page that tells them where it is.

Each wraps a method of vLLM's once.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.edge.compositions import own_config, own_connector, refuse_bad_config
from vllm_pd_plugin.edge.flags import add_flags
from vllm_pd_plugin.engine_port.messages import DESCRIPTION_PATH

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.core_client import AsyncMPClient

logger = logging.getLogger(__name__)

_MARK = "_vllm_pd_plugin"
_WATCHED = "_vllm_pd_plugin_weights"
_FREED = "_vllm_pd_plugin_frees"
_WAKERS: list[Callable[[], None]] = []


def install() -> None:
    """Wrap ``EngineArgs``, and ``Executor`` in an engine core; does nothing when that was done."""
    from vllm.engine.arg_utils import EngineArgs

    leave_room_for_staging()

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
        if (own := own_config(config)) is not None:
            refuse_bad_config(config, own)
            leave_room_for_staging()  # an engine core may be a fork of this process
            add_description_route()
            count_frontends_requests()
        return config

    EngineArgs.add_cli_args = staticmethod(with_flags)
    EngineArgs.create_engine_config = with_check
    setattr(EngineArgs, _MARK, True)


def leave_room_for_staging() -> None:
    """Let a GPU's KV cache leave room for our staging memory, within what vLLM may use.

    vLLM gives a KV cache all that its profile run leaves over, before there is a connector. On a
    CPU, staging memory that is not used takes no room.
    """
    executors: Any = sys.modules.get("vllm.v1.executor.abstract")
    if executors is None or getattr(executors.Executor, _MARK, False):
        return
    determine_available_memory = executors.Executor.determine_available_memory

    @functools.wraps(determine_available_memory)
    def less_staging(self: Any) -> list[int]:
        available: list[int] = determine_available_memory(self)
        options = own_config(self.vllm_config)
        if options is None or self.vllm_config.device_config.device_type == "cpu":
            return available
        staging_bytes = PdConfig.parse(options, os.environ).staging_bytes
        text = "pdplugin: %.1f MiB of each rank's KV cache memory are taken for staging"
        logger.info(text, staging_bytes / 2**20)
        return [num_bytes - staging_bytes for num_bytes in available]

    executors.Executor.determine_available_memory = less_staging
    setattr(executors.Executor, _MARK, True)


def end_abandoned_requests() -> None:
    """Let the scheduler end, with an error, what its connector names in ``take_abandoned``.

    A connector cannot end a running request by itself. vLLM's scheduler has a set of requests to
    be ended that way, meant for grammars that do not compile. Before it ends them it gives out what
    the step has sampled. Of those that must not be computed here nothing is: a step may have begun
    with them before it was known that they must not be.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    if getattr(Scheduler, _MARK, False):
        return
    update_from_output = Scheduler.update_from_output

    @functools.wraps(update_from_output)
    def with_abandoned(self: Scheduler, scheduled: Any, output: Any) -> Any:
        if (own := own_connector(self.connector)) is not None:
            unwanted, hopeless = own.take_abandoned()
            self.grammar_compile_error_reqs.update(unwanted, hopeless)
            for request_id in hopeless:
                index = output.req_id_to_index.get(request_id)
                if index is not None and output.sampled_token_ids:
                    output.sampled_token_ids[index] = []
        return update_from_output(self, scheduled, output)

    Scheduler.update_from_output = with_abandoned
    setattr(Scheduler, _MARK, True)


def free_blocks_once() -> None:
    """Let a request that ends while its KV is being received be freed when the receive has ended,
    whatever another connector beside ours says of it, and only then.

    vLLM frees the blocks at the first word from either, and ends the engine at the second.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    if getattr(Scheduler, _FREED, False):
        return
    free_request, take_ends = Scheduler._free_request, Scheduler._update_from_kv_xfer_finished

    @functools.wraps(free_request)
    def and_note(self: Scheduler, request: Any, delay_free_blocks: bool = False) -> Any:
        if delay_free_blocks and (own := own_connector(self.connector)) is not None:
            own.receiving.add(request.request_id)
        return free_request(self, request, delay_free_blocks)

    @functools.wraps(take_ends)
    def once(self: Scheduler, output: Any) -> None:
        own = own_connector(self.connector)
        if own is None:
            take_ends(self, output)
            return
        output.finished_sending = {
            request_id
            for request_id in output.finished_sending or ()
            if request_id in self.requests and request_id not in own.receiving
        }
        take_ends(self, output)
        own.receiving.difference_update(output.finished_recving or ())

    Scheduler._free_request, Scheduler._update_from_kv_xfer_finished = and_note, once
    setattr(Scheduler, _FREED, True)


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


_BEGIN_A_CHANGE = {"start_weight_update", "update_weights"}
_END_A_CHANGE = {"finish_weight_update", "reload_weights", "reset_weights", "checkpoint_restore"}
"""Calls to the workers that change weights in place."""
_BEGIN_AFRESH = {"start_weight_update", "reload_weights", "reset_weights", "checkpoint_restore"}
"""Those of them that do not depend on what an earlier one has left."""
_CHANGE_NOTHING = {
    "checkpoint_prepare", "compute_weight_checksums", "get_model_inspection",
    "init_weight_transfer_engine", "release_late_interaction_query_cache", "save_sharded_state",
    "shutdown_weight_transfer_engine", "start_draft_weight_update", "synchronize_device",
    "update_max_model_len",
}  # fmt: skip
"""vLLM's own other calls. What anything else does to the weights is not known."""


def watch_weights() -> None:
    """Tell our connector when the weights are changed in place, memory comes back from sleep, or an
    adapter is loaded.

    vLLM's engine core passes such calls on to its workers, and tells no connector.
    """
    from vllm.v1.engine.core import EngineCore

    if getattr(EngineCore, _WATCHED, False):
        return
    collective_rpc, wake_up = EngineCore.collective_rpc, EngineCore.wake_up
    add_lora = EngineCore.add_lora

    @functools.wraps(collective_rpc)
    def and_say(self: EngineCore, method: Any, *args: Any, **kwargs: Any) -> Any:
        own = _own_of(self)
        if own is None or (isinstance(method, str) and method in _CHANGE_NOTHING):
            return collective_rpc(self, method, *args, **kwargs)
        is_known = isinstance(method, str) and method in _BEGIN_A_CHANGE | _END_A_CHANGE
        if not is_known:
            text = "pdplugin: %s may have changed the weights: this engine's KV counts as another"
            logger.warning(text, method if isinstance(method, str) else "a function of the client")
        if not is_known or method in _BEGIN_AFRESH:
            own.update_failed = False
        own.weights_change(is_over=False)
        try:
            result = collective_rpc(self, method, *args, **kwargs)
        except BaseException:
            own.update_failed = True  # half of it is there: equal to nobody's until the next
            raise
        if not own.update_failed and (not is_known or method in _END_A_CHANGE):
            own.weights_change(is_over=True)
        return result

    @functools.wraps(wake_up)
    def and_reset(self: EngineCore, *args: Any, **kwargs: Any) -> Any:
        own = _own_of(self)
        if own is not None and self.model_executor.is_sleeping:
            own.reset_cache()
        return wake_up(self, *args, **kwargs)

    @functools.wraps(add_lora)
    def and_look(self: EngineCore, lora_request: Any) -> bool:
        if (own := _own_of(self)) is not None:
            own.adapter_loaded(lora_request.lora_int_id)
        is_loaded: bool = add_lora(self, lora_request)
        return is_loaded

    EngineCore.collective_rpc, EngineCore.wake_up = and_say, and_reset
    EngineCore.add_lora = and_look
    setattr(EngineCore, _WATCHED, True)


def _own_of(core: Any) -> Any:
    """Return the connector of ours that an engine core has; None without, or before it has any."""
    scheduler = getattr(core, "scheduler", None)
    return None if scheduler is None else own_connector(scheduler.get_kv_connector())


def log_like_vllm() -> None:
    """Send this package's log records where vLLM's own go, at the level that vLLM has then: it is
    another while plug-ins are loaded."""
    logging.getLogger("vllm_pd_plugin").parent = logging.getLogger("vllm")


def admit_frontends() -> None:
    """Let our connector be a client of its engine core.

    Its output thread starts when the core is complete, and before any request can have come.
    """
    from vllm.v1.engine.core import EngineCoreProc

    if _MARK in vars(EngineCoreProc):
        return
    process_output_sockets = EngineCoreProc.process_output_sockets

    @functools.wraps(process_output_sockets)
    def and_frontends(self: EngineCoreProc, *args: Any, **kwargs: Any) -> None:
        if (own := own_connector(self.scheduler.get_kv_connector())) is not None:
            own.admit_frontends(self)
        process_output_sockets(self, *args, **kwargs)

    EngineCoreProc.process_output_sockets = and_frontends
    EngineCoreProc.pd_describe_engine = _describe_engine
    setattr(EngineCoreProc, _MARK, True)


def _describe_engine(core: Any) -> dict[str, Any]:
    """A utility method of the engine core, that API servers may call."""
    description: dict[str, Any] = own_connector(core.scheduler.get_kv_connector()).describe_engine()
    return description


def count_frontends_requests() -> None:
    """Let the loggers of an API server of this process count what its engine cores did for
    frontends, beside what came through here: in metrics, in the log line, in whatever there is."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    from vllm_pd_plugin.engine_port.request_statistics import carried

    if getattr(StatLoggerManager, _MARK, False):
        return
    record = StatLoggerManager.record

    @functools.wraps(record)
    def and_theirs(
        self: StatLoggerManager,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int | None = None,
    ) -> None:
        theirs = carried(scheduler_stats)
        for step in theirs or ():
            record(self, None, step, None, engine_idx)
        told = scheduler_stats if theirs is None else None
        record(self, told, iteration_stats, mm_cache_stats, engine_idx)

    StatLoggerManager.record = and_theirs
    setattr(StatLoggerManager, _MARK, True)


def add_description_route() -> None:
    """Let an API server of this process say, at ``DESCRIPTION_PATH``, where frontends attach: to
    each engine core that it has, in the order of their data parallel ranks."""
    launcher: Any = sys.modules.get("vllm.entrypoints.launchers.app")
    if launcher is None or getattr(launcher, _MARK, False):
        return  # no API server: ``LLM()``, or a worker process
    register_api_routers = launcher.register_api_routers

    @functools.wraps(register_api_routers)
    def with_description(args: Any, app: Any, *more: Any, **kwargs: Any) -> None:
        register_api_routers(args, app, *more, **kwargs)

        async def describe() -> list[dict[str, Any]]:
            cores: AsyncMPClient = app.state.engine_client.engine_core
            ask = functools.partial(cores._call_utility_async, "pd_describe_engine")
            return list(await asyncio.gather(*(ask(engine=core) for core in cores.core_engines)))

        app.add_api_route(DESCRIPTION_PATH, describe, methods=["GET"])

    launcher.register_api_routers = with_description
    setattr(launcher, _MARK, True)
