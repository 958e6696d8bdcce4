"""An engine's side of a frontend: requests go straight into vLLM's engine core, and what a step
gives out goes straight back.

vLLM's own API server talks to the engine core through two queues, and is told apart from other
clients by an index. A frontend is one client more: the engine's own API server, with its HTTP,
tokenizer and detokenizer, has no part in its requests.

Owned by the engine's control thread, but for ``take_outputs``. Requests are prepared on a thread of
their own: the first grammar may take seconds, and the control thread keeps leases. What is given up
does not wait there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
)
from vllm.v1.serial_utils import MsgpackEncoder

from vllm_pd_plugin.containment import Containment
from vllm_pd_plugin.engine_port import messages
from vllm_pd_plugin.engine_port.attached import AttachedFrontend, Entry
from vllm_pd_plugin.engine_port.intake import Intake
from vllm_pd_plugin.engine_port.load import load_of, state_of
from vllm_pd_plugin.engine_port.prefix_changes import PrefixChanges
from vllm_pd_plugin.engine_port.refusals import refuse_bad_grammar
from vllm_pd_plugin.engine_port.request_statistics import RequestStatistics
from vllm_pd_plugin.engine_port.step_statistics import StepStatistics
from vllm_pd_plugin.ids import Incarnation, RequestId
from vllm_pd_plugin.memory.identity import KvIdentity
from vllm_pd_plugin.protocol.framing import VersionError, WireError

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVEventBatch
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_FIRST_CLIENT_INDEX = 1_000_000
"""Above any index that vLLM gives to its own API servers."""
_LOADER_INDEX = _FIRST_CLIENT_INDEX
"""That of this package itself, when it has the core load adapters."""
_API_SERVER = 0
"""The index of the one that publishes an engine's metrics."""
_MAX_FRONTENDS, _MAX_NAME = 1024, 80


class TokenServer:
    """The frontends that are attached to this engine.

    call: runs a function on the control thread.
    send: sends frames to an identity.
    """

    def __init__(
        self,
        core: EngineCoreProc,
        description: messages.EngineDescription,
        incarnation: Incarnation,
        call: Callable[[Callable[[], None]], None],
        send: Callable[[bytes, list[bytes]], None],
        clock: Callable[[], float],
    ) -> None:
        self._contain = Containment("frontends")
        self._core = core
        self._description = description
        self._incarnation = incarnation
        self._call = call
        self._send_frames = send
        self._clock = clock
        self._encoder = MsgpackEncoder()
        self._by_incarnation: dict[Incarnation, AttachedFrontend] = {}
        self._by_index: dict[int, AttachedFrontend] = {}
        self._next_index = _LOADER_INDEX + 1
        self._intake = Intake(core, _LOADER_INDEX, call, self._began, self._refused)
        self._dropped = 0
        self._prefix_changes = PrefixChanges()
        self._num_steps = 0
        self._counts = RequestStatistics(self._tell_api_server, clock) if core.log_stats else None

    @property
    def description(self) -> messages.EngineDescription:
        return self._description

    @property
    def faults(self) -> int:
        """How many were caught; see ``Containment``."""
        return self._contain.faults

    def identify(self, kv: KvIdentity) -> None:
        """What this engine's KV is has changed, or more is known of it."""
        self._description = msgspec.structs.replace(self._description, kv=kv)
        if self._by_index:
            self._tell_all(messages.Attached(self._description, self._load()))

    @property
    def dropped_messages(self) -> int:
        return self._dropped

    def receive(self, identity: bytes, frames: list[bytes]) -> None:
        """Handle a message from a frontend."""
        try:
            header, message, payload = messages.decode(frames)
        except VersionError as error:
            # Answered in our own version: the header tells the frontend what is wrong.
            logger.warning("refused a frontend: %s", error)
            self._dropped += 1
            self._reply(identity, Incarnation(""), messages.Unknown())
            return
        except WireError as error:
            logger.warning("dropped a message: %s", error)
            self._dropped += 1
            return
        if isinstance(message, messages.Attach):
            self._attach(identity, header.sender, message.frontend)
            return
        frontend = self._by_incarnation.get(header.sender)
        if frontend is None or header.target != self._incarnation:
            self._reply(identity, header.sender, messages.Unknown())
            return
        if identity != frontend.identity:
            return  # it was on its way when the frontend attached anew
        frontend.expires_at = self._clock() + messages.LEASE_S
        match message:
            case messages.Add(request_id, number):
                self._add(frontend, request_id, number, payload)
            case messages.Abort(request_ids):
                self._abort(frontend, request_ids)
            case messages.Ping():
                self._reply(identity, frontend.incarnation, self._state(frontend))
            case _:
                self._dropped += 1

    def _state(self, frontend: AttachedFrontend) -> messages.State:
        return state_of(
            self._core.scheduler,
            self._num_steps,
            frontend.num_outputs,
            {i: entry.number for i, entry in frontend.open.items() if not entry.needs_adapter},
            frontend.last_add,
            len(self._by_index),
        )

    def step_gave_out(self) -> None:
        """A step has given something out, to whomever; from the engine's own thread."""
        self._num_steps += 1

    def take_outputs(self, client_index: int, outputs: EngineCoreOutputs) -> None:
        """Take what a step gave out for a frontend; from the engine's own thread."""
        self._call(lambda: self._send_outputs(client_index, outputs))

    def watch_prefix_cache(self) -> None:
        """Let vLLM tell what changes in the prefix cache, whoever else wants to know."""
        scheduler = self._core.scheduler
        manager, publisher = scheduler.kv_cache_manager, scheduler.kv_event_publisher
        manager.enable_kv_cache_events = manager.block_pool.enable_kv_cache_events = True
        publish = publisher.publish

        def publish_here_too(batch: KVEventBatch) -> None:
            self._contain.run("the prefix cache", lambda: self._take_events(batch), None)
            publish(batch)

        publisher.publish = publish_here_too

    def _take_events(self, batch: KVEventBatch) -> None:
        """Take what a step has changed in the prefix cache; from the engine's own thread."""
        if self._by_index:
            found = (self._prefix_changes.of(event) for event in batch.events)
            changes = tuple(change for change in found if change is not None)
            if changes:
                self._call(lambda: self._tell_all(messages.Blocks(changes)))

    def _tell_all(self, message: messages.ToFrontend) -> None:
        self._contain.each(
            "frontends",
            self._by_index.values(),
            lambda frontend: self._reply(frontend.identity, frontend.incarnation, message),
        )

    def turn(self) -> float | None:
        """Forget frontends that are silent; return when to look again."""
        now = self._clock()
        silent = [f for f in self._by_index.values() if now >= f.expires_at]
        self._contain.each("leases", silent, self._expire)
        times = [f.expires_at for f in self._by_index.values()]
        if self._counts is not None:
            due = self._contain.run("counting", self._counts.turn, None)
            if due is not None:
                times.append(due)
        return min(times, default=None)

    def _expire(self, frontend: AttachedFrontend) -> None:
        text = "frontend %s is silent for %.0f s: its %d requests are ended"
        logger.warning(text, frontend.name, messages.LEASE_S, len(frontend.open))
        self._forget(frontend)

    def _attach(self, identity: bytes, incarnation: Incarnation, name: str) -> None:
        if before := self._by_incarnation.get(incarnation):
            self._forget(before)
        elif len(self._by_index) >= _MAX_FRONTENDS:
            logger.warning("a frontend is refused: %d are attached", len(self._by_index))
            self._reply(identity, incarnation, messages.Unknown())
            return
        name = name[:_MAX_NAME]
        frontend = AttachedFrontend(
            name, incarnation, self._next_index, identity, self._clock() + messages.LEASE_S
        )
        self._next_index += 1
        self._by_incarnation[incarnation] = self._by_index[frontend.client_index] = frontend
        logger.info("frontend %s has attached", name)
        self._reply(identity, incarnation, messages.Attached(self._description, self._load()))

    def _forget(self, frontend: AttachedFrontend) -> None:
        del self._by_incarnation[frontend.incarnation]
        del self._by_index[frontend.client_index]
        self._abort(frontend, tuple(frontend.open))

    def _add(
        self, frontend: AttachedFrontend, request_id: RequestId, number: int, payload: list[bytes]
    ) -> None:
        frontend.last_add = number
        if request_id in frontend.open:
            self._dropped += 1
            return
        frontend.open[request_id] = entry = Entry(number)
        self._intake.add(frontend.client_index, request_id, entry, payload)

    def _refused(self, client_index: int, output: EngineCoreOutput) -> None:
        self.take_outputs(client_index, EngineCoreOutputs(outputs=[output]))

    def _began(self, client_index: int, request: Request, arrived_at: float) -> None:
        """Note a request that goes into the core, unless its frontend has given it up meanwhile."""
        frontend = self._by_index.get(client_index)
        if frontend is None or request.request_id not in frontend.open:
            return
        prompt, params = request.prompt_token_ids, request.sampling_params
        assert prompt is not None
        assert params is not None
        if params.structured_outputs is not None:  # the grammar is compiled while it waits
            frontend.grammars[request.request_id] = request
        if self._counts is not None:
            self._counts.began(request.request_id, arrived_at, prompt, params)

    def _tell_api_server(self, stats: SchedulerStats) -> None:
        outputs = EngineCoreOutputs(scheduler_stats=stats)
        self._core.output_queue.put_nowait((_API_SERVER, outputs))

    def _abort(self, frontend: AttachedFrontend, request_ids: Sequence[RequestId]) -> None:
        entries = {each: entry for each in request_ids if (entry := frontend.open.pop(each, None))}
        for request_id in entries:
            frontend.grammars.pop(request_id, None)
        if self._counts is not None:
            self._counts.dropped(entries)
        self._intake.give_up(entries)

    def close(self) -> None:
        """Stop the thread; nothing more is added."""
        self._intake.close()

    def _send_outputs(self, client_index: int, outputs: EngineCoreOutputs) -> None:
        if client_index == _LOADER_INDEX and outputs.utility_output is not None:
            self._intake.adapter_loaded(outputs.utility_output)
        frontend = self._by_index.get(client_index)
        if frontend is None:
            return
        for output in outputs.outputs:
            if output.finish_reason is not None:
                frontend.open.pop(output.request_id, None)
                refuse_bad_grammar(output, frontend.grammars.pop(output.request_id, None))
        frontend.num_outputs += 1
        payload = [bytes(buffer) for buffer in self._encoder.encode(outputs)]
        message = messages.Outputs(frontend.num_outputs)
        self._reply(frontend.identity, frontend.incarnation, message, payload)
        if (counts := self._counts) is not None:
            self._contain.run("counting", lambda: counts.gave_out(outputs), None)

    def _load(self) -> messages.EngineLoad:
        return load_of(self._core.scheduler, self._num_steps)

    def _reply(
        self,
        identity: bytes,
        incarnation: Incarnation,
        message: messages.ToFrontend,
        payload: list[bytes] | None = None,
    ) -> None:
        frames = messages.encode(message, self._incarnation, incarnation, payload)
        # What cannot be sent is a message lost: a frontend notices a gap, or asks again.
        self._contain.run("answering", lambda: self._send_frames(identity, frames), None)


def divert_outputs(core: EngineCoreProc, server: TokenServer, statistics: StepStatistics) -> None:
    """Let what the core gives out for frontends go to the token server."""
    put_nowait = core.output_queue.put_nowait

    def divert(item: Any) -> None:
        if _computes(item):
            server.step_gave_out()
        if isinstance(item, tuple) and item[0] >= _FIRST_CLIENT_INDEX:
            client_index, outputs = item
            stats, outputs.scheduler_stats = outputs.scheduler_stats, None
            server.take_outputs(client_index, outputs)
            if stats is None or not statistics.are_due(stats):
                return
            # vLLM gives a step's statistics to any one client; only the API server publishes them.
            item = (_API_SERVER, EngineCoreOutputs(scheduler_stats=stats))
        put_nowait(item)

    core.output_queue.put_nowait = divert


def _computes(item: Any) -> bool:
    """Say whether a step that has computed something gives this out: vLLM tells of empty ones, too,
    and answers calls, in an engine that does nothing."""
    if not isinstance(item, tuple):
        return False
    outputs = item[1]
    stats = outputs.scheduler_stats
    return bool(outputs.outputs) or (stats is not None and stats.num_running_reqs > 0)
