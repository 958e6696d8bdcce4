"""The connector's half in a vLLM worker: one tensor parallel rank's memory and transfer thread."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from vllm_pd_plugin import memory
from vllm_pd_plugin.channel import CurveKeys, Link, Loop
from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.handoffs import FetchResult
from vllm_pd_plugin.ids import EngineId, RequestId, new_incarnation
from vllm_pd_plugin.layout import EngineLayout
from vllm_pd_plugin.metadata import FetchFailures, RankHandshake, StepMetadata
from vllm_pd_plugin.metrics import PdStats
from vllm_pd_plugin.peers import Identity, PeerTable
from vllm_pd_plugin.transfer import LocalRank, TransferPlane
from vllm_pd_plugin.transport import Transport

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class WorkerSide:
    """Owns the transfer thread; every other method runs on the worker's own thread."""

    def __init__(self, config: PdConfig, engine_id: EngineId, rank: int, num_ranks: int) -> None:
        self._config = config
        self._identity = Identity(engine_id, new_incarnation())
        self._keys = CurveKeys.derive(config.cluster_key) if config.cluster_key else None
        self._rank, self._num_ranks = rank, num_ranks
        self._loop = Loop("pd-transfer", lambda: self._plane.turn())
        self._plane: TransferPlane
        self._results: deque[FetchResult] = deque()
        self._finished: list[RequestId] = []
        self._failed: dict[RequestId, Reason] = {}
        self._released: list[RequestId] = []
        self._serving = False
        self._stats = PdStats()
        self._reported_drops = 0

    def register(
        self, transport: Transport, layout: EngineLayout, caches: Mapping[str, torch.Tensor]
    ) -> RankHandshake:
        """Make the KV caches readable, start the transfer thread, and describe the memory."""
        layers = [layer for group in layout.groups for layer in group.layers]
        rank_memory = memory.register(transport, caches, layers)
        self._plane = TransferPlane(
            LocalRank(self._rank, self._num_ranks, layout, rank_memory.regions),
            transport,
            lambda on_ready, on_lost, on_reply: PeerTable(
                self._identity,
                layout,
                self._config.peer_timeout_s,
                lambda address, on_message: Link(self._loop, address, self._keys, on_message),
                on_ready,
                on_lost,
                on_reply,
                time.monotonic,
            ),
            self._results.append,
            time.monotonic,
            self._config.fetch_timeout_s,
            # Closing a connection in the middle of a read is the last resort: over TCP, UCX may
            # abort the peer's process for it. A peer that was only stopped ends the read itself.
            drain_s=self._config.fetch_timeout_s,
        )
        self._loop.start()
        return RankHandshake(layout, rank_memory)

    def step(self, metadata: StepMetadata) -> None:
        """Start and cancel what the scheduler says, at once: no step is waited for."""
        self._failed |= dict.fromkeys(metadata.refused, Reason.INTERNAL)
        self._finished += metadata.refused
        self._released += metadata.released
        if metadata.serving != self._serving:
            self._serving = serving = metadata.serving
            self._loop.call(lambda: self._plane.set_serving(serving))
        for spec in metadata.fetches:
            self._loop.call(lambda s=spec: self._plane.fetch(s))  # type: ignore[misc]
        for request_id, reason in metadata.cancels.items():
            self._loop.call(lambda i=request_id, r=reason: self._plane.cancel(i, r))  # type: ignore[misc]

    def take_results(self) -> KVConnectorTransferResults:
        """Report each fetch that ended, and each request that may be freed, exactly once."""
        while self._results:
            result = self._results.popleft()
            self._finished.append(result.request_id)
            if result.reason is None:
                self._stats.record_fetch(result)
            else:
                self._failed[result.request_id] = result.reason
        finished, self._finished = set(self._finished), []
        released, self._released = set(self._released), []
        return KVConnectorTransferResults(
            finished_sending=released,
            finished_recving=finished,
            failed_recving=finished & self._failed.keys(),
        )

    def take_failures(self) -> FetchFailures | None:
        """Return why the fetches of the last ``take_results`` failed."""
        failed, self._failed = self._failed, {}
        return FetchFailures(failed) if failed else None

    def take_stats(self) -> PdStats | None:
        """Return the counts since the last call; None when nothing has happened."""
        self._stats.record_dropped(self._plane.dropped_messages - self._reported_drops)
        self._reported_drops = self._plane.dropped_messages
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, PdStats()
        return stats

    def close(self) -> None:
        """Stop the transfer thread, then disconnect."""
        self._loop.call(lambda: self._plane.close())
        self._loop.close()
