"""The connector's half in vLLM's scheduler: its control thread, and what each step hands over."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.containment import LOOK_AGAIN_S, Containment
from vllm_pd_plugin.edge.consumer_requests import ConsumingRequests
from vllm_pd_plugin.edge.description import EngineRole, describe
from vllm_pd_plugin.edge.identity import AdapterFingerprints, LocalIdentity
from vllm_pd_plugin.edge.metadata import RankHandshake, StepMetadata
from vllm_pd_plugin.edge.metrics import PdStats
from vllm_pd_plugin.edge.producer_requests import ProducingRequests
from vllm_pd_plugin.edge.surroundings import REAL, Surroundings
from vllm_pd_plugin.engine_port import messages
from vllm_pd_plugin.engine_port.server import TokenServer, divert_outputs
from vllm_pd_plugin.engine_port.step_statistics import StepStatistics
from vllm_pd_plugin.errors import HandoffError, ParamsError, Reason
from vllm_pd_plugin.ids import EngineId, Incarnation, RequestId, Source
from vllm_pd_plugin.mapping.kv_cache import EngineKvCache
from vllm_pd_plugin.memory.identity import KvIdentity
from vllm_pd_plugin.net.channel import CurveKeys
from vllm_pd_plugin.protocol.control import ControlPlane, LocalEngine
from vllm_pd_plugin.protocol.events import Abandoned, Event, Lost, Offered, Released
from vllm_pd_plugin.protocol.params import (
    describe_handoff,
    parse_codec,
    parse_sources,
    wants_seed,
    wants_to_produce,
)
from vllm_pd_plugin.protocol.peers import Identity, PeerTable

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_MIN_REST_S, _MAX_REST_S = 0.001, 0.032


class SchedulerSide:
    """Owns the control thread; every other method runs on the engine's own thread."""

    def __init__(
        self,
        config: PdConfig,
        engine_id: EngineId,
        role: EngineRole,
        identify: Callable[[Incarnation], LocalIdentity],
        steps_alone: bool = True,
        around: Surroundings = REAL,
    ) -> None:
        """identify: says what the KV of the engine with this boot id is.
        steps_alone: no other data parallel rank waits for this one's steps."""
        self._contain = Containment("scheduler")
        self._config = config
        self._role = role
        self._clock = around.clock
        self._identity = Identity(engine_id, around.new_incarnation())
        self._local = identify(self._identity.incarnation)
        adapters = self._adapters = AdapterFingerprints(self._identity.incarnation)
        self._keys = CurveKeys.derive(config.cluster_key) if config.cluster_key else None
        self._loop = around.make_loop("pd-control", self._turn)
        self._listener = self._loop.listen((config.host, config.port), self._keys, self._receive)
        self._tokens: TokenServer | None = None
        self._control: ControlPlane
        self._events: deque[Event] = deque()
        self._has_news = threading.Event()
        self._rest_s = _MIN_REST_S
        self._may_rest = steps_alone
        self._stats = PdStats()
        self._consuming = ConsumingRequests(role.recomputes, self._call, self._stats, adapters)
        self._producing = ProducingRequests(
            config.stretch_bytes, self._call, self._stats, adapters, around.new_handoff_id
        )
        self._reported_open = {"producer": 0, "consumer": 0}
        self._reported_drops = self._reported_control = self._reported_faults = 0

    def bind(self, kv_cache_manager: KVCacheManager) -> None:
        """Take what tells the block tables of running requests, and has the prefix cache."""
        self._producing.bind(kv_cache_manager)
        self._consuming.bind(kv_cache_manager)

    def start(self, ranks: Sequence[RankHandshake]) -> None:
        """Begin to serve; ``ranks`` are those of the first pipeline stage, of the second, ..."""
        self._tp_size = ranks[0].kv_cache.tensor_parallel_size
        stages = ranks[:: self._tp_size]
        self._producing.describe([(stage.layout, stage.memory) for stage in stages])
        self._local.probed([rank.probe for rank in ranks])
        self._control = ControlPlane(
            LocalEngine(
                self._identity,
                ranks[0].layout,
                EngineKvCache.merged([stage.kv_cache for stage in stages]),
                self._local.kv,
                [rank.memory for rank in ranks],
                [rank.incarnation for rank in ranks],
                self._config.allow_fp8,
            ),
            self._config.lease_s,
            self._config.queue_timeout_s,
            partial(
                PeerTable,
                self._identity,
                self._config.peer_timeout_s,
                lambda address, on_message: self._loop.connect(address, self._keys, on_message),
                self._clock,
            ),
            self._listener.send,
            self._emit,
            self._clock,
        )
        self._loop.start()
        self._local.hash_fully(lambda full: self._loop.call(lambda: self._hashed(full)))
        logger.info(
            "pdplugin: control channel on %s:%d (%s), incarnation %s, weights %s",
            self._config.advertise_host,
            self._listener.port,
            "encrypted" if self._keys else "no cluster key: loopback only",
            self._identity.incarnation,
            self._local.kv.weights,
        )

    def admit_frontends(self, core: EngineCoreProc) -> None:
        """Let frontends add requests to this engine, now that it is complete."""
        self._contain.run("admitting frontends", lambda: self._admit(core), None)

    def _admit(self, core: EngineCoreProc) -> None:
        engine_id, port = self._identity.engine_id, self._listener.port
        server = TokenServer(
            core,
            describe(core.vllm_config, self._config, self._role, engine_id, port, self._local.kv),
            self._identity.incarnation,
            self._loop.call,
            self._listener.send,
            self._clock,
        )
        divert_outputs(core, server, StepStatistics(self._clock))
        server.watch_prefix_cache()
        self._tokens = server
        self._loop.call(lambda: server.identify(self._local.kv))  # more may be known since

    def describe_engine(self) -> dict[str, Any]:
        """Return what a frontend has to know before it can attach."""
        assert self._tokens is not None
        description: dict[str, Any] = msgspec.to_builtins(self._tokens.description)
        return description | {"incarnation": self._identity.incarnation}

    def close(self) -> None:
        self._local.close()
        if self._tokens is not None:
            self._tokens.close()
        self._loop.call(lambda: self._control.shut_down())
        self._loop.close()

    def wake(self) -> None:
        """End a rest of the engine thread; safe from any thread."""
        self._has_news.set()

    # --- what this engine's KV is ------------------------------------------------------------

    def reset(self) -> None:
        """The cache was reset, perhaps for other weights: no KV from before is given or taken."""
        self._consuming.void()  # until the control thread says so, a commit may be granted
        self._loop.call(lambda: self._void(self._local.kv))

    def weights_change(self, is_over: bool) -> None:
        """The weights are about to be changed in place, or were."""
        self._consuming.void()
        identify = self._local.changed if is_over else self._local.changing
        self._loop.call(lambda: self._void(identify()))

    def adapter_loaded(self, int_id: int) -> None:
        """An adapter was loaded, perhaps in the place of another."""
        self._adapters.reloaded(int_id)

    def _void(self, kv: KvIdentity) -> None:
        self._control.void(kv)
        self._tell_frontends(kv)

    def _hashed(self, full: str) -> None:
        if kv := self._local.hashed(full):
            logger.info("pdplugin: all weights are read: %s", full)
            self._control.identify(kv)
            self._tell_frontends(kv)

    def _tell_frontends(self, kv: KvIdentity) -> None:
        if self._tokens is not None:
            self._tokens.identify(kv)

    # --- requests ----------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """A request has arrived: ask for its KV at once, long before it can be scheduled."""
        self._contain.each("a request", [request], self._add, self._refuse)

    def _refuse(self, request: Request) -> None:
        params, request.kv_transfer_params = request.kv_transfer_params, None
        error = HandoffError(Reason.INTERNAL, "it could not be taken in")
        seeds = isinstance(params, dict) and bool(params.get("seed_first_token"))
        self._consuming.add_failed(request, error, seeds)

    def _add(self, request: Request) -> None:
        seeds = False
        try:
            seeds = wants_seed(request.kv_transfer_params)
            sources = parse_sources(request.kv_transfer_params, self._keys is not None)
            produces = wants_to_produce(request.kv_transfer_params)
            codec = parse_codec(request.kv_transfer_params, self._config)
            self._check(request, bool(sources), produces, seeds)
            handoff_id = self._producing.choose_id(request) if produces else None
        except HandoffError as error:
            request.kv_transfer_params = None  # vLLM reads it next, and expects a mapping
            self._consuming.add_failed(request, error, seeds)
            return
        if handoff_id is not None:
            self._producing.add(request, handoff_id)
        elif sources:
            self._consuming.add(request, sources, codec, seeds)

    def match(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Answer ``get_num_new_matched_tokens``; None means: ask again, the offer has not come."""
        self._take_events()
        match = partial(self._consuming.match, request, num_computed_tokens)
        answer = self._contain.run("matching", match, None)
        return self._consuming.break_off(request) if answer is None else answer

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Answer ``update_state_after_alloc``."""
        scheduled = partial(self._producing.scheduled, request.request_id)
        self._contain.run("scheduling", scheduled, None)
        self._contain.each(
            "allocating",
            [request],
            lambda request: self._consuming.allocated(request, blocks, num_external_tokens),
            lambda request: self._consuming.refuse(request, num_external_tokens),
        )

    def step(self, output: SchedulerOutput) -> StepMetadata:
        """Hand over what has gathered since the last step, and say what this one computes."""
        is_empty = output.total_num_scheduled_tokens == 0
        self._contain.run("resting", lambda: self._rest(is_empty), None)
        self._take_events()
        orders = self._consuming.take_orders()
        advance = partial(self._producing.advance, output.num_scheduled_tokens)
        return StepMetadata(
            orders.fetches,
            orders.refused,
            orders.cancels,
            self._producing.take_released(),
            lending=len(self._producing) > 0,
            announcement=self._contain.run("advancing", advance, None),
            control=(
                (self._config.advertise_host, self._listener.port),
                self._identity.incarnation,
            ),
        )

    def take_abandoned(self) -> tuple[list[RequestId], list[RequestId]]:
        """Return requests to be ended: those that compute what nobody wants any more, and those
        that must not be computed here."""
        self._take_events()
        return self._producing.take_abandoned(), self._consuming.take_hopeless()

    def collect(self, output: KVConnectorOutput) -> None:
        """Take the workers' results of a step."""
        self._consuming.collect(output)

    def finish(
        self, request: Request, blocks: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Answer ``request_finished``: whether to hold the blocks, and the handoff's parameters."""
        request_id = request.request_id
        self._contain.run("ending", partial(self._consuming.finish, request_id), None)
        seal = partial(self._producing.finish, request, blocks)
        sealed = self._contain.run("ending", seal, None)
        if sealed is None:
            return False, None
        address = (self._config.advertise_host, self._listener.port)
        source = Source(sealed.handoff_id, address, self._identity.incarnation)
        engine_id, tokens = self._identity.engine_id, sealed.num_tokens
        return True, describe_handoff(source, engine_id, request_id, tokens, self._tp_size)

    def take_stats(self) -> PdStats | None:
        """Return the counts since the last call; None when nothing has happened."""
        return self._contain.run("counting", self._count, None)

    def _count(self) -> PdStats | None:
        faults = self._contain.faults + self._loop.contain.faults + self._control.faults
        faults += self._consuming.faults + self._producing.faults
        faults += self._tokens.faults if self._tokens else 0
        self._stats.record_faults(faults - self._reported_faults)
        self._reported_faults = faults
        # By this thread's tables: the control thread's change after the last step of an engine
        # that falls idle, and would never be reported.
        handoffs = {"producer": len(self._producing), "consumer": len(self._consuming)}
        if handoffs != self._reported_open:
            self._stats.record_open(handoffs)
            self._reported_open = handoffs
        dropped = self._control.dropped_messages
        dropped += self._tokens.dropped_messages if self._tokens else 0
        self._stats.record_dropped(dropped - self._reported_drops)
        self._reported_drops = dropped
        self._stats.record_control(self._control.control_bytes - self._reported_control)
        self._reported_control = self._control.control_bytes
        if self._stats.is_empty():
            return None
        stats = PdStats(self._stats.data)
        self._stats.reset()
        return stats

    # --- on the control thread -----------------------------------------------------------------

    def _receive(self, identity: bytes, frames: list[bytes]) -> None:
        if self._tokens is not None and messages.is_ours(frames):
            self._tokens.receive(identity, frames)
        else:
            self._control.receive(identity, frames)

    def _turn(self) -> float | None:
        wait_s = self._loop.contain.run("the control plane", self._control.turn, LOOK_AGAIN_S)
        if self._tokens is None:
            return wait_s
        again = self._clock() + LOOK_AGAIN_S
        expiry = self._loop.contain.run("the frontends", self._tokens.turn, again)
        if expiry is None:
            return wait_s
        until = max(0.0, expiry - self._clock())
        return until if wait_s is None else min(wait_s, until)

    # --- inside --------------------------------------------------------------------------------

    def _call(self, function: Callable[[ControlPlane], None]) -> None:
        self._loop.call(lambda: function(self._control))

    def _emit(self, event: Event) -> None:
        self._events.append(event)
        self.wake()

    def _check(self, request: Request, consumes: bool, produces: bool, seeds: bool) -> None:
        if consumes and not self._role.consumes:
            text = "do_remote_prefill was sent to an engine of role prefill"
            raise HandoffError(Reason.WRONG_ROLE, text)
        if produces and not self._role.produces:
            text = "do_remote_decode was sent to an engine of role decode"
            raise HandoffError(Reason.WRONG_ROLE, text)
        if (consumes or produces) and request.prompt_token_ids is None:
            raise ParamsError("a prompt of embeddings cannot be handed off")
        if consumes and seeds and request.skip_reading_prefix_cache:
            raise ParamsError("seed_first_token needs KV that is not computed here")

    def _rest(self, is_empty: bool) -> None:
        """Sleep a little in a step that computes nothing, unless there is news.

        vLLM steps an engine that only waits as often as it can: others need the core. Events and
        new requests end a rest; an abort waits for its end. None follows at once on one that news
        has ended: with two steps in flight, what the workers say of one is taken in when the next
        is scheduled. Data parallel ranks step together: one that rests holds up all others."""
        has_to_wait = len(self._consuming) > 0 or self._producing.holds_blocks
        waits = is_empty and self._may_rest and has_to_wait
        if waits and not self._has_news.wait(self._rest_s):
            self._rest_s = min(max(_MIN_REST_S, 2 * self._rest_s), _MAX_REST_S)
        else:
            self._rest_s = 0.0
        self._has_news.clear()

    def _take_events(self) -> None:
        """Apply what the control thread has found out."""
        events = [self._events.popleft() for _ in range(len(self._events))]
        self._contain.each("an event", events, self._take, self._break_off)

    def _take(self, event: Event) -> None:
        match event:
            case Released():
                self._producing.released(event)
            case Abandoned():
                self._producing.abandoned(event)
            case Offered():
                self._consuming.offered(event)
            case Lost():
                self._consuming.lost(event)

    def _break_off(self, event: Event) -> None:
        """An event could not be taken in: its request cannot go on with it."""
        if isinstance(event, Offered | Lost):
            text = "what became of it could not be taken in"
            self._consuming.lost(Lost(event.request_id, Reason.INTERNAL, text))
