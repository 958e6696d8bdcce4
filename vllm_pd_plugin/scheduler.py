"""The connector's half in vLLM's scheduler: which requests hand off or fetch, and when."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.request import RequestStatus

from vllm_pd_plugin.announcer import Announcement, layers_worth_a_message
from vllm_pd_plugin.channel import CurveKeys, Link, Listener, Loop
from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.control import (
    Abandoned,
    ControlPlane,
    Event,
    LocalEngine,
    Nudged,
    Offered,
    Released,
)
from vllm_pd_plugin.errors import HandoffError, ParamsError, Reason
from vllm_pd_plugin.handoffs import Advance, FetchSpec, ProducerState, Source
from vllm_pd_plugin.ids import (
    EngineId,
    HandoffId,
    RequestId,
    new_handoff_id,
    new_incarnation,
)
from vllm_pd_plugin.layout import EngineLayout, RankMemory
from vllm_pd_plugin.metadata import FetchFailures, RankHandshake, StepMetadata
from vllm_pd_plugin.metrics import PdStats
from vllm_pd_plugin.params import (
    describe_handoff,
    parse_handoff_id,
    parse_source,
    wants_to_produce,
)
from vllm_pd_plugin.peers import Identity, PeerTable

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_MIN_REST_S, _MAX_REST_S = 0.001, 0.032

_HANDED_OFF = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


@dataclasses.dataclass(frozen=True, slots=True)
class EngineRole:
    """What this engine may do with KV, and what it does when a fetch fails."""

    produces: bool
    consumes: bool
    recomputes: bool


class _Stage(enum.Enum):
    FOLLOWING = enum.auto()
    """Another request fetches the same handoff (``n`` > 1): its blocks will be in the cache."""
    WANTED = enum.auto()
    OFFERED = enum.auto()
    FETCHING = enum.auto()
    FINISHED = enum.auto()
    """The request has ended; its fetch is still to be reported."""
    FAILED = enum.auto()


@dataclasses.dataclass(slots=True, eq=False)
class _Consuming:
    """One request whose KV comes from elsewhere, as the scheduler sees it."""

    request: Request
    source: Source | None
    stage: _Stage = _Stage.WANTED
    num_tokens: int = 0
    missing: int = 0
    """How many of them this engine lacked when it was last asked."""


@dataclasses.dataclass(slots=True, eq=False)
class _Producing:
    """One request whose KV is to be handed off.

    epoch: its preemptions that the control thread knows of.
    ending: how the handoff ends when the request does, if it is not sealed.
    """

    request: Request
    handoff_id: HandoffId
    is_open: bool = False
    epoch: int = 0
    ending: ProducerState = ProducerState.CANCELLED


class SchedulerSide:
    """Owns the control thread; every other method runs on the engine's own thread."""

    def __init__(self, config: PdConfig, engine_id: EngineId, role: EngineRole) -> None:
        self._config = config
        self._role = role
        self._identity = Identity(engine_id, new_incarnation())
        self._keys = CurveKeys.derive(config.cluster_key) if config.cluster_key else None
        self._loop = Loop("pd-control", self._turn)
        self._listener = Listener(
            self._loop,
            (config.host, config.port),
            self._keys,
            lambda who, frames: self._control.receive(who, frames),
        )
        self._events: deque[Event] = deque()
        self._has_news = threading.Event()
        self._rest_s = _MIN_REST_S
        self._consuming: dict[RequestId, _Consuming] = {}
        self._leaders: dict[HandoffId, RequestId] = {}
        self._producing: dict[RequestId, _Producing] = {}
        self._handoff_ids: set[HandoffId] = set()
        self._abandoned: list[RequestId] = []
        self._step = 0
        self._sealed: set[RequestId] = set()
        self._fetches: list[FetchSpec] = []
        self._refused: list[RequestId] = []
        self._cancels: dict[RequestId, Reason] = {}
        self._failures = FetchFailures({}, {})
        self._released: list[RequestId] = []
        self._stats = PdStats()
        self._reported_open = {"producer": 0, "consumer": 0}
        self._reported_drops = self._reported_control = 0
        self._control: ControlPlane
        self._kv_cache_manager: KVCacheManager

    def bind(self, kv_cache_manager: KVCacheManager) -> None:
        """Take what tells the block tables of running requests."""
        self._kv_cache_manager = kv_cache_manager

    def start(self, handshakes: dict[int, RankHandshake]) -> None:
        """Begin to serve; ``handshakes`` holds every tensor parallel rank's memory."""
        ranks = [handshakes[rank] for rank in sorted(handshakes)]
        layout, memories = ranks[0].layout, [rank.memory for rank in ranks]
        self._tp_size = len(ranks)
        self._num_layers = len(layout.layers)
        self._has_windows = any(group.window is not None for group in layout.groups)
        self._layer_bytes_per_token = _bytes_per_token(layout, memories[0]) / self._num_layers
        self._control = ControlPlane(
            LocalEngine(self._identity, layout, memories, [rank.incarnation for rank in ranks]),
            self._config.lease_s,
            self._config.queue_timeout_s,
            partial(
                PeerTable,
                self._identity,
                layout,
                self._config.peer_timeout_s,
                lambda address, on_message: Link(self._loop, address, self._keys, on_message),
                time.monotonic,
            ),
            self._listener.send,
            self._emit,
            time.monotonic,
        )
        self._loop.start()
        logger.info(
            "pdplugin: control channel on %s:%d (%s), incarnation %s",
            self._config.advertise_host,
            self._listener.port,
            "encrypted" if self._keys else "no cluster key: loopback only",
            self._identity.incarnation,
        )

    def close(self) -> None:
        self._loop.call(lambda: self._control.shut_down())
        self._loop.close()

    def _turn(self) -> float | None:
        return self._control.turn()

    def _emit(self, event: Event) -> None:
        self._events.append(event)
        self.wake()

    def wake(self) -> None:
        """End a rest of the engine thread; safe from any thread."""
        self._has_news.set()

    # --- requests ----------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """A request has arrived: ask for its KV at once, long before it can be scheduled."""
        request_id = request.request_id
        try:
            source = parse_source(request.kv_transfer_params, self._keys is not None)
            produces = wants_to_produce(request.kv_transfer_params)
            handoff_id = self._choose_id(request) if produces else None
            self._check_role(request, source is not None, produces)
        except HandoffError as error:
            request.kv_transfer_params = None  # vLLM reads it next, and expects a mapping
            self._consuming[request_id] = _Consuming(request, None)
            self._fail(request_id, error.reason, str(error))
            return
        if handoff_id is not None:
            self._produce(request, handoff_id)
        elif source is not None:
            self._consume(request, source)

    def match(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Answer ``get_num_new_matched_tokens``; None means: ask again, the offer has not come."""
        self._take_events()
        consuming = self._consuming.get(request.request_id)
        if consuming is None:
            return 0, False
        if consuming.stage is _Stage.WANTED:
            return None, False
        if consuming.stage is _Stage.FOLLOWING:
            return (None if self._is_led(consuming) else 0), False
        if consuming.stage is _Stage.FAILED:
            # vLLM fails a request only through a failed receive, so one is staged: a single
            # token, whose load the workers report as failed without starting it.
            return (0, False) if self._role.recomputes else (1, True)
        missing = consuming.missing = consuming.num_tokens - num_computed_tokens
        # The last token of a prompt is computed again in any case.
        return (missing, True) if missing > 1 else (0, False)

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Answer ``update_state_after_alloc``."""
        request_id = request.request_id
        self._open(request)
        consuming = self._consuming.get(request_id)
        if consuming is None:
            return
        if num_external_tokens == 0:  # everything is here already, or is computed here
            if consuming.missing > 1 and consuming.stage is not _Stage.FAILED:
                # vLLM loads nothing for this request (it wants prompt_logprobs, for one).
                self._stats.record_failure(Reason.NOT_LOADED)
            self._forget(request_id, cancel=True)
        elif consuming.stage is _Stage.FAILED:
            self._refused.append(request_id)
        else:
            assert consuming.source is not None
            consuming.stage = _Stage.FETCHING
            self._loop.call(lambda: self._control.allocated(request_id))
            self._fetches.append(
                FetchSpec(
                    request_id,
                    consuming.source,
                    consuming.num_tokens - num_external_tokens,
                    consuming.num_tokens,
                    blocks.get_block_ids(),
                )
            )

    def step(self, output: SchedulerOutput) -> StepMetadata:
        """Hand over what has gathered since the last step, and say what this one computes."""
        self._rest(output.total_num_scheduled_tokens == 0)
        self._take_events()
        metadata = StepMetadata(
            tuple(self._fetches),
            tuple(self._refused),
            self._cancels,
            tuple(self._released),
            serving=bool(self._sealed or self._producing),
            announcement=self._advance(output.num_scheduled_tokens),
            control=(
                (self._config.advertise_host, self._listener.port),
                self._identity.incarnation,
            ),
        )
        self._fetches, self._refused, self._cancels, self._released = [], [], {}, []
        return metadata

    def _rest(self, is_empty: bool) -> None:
        """Sleep a little in a step that computes nothing, unless there is news.

        vLLM steps an engine that only waits as often as it can: others need the core. Events and
        new requests end a rest; an abort waits for its end."""
        waits = is_empty and bool(self._consuming or self._sealed)
        if waits and not self._has_news.wait(self._rest_s):
            self._rest_s = min(2 * self._rest_s, _MAX_REST_S)
        else:
            self._rest_s = _MIN_REST_S
        self._has_news.clear()

    def _advance(self, num_scheduled_tokens: Mapping[RequestId, int]) -> Announcement | None:
        """Tell the control thread what becomes of the handoffs in this step."""
        advances, computed = [], 0
        for request_id, producing in self._producing.items():
            request, handoff_id = producing.request, producing.handoff_id
            if request.num_preemptions != producing.epoch:
                producing.epoch = epoch = request.num_preemptions
                self._loop.call(partial(self._control.withdraw, handoff_id, epoch))
                self._stats.record_withdrawal()
            scheduled = num_scheduled_tokens.get(request_id, 0)
            start, end = request.num_computed_tokens, request.num_prompt_tokens
            if scheduled and (start < end or self._has_windows):
                num_tokens = min(start + scheduled, end)
                blocks = self._kv_cache_manager.get_block_ids(request_id)
                advances.append(Advance(handoff_id, producing.epoch, num_tokens, blocks))
                computed += max(0, num_tokens - start)
        if not advances:
            return None
        self._step += 1
        self._loop.call(partial(self._control.advance, self._step, advances))
        return Announcement(
            self._step,
            layers_worth_a_message(
                self._num_layers,
                int(computed * self._layer_bytes_per_token),
                self._config.stretch_bytes,
            ),
        )

    def take_abandoned(self) -> list[RequestId]:
        """Return requests that compute what nobody wants any more; they are to be ended."""
        self._take_events()
        abandoned, self._abandoned = self._abandoned, []
        return abandoned

    def collect(self, output: KVConnectorOutput) -> None:
        """Take the workers' results of a step."""
        failures = output.kv_connector_worker_meta
        if isinstance(failures, FetchFailures):  # a rank may say so before the last has finished
            self._failures = self._failures.aggregate(failures)
        for request_id in output.finished_recving or ():
            reason = self._failures.reasons.pop(request_id, Reason.INTERNAL)
            valid_tokens = self._failures.valid_tokens.pop(request_id, 0)
            self._cancels.pop(request_id, None)
            consuming = self._consuming.get(request_id)
            if consuming is None:
                continue
            failed = request_id in output.failed_recving
            retries = failed and self._role.recomputes and consuming.stage is not _Stage.FINISHED
            if failed and consuming.stage is not _Stage.FAILED:
                self._fail(request_id, reason, "the fetch failed")
            if not retries:
                self._forget(request_id, cancel=failed)
            elif consuming.source is not None:
                self._close(request_id, cancel=True)
                if valid_tokens:
                    # vLLM has set it to none: what did arrive need not be computed again.
                    consuming.request.num_computed_tokens = valid_tokens
                    self._stats.record_kept(valid_tokens)

    def finish(
        self, request: Request, blocks: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Answer ``request_finished``: whether to hold the blocks, and the handoff's parameters."""
        request_id = request.request_id
        consuming = self._consuming.get(request_id)
        if consuming is not None and consuming.stage is _Stage.FETCHING:
            # vLLM keeps the blocks until the workers report the receive as finished.
            consuming.stage = _Stage.FINISHED
            self._cancels[request_id] = Reason.ABORTED
        elif consuming is not None:
            self._forget(request_id, cancel=True)
        producing = self._producing.pop(request_id, None)
        if producing is None:
            return False, None
        handoff_id = producing.handoff_id
        self._handoff_ids.discard(handoff_id)
        if request.status not in _HANDED_OFF or not any(blocks):
            self._loop.call(lambda: self._control.drop(handoff_id))
            self._stats.record_ended(producing.ending)
            return False, None
        num_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        self._sealed.add(request_id)
        self._loop.call(lambda: self._control.seal(handoff_id, num_tokens, blocks))
        address = (self._config.advertise_host, self._listener.port)
        source = Source(handoff_id, address, self._identity.incarnation)
        return True, describe_handoff(
            source, self._identity.engine_id, request_id, num_tokens, self._tp_size
        )

    def take_stats(self) -> PdStats | None:
        """Return the counts since the last call; None when nothing has happened."""
        # By this thread's tables: the control thread's change after the last step of an engine
        # that falls idle, and would never be reported.
        handoffs = {
            "producer": len(self._producing) + len(self._sealed),
            "consumer": len(self._consuming),
        }
        if handoffs != self._reported_open:
            self._stats.record_open(handoffs)
            self._reported_open = handoffs
        self._stats.record_dropped(self._control.dropped_messages - self._reported_drops)
        self._reported_drops = self._control.dropped_messages
        self._stats.record_control(self._control.control_bytes - self._reported_control)
        self._reported_control = self._control.control_bytes
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, PdStats()
        return stats

    # --- inside --------------------------------------------------------------------------------

    def _check_role(self, request: Request, consumes: bool, produces: bool) -> None:
        if consumes and not self._role.consumes:
            text = "do_remote_prefill was sent to an engine of role prefill"
            raise HandoffError(Reason.WRONG_ROLE, text)
        if produces and not self._role.produces:
            text = "do_remote_decode was sent to an engine of role decode"
            raise HandoffError(Reason.WRONG_ROLE, text)
        if (consumes or produces) and request.prompt_token_ids is None:
            raise ParamsError("a prompt of embeddings cannot be handed off")

    def _consume(self, request: Request, source: Source) -> None:
        """Begin to fetch, or to follow the request that already fetches the same handoff."""
        request_id = request.request_id
        consuming = self._consuming[request_id] = _Consuming(request, source)
        if self._is_led(consuming):
            consuming.stage = _Stage.FOLLOWING
        else:
            self._leaders[source.handoff_id] = request_id
            self._loop.call(lambda: self._control.want(request_id, source))

    def _is_led(self, consuming: _Consuming) -> bool:
        assert consuming.source is not None
        return self._leaders.get(consuming.source.handoff_id) in self._consuming

    def _choose_id(self, request: Request) -> HandoffId | None:
        """Return the id of what the request is to hand off; None when another does that: the
        choices of one request (``n`` > 1) have the same parameters."""
        handoff_id = parse_handoff_id(request.kv_transfer_params)
        if handoff_id in self._handoff_ids:
            leader = next(p for p in self._producing.values() if p.handoff_id == handoff_id)
            if leader.request.prompt_token_ids != request.prompt_token_ids:
                raise ParamsError(f"handoff_id={handoff_id} is in use for another prompt")
            return None
        return handoff_id or new_handoff_id()

    def _produce(self, request: Request, handoff_id: HandoffId) -> None:
        request_id, num_tokens = request.request_id, request.num_prompt_tokens
        self._producing[request_id] = _Producing(request, handoff_id)
        self._handoff_ids.add(handoff_id)
        digest = prompt_digest(request, num_tokens)
        enqueue = partial(self._control.enqueue, handoff_id, request_id, num_tokens, digest)
        self._loop.call(enqueue)

    def _open(self, request: Request) -> None:
        """Start to produce, when the request is scheduled for the first time."""
        producing = self._producing.get(request.request_id)
        if producing is None or producing.is_open:
            return
        producing.is_open = True
        self._loop.call(partial(self._control.open, producing.handoff_id))

    def _take_events(self) -> None:
        """Apply what the control thread has found out."""
        while self._events:
            event = self._events.popleft()
            if isinstance(event, Released):
                self._sealed.discard(event.request_id)
                self._released.append(event.request_id)
                self._stats.record_ended(event.state)
                continue
            if isinstance(event, Abandoned):
                self._abandoned.append(event.request_id)
                if producing := self._producing.get(event.request_id):
                    producing.ending = event.state
                continue
            if isinstance(event, Nudged):
                continue
            consuming = self._consuming.get(event.request_id)
            if consuming is None:
                continue
            if isinstance(event, Offered):
                self._accept(consuming, event)
            elif consuming.stage in (_Stage.WANTED, _Stage.OFFERED):
                self._fail(event.request_id, event.reason, event.message)
            elif consuming.stage is _Stage.FETCHING:
                self._cancels[event.request_id] = event.reason

    def _accept(self, consuming: _Consuming, offer: Offered) -> None:
        """Take an offer, if it is for this very prompt."""
        request = consuming.request
        fits = offer.num_tokens <= request.num_tokens
        if fits and prompt_digest(request, offer.num_tokens) == offer.digest:
            consuming.stage, consuming.num_tokens = _Stage.OFFERED, offer.num_tokens
            consuming.source = offer.source
            return
        text = "the handoff is of another prompt"
        self._fail(request.request_id, Reason.PROMPT_MISMATCH, text)
        self._close(request.request_id, cancel=False)

    def _fail(self, request_id: RequestId, reason: Reason, message: str) -> None:
        self._consuming[request_id].stage = _Stage.FAILED
        self._stats.record_failure(reason)
        logger.warning(
            "handoff of request %s failed (%s): %s; %s",
            request_id,
            reason,
            message,
            "computing its prompt here" if self._role.recomputes else "failing the request",
        )

    def _forget(self, request_id: RequestId, cancel: bool) -> None:
        source = self._consuming.pop(request_id).source
        if source is not None and self._leaders.get(source.handoff_id) == request_id:
            del self._leaders[source.handoff_id]
        self._close(request_id, cancel)

    def _close(self, request_id: RequestId, cancel: bool) -> None:
        self._loop.call(lambda: self._control.close(request_id, cancel))


def _bytes_per_token(layout: EngineLayout, memory: RankMemory) -> float:
    """Return how much KV one token has on one rank, in all layers."""
    groups = [group for group in layout.groups for _ in group.layers]
    pairs = zip(memory.regions, groups, strict=True)
    return sum(region.block_bytes / group.block_tokens for region, group in pairs)


def prompt_digest(request: Request, num_tokens: int) -> bytes:
    """Return a 16-byte digest of all that the KV of the first ``num_tokens`` depends on.

    It covers the token ids, the LoRA adapter and the multi-modal inputs, so that KV can never be
    used for another prompt, whoever mixed the two up.
    """
    tokens = np.asarray(request.all_token_ids[:num_tokens], dtype=np.int64)
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=16)
    lora = request.lora_request
    digest.update(repr((lora.lora_name, lora.lora_path) if lora else None).encode())
    for feature in request.mm_features or ():
        position = feature.mm_position
        digest.update(repr((feature.identifier, position.offset, position.length)).encode())
    return digest.digest()
