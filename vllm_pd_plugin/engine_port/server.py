"""An engine's side of a frontend: requests go straight into vLLM's engine core, and what a step
gives out goes straight back.

vLLM's own API server talks to the engine core through two queues, and is told apart from other
clients by an index. A frontend is one client more: the engine's own API server, with its HTTP,
tokenizer and detokenizer, has no part in its requests.

Owned by the engine's control thread, but for ``take_outputs``. Requests are prepared on a thread of
their own: a grammar may take seconds, and the control thread keeps leases.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
)
from vllm.v1.kv_cache_interface import KVCacheSpecKind
from vllm.v1.request import RequestStatus
from vllm.v1.serial_utils import MsgpackEncoder

from vllm_pd_plugin.containment import Containment
from vllm_pd_plugin.engine_port import messages
from vllm_pd_plugin.engine_port.peer_decoder import PeerDecoder
from vllm_pd_plugin.engine_port.step_statistics import StepStatistics
from vllm_pd_plugin.ids import Incarnation, RequestId
from vllm_pd_plugin.memory.identity import KvIdentity
from vllm_pd_plugin.protocol.framing import VersionError, WireError

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVEventBatch
    from vllm.v1.engine.core import EngineCoreProc

logger = logging.getLogger(__name__)

_FIRST_CLIENT_INDEX = 1_000_000
"""Above any index that vLLM gives to its own API servers."""
_MAX_FRONTENDS, _MAX_NAME = 1024, 80
_WHOLE_PREFIX = (KVCacheSpecKind.FULL_ATTENTION.value, KVCacheSpecKind.MLA_ATTENTION.value)
"""Kinds of layers that need the whole prefix: where these have it, the others do."""


@dataclasses.dataclass(slots=True, eq=False)
class _Frontend:
    """identity: of the connection on which it has attached."""

    name: str
    incarnation: Incarnation
    client_index: int
    identity: bytes
    expires_at: float
    num_outputs: int = 0
    open: set[RequestId] = dataclasses.field(default_factory=set)


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
        self._decoder = PeerDecoder(EngineCoreRequest)
        self._encoder = MsgpackEncoder()
        self._by_incarnation: dict[Incarnation, _Frontend] = {}
        self._by_index: dict[int, _Frontend] = {}
        self._next_index = _FIRST_CLIENT_INDEX
        self._dropped = 0
        self._preparing = ThreadPoolExecutor(1, "pd-prepare")
        self._prefix_groups: set[int | None] = set()

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
            case messages.Add(request_id):
                self._add(frontend, request_id, payload)
            case messages.Abort(request_ids):
                self._abort(frontend, request_ids)
            case messages.Ping():
                state = messages.State(self._load(), frontend.num_outputs)
                self._reply(identity, frontend.incarnation, state)
            case _:
                self._dropped += 1

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
            changes = tuple(change for event in batch.events if (change := self._change(event)))
            if changes:
                self._call(lambda: self._tell_all(messages.Blocks(changes)))

    def _change(self, event: Any) -> messages.Stored | messages.Removed | messages.Cleared | None:
        """Return what a frontend can use of an event: plain text, in layers that need all of it."""
        match event:
            case BlockStored():
                is_plain = not event.lora_name and not any(event.extra_keys or ())
                if event.kv_cache_spec_kind not in _WHOLE_PREFIX or not is_plain:
                    return None
                self._prefix_groups.add(event.group_idx)
                hashes, token_ids = tuple(event.block_hashes), tuple(event.token_ids)
                return messages.Stored(event.parent_block_hash, hashes, token_ids, event.block_size)
            case BlockRemoved() if event.group_idx in self._prefix_groups:
                return messages.Removed(tuple(event.block_hashes))
            case AllBlocksCleared():
                return messages.Cleared()
            case _:
                return None

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
        return min((f.expires_at for f in self._by_index.values()), default=None)

    def _expire(self, frontend: _Frontend) -> None:
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
        frontend = _Frontend(
            name, incarnation, self._next_index, identity, self._clock() + messages.LEASE_S
        )
        self._next_index += 1
        self._by_incarnation[incarnation] = self._by_index[frontend.client_index] = frontend
        logger.info("frontend %s has attached", name)
        self._reply(identity, incarnation, messages.Attached(self._description, self._load()))

    def _forget(self, frontend: _Frontend) -> None:
        del self._by_incarnation[frontend.incarnation]
        del self._by_index[frontend.client_index]
        self._abort(frontend, tuple(frontend.open))

    def _add(self, frontend: _Frontend, request_id: RequestId, payload: list[bytes]) -> None:
        if request_id in frontend.open:
            self._dropped += 1
            return
        frontend.open.add(request_id)
        index = frontend.client_index
        self._preparing.submit(lambda: self._prepare(index, request_id, payload))

    def _prepare(self, client_index: int, request_id: RequestId, payload: list[bytes]) -> None:
        """Do what vLLM's input thread does; on the thread for that."""
        # Client input must never end the engine: whatever is wrong with it ends the request only.
        try:
            request = self._decoder.decode(payload)
            request.request_id, request.client_index = request_id, client_index
            # Data parallel ranks of a mixture of experts step together, or all pause. vLLM's own
            # clients wake the others; a request of no wave of steps lets this rank do it.
            request.current_wave = -1
            self._refuse(request)
            prepared = self._core.preprocess_add_request(request)
        except Exception:
            logger.exception("request %s is refused", request_id)
            output = EngineCoreOutput(request_id, [], finish_reason=FinishReason.ERROR)
            self.take_outputs(client_index, EngineCoreOutputs(outputs=[output]))
            return
        self._core.input_queue.put_nowait((EngineCoreRequestType.ADD, prepared))

    def _refuse(self, request: EngineCoreRequest) -> None:
        """Refuse what the engine's own thread would not survive. Raises ValueError."""
        config = self._core.vllm_config
        prompt = request.prompt_token_ids
        if request.sampling_params is None or request.pooling_params is not None or not prompt:
            raise ValueError("only a prompt of tokens to go on from can be served")
        if request.prompt_embeds is not None or request.mm_features:
            raise ValueError("only text can be served")
        if request.resumable or request.abort_immediately:
            raise ValueError("a session cannot be served")
        if len(prompt) >= config.model_config.max_model_len:
            raise ValueError(f"a prompt of {len(prompt)} tokens is too long")
        if min(prompt) < 0 or max(prompt) >= config.model_config.get_vocab_size():
            raise ValueError("the prompt has tokens that the model does not know")
        if request.lora_request is not None and config.lora_config is None:
            raise ValueError("this engine has no LoRA adapters")
        if request.request_id in self._core.scheduler.requests:
            raise ValueError("its id is in use")

    def _abort(self, frontend: _Frontend, request_ids: Sequence[RequestId]) -> None:
        ended = [each for each in request_ids if each in frontend.open]
        if ended:
            frontend.open.difference_update(ended)
            self._preparing.submit(lambda: self._end(ended))  # after their ADD

    def _end(self, request_ids: list[RequestId]) -> None:
        # As vLLM's own input thread does: one queue is read in a step, the other keeps the order.
        self._core.aborts_queue.put_nowait(request_ids)
        self._core.input_queue.put_nowait((EngineCoreRequestType.ABORT, request_ids))

    def close(self) -> None:
        """Stop the thread; nothing more is added."""
        self._preparing.shutdown(wait=False, cancel_futures=True)

    def _send_outputs(self, client_index: int, outputs: EngineCoreOutputs) -> None:
        frontend = self._by_index.get(client_index)
        if frontend is None:
            return
        for output in outputs.outputs:
            if output.finish_reason is not None:
                frontend.open.discard(output.request_id)
        frontend.num_outputs += 1
        payload = [bytes(buffer) for buffer in self._encoder.encode(outputs)]
        message = messages.Outputs(frontend.num_outputs)
        self._reply(frontend.identity, frontend.incarnation, message, payload)

    def _load(self) -> messages.EngineLoad:
        scheduler = self._core.scheduler
        running, waiting = scheduler.get_request_counts()
        requests: list[Any] = list(scheduler.requests.values())
        return messages.EngineLoad(
            running,
            waiting,
            sum(_tokens_to_compute(request) for request in requests),
            scheduler.get_kv_cache_usage(),
        )

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


def _tokens_to_compute(request: Any) -> int:
    """Return how much of its prompt a request has yet to compute on this engine."""
    params = request.kv_transfer_params
    fetches = request.status == RequestStatus.WAITING_FOR_REMOTE_KVS or (
        isinstance(params, dict)
        and params.get("do_remote_prefill")
        and request.num_computed_tokens == 0
    )
    return 0 if fetches else max(0, request.num_prompt_tokens - request.num_computed_tokens)


def divert_outputs(core: EngineCoreProc, server: TokenServer, statistics: StepStatistics) -> None:
    """Let what the core gives out for frontends go to the token server."""
    put_nowait = core.output_queue.put_nowait

    def divert(item: Any) -> None:
        if isinstance(item, tuple) and item[0] >= _FIRST_CLIENT_INDEX:
            client_index, outputs = item
            stats, outputs.scheduler_stats = outputs.scheduler_stats, None
            server.take_outputs(client_index, outputs)
            if stats is None or not statistics.are_due(stats):
                return
            # vLLM gives a step's statistics to any one client; only the API server publishes them.
            item = (0, EngineCoreOutputs(scheduler_stats=stats))
        put_nowait(item)

    core.output_queue.put_nowait = divert
