"""The connector's half in a vLLM worker: one rank's memory and transfer thread."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.containment import LOOK_AGAIN_S, Containment
from vllm_pd_plugin.edge.metadata import FetchReport, RankHandshake, StepMetadata
from vllm_pd_plugin.edge.metrics import PdStats
from vllm_pd_plugin.edge.surroundings import REAL, Surroundings
from vllm_pd_plugin.ids import Address, EngineId, RequestId
from vllm_pd_plugin.mapping.kv_cache import EngineKvCache, RankPlace
from vllm_pd_plugin.memory import regions
from vllm_pd_plugin.memory.layout import RankLayout
from vllm_pd_plugin.memory.probe import Sums
from vllm_pd_plugin.net.channel import CurveKeys
from vllm_pd_plugin.net.transport import Transport
from vllm_pd_plugin.packing.digests import kv_digest
from vllm_pd_plugin.packing.slabs import Slabs
from vllm_pd_plugin.protocol.peers import Channel, Identity, PeerTable
from vllm_pd_plugin.transfer.announcer import Announcement, Announcer, Mark
from vllm_pd_plugin.transfer.plane import TransferPlane
from vllm_pd_plugin.transfer.rank import LocalRank, Rank, Timeouts
from vllm_pd_plugin.transfer.specs import FetchResult

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class WorkerSide:
    """Owns the transfer thread; every other method runs on the worker's own thread."""

    def __init__(
        self,
        config: PdConfig,
        engine_id: EngineId,
        place: RankPlace,
        data_parallel_rank: int = 0,
        around: Surroundings = REAL,
    ) -> None:
        self.place = place
        self._data_parallel_rank = data_parallel_rank
        self._contain = Containment("worker")
        self._config = config
        self._clock = around.clock
        self._identity = Identity(engine_id, around.new_incarnation())
        self._keys = CurveKeys.derive(config.cluster_key) if config.cluster_key else None
        self._loop = around.make_loop("pd-transfer", self._turn)
        self._announcer: Announcer
        self._knows_control = False
        self._plane: TransferPlane
        self._results: deque[FetchResult] = deque()
        self._finished: list[RequestId] = []
        self._failed: dict[RequestId, FetchResult] = {}
        self._sampled: dict[RequestId, int] = {}
        self._codecs: dict[RequestId, Codec] = {}
        self._lacking: set[RequestId] = set()
        self._released: list[RequestId] = []
        self._lending = False
        self._places: dict[str, int] = {}
        self._mark_stream: Callable[[], Callable[[], bool]] = _mark_nothing
        self._announcement: Announcement | None = None
        self._layers_written = 0
        self._stats = PdStats()
        self._reported_drops = self._reported_control = self._reported_faults = 0

    @property
    def narrowest(self) -> Codec:
        """The narrowest codec that this engine may use."""
        return self._config.narrowest

    def register(
        self, transport: Transport, layout: RankLayout, caches: Mapping[str, torch.Tensor]
    ) -> RankHandshake:
        """Make the KV caches readable, start the transfer thread, and describe the memory."""
        device = next(iter(caches.values())).device
        self._loop.call(partial(use_device, device))  # before anything else that it does
        order = layout.forward_order()
        self._places = {layout.layers[region]: place for place, region in enumerate(order)}
        if device.type == "cuda":
            self._mark_stream = _mark_cuda_stream
        config = self._config
        ordered = [caches[layer] for layer in layout.layers]
        digest = partial(kv_digest, layout.groups, ordered)
        slabs = Slabs.allocate(config, layout, ordered)
        rank_memory = regions.register(
            transport,
            caches,
            layout.layers,
            [slabs.outgoing, slabs.incoming] if slabs else [],
        )
        self._announcer = Announcer(
            self._identity.incarnation,
            self.place.rank,
            digest,
            slabs.packer() if slabs else None,
            self._connect,
        )
        incoming = slabs.for_reads(config) if slabs else None
        kv_cache = EngineKvCache.seen_by_rank(
            layout, rank_memory, self.place, self._data_parallel_rank
        )
        self._plane = TransferPlane(
            Rank(
                LocalRank(
                    self.place.rank,
                    layout,
                    kv_cache,
                    rank_memory.regions,
                    incoming,
                    config.allow_fp8,
                ),
                transport,
                # Closing a connection in the middle of a read is the last resort: over TCP, UCX
                # may abort the peer's process for it. A peer that was only stopped ends the read
                # itself.
                Timeouts(config.queue_timeout_s, config.fetch_timeout_s, config.fetch_timeout_s),
                self._clock,
                digest if config.integrity == "digest" else None,
            ),
            partial(
                PeerTable,
                self._identity,
                config.peer_timeout_s,
                self._connect,
                self._clock,
            ),
            self._take_result,
        )
        self._loop.start()
        return RankHandshake(self._identity.incarnation, layout, kv_cache, rank_memory)

    def probe(self, compute: Callable[[], dict[str, Sums]], why_not: str) -> dict[str, Sums] | None:
        """Return what ``compute`` returns; None where there is a reason not to, or it fails.

        Raises what it raises where other ranks compute it, too: they would wait for this one.
        """
        if self._config.probe == "never":
            why_not = "probe=never"
        if why_not:
            text = "pdplugin: the probe prompt is not computed: %s. %s"
            then = "Engines of another release line of vLLM refuse this one, others go by names"
            logger.warning(text, why_not, then)
            return None
        if self.place.num_ranks == 1:
            return self._contain.run("the probe", compute, None)
        try:
            return compute()
        except Exception:
            logger.error("pdplugin: the probe prompt failed; without it: probe=never")
            raise

    def _connect(self, address: Address, on_message: Callable[[list[bytes]], None]) -> Channel:
        return self._loop.connect(address, self._keys, on_message)

    def _take_result(self, result: FetchResult) -> None:
        self._results.append(result)
        self._announcer.nudge()

    def _turn(self) -> float | None:
        run = self._loop.contain.run
        waits = (
            run("announcing", self._announcer.turn, LOOK_AGAIN_S),
            run("fetching", self._plane.turn, LOOK_AGAIN_S),
        )
        return min((wait for wait in waits if wait is not None), default=None)

    # --- in the forward pass -----------------------------------------------------------------

    def layer_written(self, layer: str) -> None:
        """A layer's KV of this step is written. Called in the forward pass: it only takes note."""
        if self._announcement is not None:
            self._contain.run("the forward pass", partial(self._note_layer, layer), None)

    def _note_layer(self, layer: str) -> None:
        assert self._announcement is not None
        place = self._places.get(layer)
        if place == self._layers_written:  # out of order it says nothing of those before it
            self._layers_written += 1
            if self._layers_written in self._announcement.after_layers[self.place.stage]:
                self._mark(self._layers_written)

    def forward_ended(self) -> None:
        """All layers' KV of this step is written, whether or not each of them said so."""
        if self._announcement is not None:
            self._contain.run("the forward pass", self._note_end, None)
            self._announcement = None

    def _note_end(self) -> None:
        assert self._announcement is not None
        num_layers = self._announcement.after_layers[self.place.stage][-1]
        if self._layers_written < num_layers:
            self._mark(num_layers)

    def _mark(self, num_layers: int) -> None:
        assert self._announcement is not None
        mark = Mark(self._announcement, num_layers, self._mark_stream())
        self._loop.call(lambda: self._announcer.add(mark))

    def step(self, metadata: StepMetadata) -> None:
        """Start and cancel what the scheduler says, at once: no step is waited for."""
        call = self._loop.call
        self._released += metadata.released
        self._announcement, self._layers_written = metadata.announcement, 0
        if not self._knows_control:
            self._knows_control = True
            call(partial(self._announcer.connect, *metadata.control))
        for request_id in metadata.refused:
            call(partial(self._plane.refuse, request_id))
        if metadata.lending != self._lending:
            self._lending = metadata.lending
            call(partial(self._plane.set_lending, metadata.lending))
            call(partial(self._announcer.set_lending, metadata.lending))
        for spec in metadata.fetches:
            call(partial(self._plane.fetch, spec))
        for request_id, reason in metadata.cancels.items():
            call(partial(self._plane.cancel, request_id, reason))

    def take_results(self) -> KVConnectorTransferResults:
        """Report each fetch that ended, and each request that may be freed, exactly once."""
        while self._results:
            result = self._results.popleft()
            if result.is_final:
                self._finished.append(result.request_id)
            if result.codec is not Codec.RAW:
                self._codecs[result.request_id] = result.codec
            if result.lacks_tokens:
                self._lacking.add(result.request_id)
            if result.reason is None:
                self._stats.record_fetch(result)
                if result.sampled is not None:
                    self._sampled[result.request_id] = result.sampled
            else:
                self._failed[result.request_id] = result
        finished, self._finished = set(self._finished), []
        released, self._released = set(self._released), []
        return KVConnectorTransferResults(
            finished_sending=released,
            finished_recving=finished,
            failed_recving=finished & self._failed.keys(),
        )

    def take_report(self) -> FetchReport | None:
        """Return what there is to say about the fetches of the last ``take_results``."""
        failed, self._failed = self._failed, {}
        sampled, self._sampled = self._sampled, {}
        codecs, self._codecs = self._codecs, {}
        lacking, self._lacking = self._lacking, set()
        if not (failed or sampled or codecs or lacking):
            return None
        reasons = {i: result.reason for i, result in failed.items() if result.reason}
        return FetchReport(
            reasons,
            {i: r.valid_tokens for i, r in failed.items()},
            {i: r.attempt for i, r in failed.items()},
            sampled,
            codecs,
            lacking,
        )

    def take_stats(self) -> PdStats | None:
        """Return the counts since the last call; None when nothing has happened."""
        return self._contain.run("counting", self._count, None)

    def _count(self) -> PdStats | None:
        faults = self._contain.faults + self._loop.contain.faults + self._plane.faults
        self._stats.record_faults(faults + self._announcer.faults - self._reported_faults)
        self._reported_faults = faults + self._announcer.faults
        self._stats.record_dropped(self._plane.dropped_messages - self._reported_drops)
        self._reported_drops = self._plane.dropped_messages
        self._stats.record_control(self._plane.control_bytes - self._reported_control)
        self._reported_control = self._plane.control_bytes
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, PdStats()
        return stats

    def close(self) -> None:
        """Stop the transfer thread, then disconnect."""
        self._loop.call(lambda: self._plane.close())
        self._loop.call(self._announcer.close)
        self._loop.close()


def use_device(device: torch.device) -> None:
    """Let the calling thread use a rank's GPU.

    CUDA's current device is one for each thread, and the first GPU where nobody has said another:
    there UCX would register memory without NVLink, and asking for an event make a context.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)


def _mark_nothing() -> Callable[[], bool]:
    """On a CPU a layer is written when its hook is called."""
    return lambda: True


def _mark_cuda_stream() -> Callable[[], bool]:
    """On a GPU it is written when the stream gets there."""
    import torch

    event = torch.cuda.Event()
    event.record()
    return lambda: bool(event.query())
