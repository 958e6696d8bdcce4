"""The connector's half in vLLM's scheduler: its control thread, and what each step hands over."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.version import __version__ as vllm_version

from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.edge.consumer_requests import ConsumingRequests
from vllm_pd_plugin.edge.metadata import RankHandshake, StepMetadata
from vllm_pd_plugin.edge.metrics import PdStats
from vllm_pd_plugin.edge.producer_requests import ProducingRequests
from vllm_pd_plugin.engine_port import messages
from vllm_pd_plugin.engine_port.messages import EngineDescription
from vllm_pd_plugin.engine_port.server import TokenServer, divert_outputs
from vllm_pd_plugin.engine_port.step_statistics import StepStatistics
from vllm_pd_plugin.errors import HandoffError, ParamsError, Reason
from vllm_pd_plugin.ids import EngineId, RequestId, Source, new_incarnation
from vllm_pd_plugin.net.channel import CurveKeys, Dealer, Listener, Loop
from vllm_pd_plugin.protocol.control import (
    Abandoned,
    ControlPlane,
    Event,
    LocalEngine,
    Lost,
    Offered,
    Released,
)
from vllm_pd_plugin.protocol.params import (
    allowed_codecs,
    describe_handoff,
    parse_codec,
    parse_sources,
    wants_seed,
    wants_to_produce,
)
from vllm_pd_plugin.protocol.peers import Identity, PeerTable

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_MIN_REST_S, _MAX_REST_S = 0.001, 0.032


@dataclasses.dataclass(frozen=True, slots=True)
class EngineRole:
    """What this engine may do with KV, and what it does when a fetch fails."""

    produces: bool
    consumes: bool
    recomputes: bool

    @property
    def name(self) -> str:
        if self.produces and self.consumes:
            return "both"
        return "prefill" if self.produces else "decode"


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
            self._receive,
        )
        self._tokens: TokenServer | None = None
        self._control: ControlPlane
        self._events: deque[Event] = deque()
        self._has_news = threading.Event()
        self._rest_s = _MIN_REST_S
        self._stats = PdStats()
        self._consuming = ConsumingRequests(role.recomputes, self._call, self._stats)
        self._producing = ProducingRequests(config.stretch_bytes, self._call, self._stats)
        self._reported_open = {"producer": 0, "consumer": 0}
        self._reported_drops = self._reported_control = 0

    def bind(self, kv_cache_manager: KVCacheManager) -> None:
        """Take what tells the block tables of running requests."""
        self._producing.bind(kv_cache_manager)

    def start(self, handshakes: dict[int, RankHandshake]) -> None:
        """Begin to serve; ``handshakes`` holds every tensor parallel rank's memory."""
        ranks = [handshakes[rank] for rank in sorted(handshakes)]
        layout, memories = ranks[0].layout, [rank.memory for rank in ranks]
        self._tp_size = len(ranks)
        self._model_digest = layout.model
        self._producing.describe(layout, memories[0])
        self._control = ControlPlane(
            LocalEngine(self._identity, layout, memories, [rank.incarnation for rank in ranks]),
            self._config.lease_s,
            self._config.queue_timeout_s,
            partial(
                PeerTable,
                self._identity,
                layout,
                self._config.peer_timeout_s,
                lambda address, on_message: Dealer(self._loop, address, self._keys, on_message),
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

    def admit_frontends(self, core: EngineCoreProc) -> None:
        """Let frontends add requests to this engine, now that it is complete."""
        server = TokenServer(
            core,
            self._describe(core.vllm_config),
            self._identity.incarnation,
            self._loop.call,
            self._listener.send,
            time.monotonic,
        )
        divert_outputs(core, server, StepStatistics(time.monotonic))
        server.watch_prefix_cache()
        self._tokens = server

    def describe_engine(self) -> dict[str, Any]:
        """Return what a frontend has to know before it can attach."""
        assert self._tokens is not None
        description: dict[str, Any] = msgspec.to_builtins(self._tokens.description)
        return description | {"incarnation": self._identity.incarnation}

    def _describe(self, config: VllmConfig) -> EngineDescription:
        served = config.model_config.served_model_name
        return EngineDescription(
            engine_id=self._identity.engine_id,
            role=self._role.name,
            model=served if isinstance(served, str) else served[0],
            vllm_version=vllm_version,
            control_host=self._config.advertise_host,
            control_port=self._listener.port,
            max_model_len=config.model_config.max_model_len,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
            data_parallel_size=config.parallel_config.data_parallel_size,
            codecs=allowed_codecs(self._config),
            vocab_size=config.model_config.get_vocab_size(),
            model_digest=self._model_digest,
            kv_tokens=config.cache_config.kv_cache_size_tokens or 0,
            block_tokens=config.cache_config.block_size,
        )

    def close(self) -> None:
        if self._tokens is not None:
            self._tokens.close()
        self._loop.call(lambda: self._control.shut_down())
        self._loop.close()

    def wake(self) -> None:
        """End a rest of the engine thread; safe from any thread."""
        self._has_news.set()

    # --- requests ----------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """A request has arrived: ask for its KV at once, long before it can be scheduled."""
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
        return self._consuming.match(request, num_computed_tokens)

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Answer ``update_state_after_alloc``."""
        self._producing.scheduled(request.request_id)
        self._consuming.allocated(request, blocks, num_external_tokens)

    def step(self, output: SchedulerOutput) -> StepMetadata:
        """Hand over what has gathered since the last step, and say what this one computes."""
        self._rest(output.total_num_scheduled_tokens == 0)
        self._take_events()
        orders = self._consuming.take_orders()
        return StepMetadata(
            orders.fetches,
            orders.refused,
            orders.cancels,
            self._producing.take_released(),
            lending=len(self._producing) > 0,
            announcement=self._producing.advance(output.num_scheduled_tokens),
            control=(
                (self._config.advertise_host, self._listener.port),
                self._identity.incarnation,
            ),
        )

    def take_abandoned(self) -> list[RequestId]:
        """Return requests to be ended: nobody wants any more what they compute, or they must not
        be computed here."""
        self._take_events()
        return self._producing.take_abandoned() + self._consuming.take_hopeless()

    def collect(self, output: KVConnectorOutput) -> None:
        """Take the workers' results of a step."""
        self._consuming.collect(output)

    def finish(
        self, request: Request, blocks: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Answer ``request_finished``: whether to hold the blocks, and the handoff's parameters."""
        self._consuming.finish(request.request_id)
        sealed = self._producing.finish(request, blocks)
        if sealed is None:
            return False, None
        address = (self._config.advertise_host, self._listener.port)
        source = Source(sealed.handoff_id, address, self._identity.incarnation)
        return True, describe_handoff(
            source,
            self._identity.engine_id,
            request.request_id,
            sealed.num_tokens,
            self._tp_size,
        )

    def take_stats(self) -> PdStats | None:
        """Return the counts since the last call; None when nothing has happened."""
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
        wait_s = self._control.turn()
        expiry = self._tokens.turn() if self._tokens else None
        if expiry is None:
            return wait_s
        until = max(0.0, expiry - time.monotonic())
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
        new requests end a rest; an abort waits for its end."""
        waits = is_empty and (len(self._consuming) > 0 or self._producing.holds_blocks)
        if waits and not self._has_news.wait(self._rest_s):
            self._rest_s = min(2 * self._rest_s, _MAX_REST_S)
        else:
            self._rest_s = _MIN_REST_S
        self._has_news.clear()

    def _take_events(self) -> None:
        """Apply what the control thread has found out."""
        while self._events:
            match self._events.popleft():
                case Released() as released:
                    self._producing.released(released)
                case Abandoned() as abandoned:
                    self._producing.abandoned(abandoned)
                case Offered() as offer:
                    self._consuming.offered(offer)
                case Lost() as lost:
                    self._consuming.lost(lost)
