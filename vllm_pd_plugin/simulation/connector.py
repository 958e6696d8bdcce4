"""Where the simulation enters the real code: both halves of an engine's connector, with simulated
surroundings. The one module to change when their constructors do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.v1.outputs import KVConnectorOutput

from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.edge import room
from vllm_pd_plugin.edge.connector import PdConnector
from vllm_pd_plugin.edge.description import EngineRole
from vllm_pd_plugin.edge.hooks import end_abandoned_requests, free_blocks_once
from vllm_pd_plugin.edge.metadata import RankHandshake, StepMetadata
from vllm_pd_plugin.edge.scheduler import SchedulerSide
from vllm_pd_plugin.edge.surroundings import Surroundings
from vllm_pd_plugin.edge.worker import WorkerSide
from vllm_pd_plugin.ids import HandoffId, RequestId
from vllm_pd_plugin.mapping.kv_cache import RankPlace
from vllm_pd_plugin.memory.identity import KvIdentity, Weights
from vllm_pd_plugin.protocol.events import Nudged
from vllm_pd_plugin.simulation.clock import Act
from vllm_pd_plugin.simulation.links import SimulatedLoop
from vllm_pd_plugin.simulation.memory import KvTable
from vllm_pd_plugin.simulation.shape import Shape
from vllm_pd_plugin.simulation.transport import SimulatedTransport

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


class SimulatedIdentity:
    """In place of ``LocalIdentity``: weights are a number. after(seconds, act): on simulated time.
    hash_s: how long it takes to read them all; None: that is not done."""

    def __init__(
        self, weights: int, after: Callable[[float, Act], None], hash_s: float | None
    ) -> None:
        self.weights = weights
        self.kv = _kv(f"weights {weights}")
        self._after = after
        self._hash_s = hash_s
        self._is_loaded = True

    def changing(self) -> KvIdentity:
        self._is_loaded = False
        self.kv = _kv("unknown:being changed")
        return self.kv

    def changed(self) -> KvIdentity:
        self.kv = _kv(f"weights {self.weights}")
        return self.kv

    def probed(self, ranks: Sequence[object]) -> None:
        """There is no model that computes the probe prompt."""

    def hash_fully(self, on_done: Callable[[str], None]) -> None:
        """Say after a while what all bytes of the weights come to."""
        if self._hash_s is not None:
            full = f"all of weights {self.weights}"
            self._after(self._hash_s, lambda: on_done(full))

    def hashed(self, full: str) -> KvIdentity | None:
        if not self._is_loaded:  # they were changed since
            return None
        weights = msgspec.structs.replace(self.kv.weights, full=full)
        self.kv = msgspec.structs.replace(self.kv, weights=weights)
        return self.kv

    def close(self) -> None:
        """Nothing runs."""


def _kv(sampled: str) -> KvIdentity:
    same = "the same"
    return KvIdentity(same, same, Weights(sampled), same, same, same, same, same)


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """What a simulated engine is given. on_news: ends a rest of the engine thread."""

    engine_id: str
    shape: Shape
    config: PdConfig
    around: Surroundings
    identity: SimulatedIdentity
    on_news: Callable[[], None]


class _SchedulerSide(SchedulerSide):
    """Rests where the simulated engine does, not in its steps."""

    def __init__(self, site: Site) -> None:
        shape = site.shape
        role = EngineRole(shape.role != "decode", shape.role != "prefill", shape.recomputes)
        self._on_news = site.on_news
        identify: Any = lambda incarnation: site.identity  # noqa: E731
        super().__init__(
            site.config, site.engine_id, role, identify, steps_alone=False, around=site.around
        )

    def wake(self) -> None:
        super().wake()
        self._on_news()

    def what_is_open(self) -> dict[str, object]:
        """Return what is kept of requests, by where."""
        control, consuming, producing = self._control, self._consuming, self._producing
        wanting = control._wanting
        found: dict[str, object] = {
            "exports": control._exports._held,
            "awaited": control._exports._absent._awaited,
            "leases": control._exports._leases._at,
            "wants": wanting._consuming._wanted,
            "deadlines of wants": wanting._consuming._deadlines._at,
            "heartbeats": wanting._heartbeats._at,
            "cancels": wanting._cancels,
            "answers": control._outbox._waiting,
            "requests that hand off": producing._open,
            "of them begun": producing._started,
            "their ids": producing._by_handoff,
            "held": producing._sealed,
            "released": producing._released,
            "abandoned": producing._abandoned,
            "requests that fetch": consuming._open,
            "leaders": consuming._leaders,
            "orders": consuming._fetches,
            "refused": consuming._refused,
            "cancelled": consuming._cancels,
            "hopeless": consuming._hopeless,
            "reasons": consuming._report.reasons,
            "events": [event for event in self._events if not isinstance(event, Nudged)],
        }
        return {name: kept for name, kept in found.items() if kept}

    def handoffs(self) -> list[HandoffId]:
        """Return those that this engine produces."""
        return list(self._control._exports._held)

    @property
    def num_announced(self) -> int:
        """The number of the last step that was to be announced."""
        return self._producing._step

    @property
    def all_faults(self) -> int:
        faults = self._contain.faults + self._loop.contain.faults + self._control.faults
        return faults + self._consuming.faults + self._producing.faults


class SimulatedConnector(PdConnector):
    """``PdConnector`` in vLLM's scheduler; its workers are ``SimulatedWorker``s."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        KVConnectorBase_V1.__init__(self, vllm_config, role, kv_cache_config)
        site: Site = self._kv_transfer_config.kv_connector_extra_config["site"]
        self._scheduler = self.side = _SchedulerSide(site)
        self.update_failed = False
        self.receiving: set[RequestId] = set()
        end_abandoned_requests()
        free_blocks_once()
        room.mend()


class SimulatedWorker:
    """A rank: the real worker's half of the connector, over a table instead of a KV cache."""

    def __init__(
        self,
        site: Site,
        rank: int,
        table: KvTable,
        make_transport: Callable[[SimulatedLoop], SimulatedTransport],
    ) -> None:
        self.table = table
        self._side = WorkerSide(
            site.config,
            site.engine_id,
            RankPlace(0, rank, 1, site.shape.ranks),
            around=site.around,
        )
        loop = self._side._loop
        assert isinstance(loop, SimulatedLoop)
        self.transport = make_transport(loop)
        self.handshake: RankHandshake = self._side.register(
            self.transport, site.shape.layout, table.caches
        )

    def step(self, metadata: KVConnectorMetadata) -> None:
        assert isinstance(metadata, StepMetadata)
        self._side.step(metadata)

    def layer_written(self, layer: str) -> None:
        self._side.layer_written(layer)

    def forward_ended(self) -> None:
        self._side.forward_ended()

    def results(self) -> KVConnectorOutput:
        """Return what a worker of vLLM reports at the end of a step."""
        results = self._side.take_results()
        return KVConnectorOutput(
            finished_sending=results.finished_sending,
            finished_recving=results.finished_recving,
            failed_recving=results.failed_recving,
            kv_connector_stats=self._side.take_stats(),
            kv_connector_worker_meta=self._side.take_report(),
        )

    def what_is_open(self) -> dict[str, object]:
        """Return what is kept of fetches, by where."""
        plane, announcer = self._side._plane, self._side._announcer
        packer = announcer._packer
        peers = plane._peers
        incoming = peers._rank.local.incoming
        found: dict[str, object] = {
            "fetches": plane._fetches,
            "readings by address": peers._by_address,
            "readings by handoff": peers._by_handoff,
            "readings by taker": peers._by_taker,
            "alarms": plane._alarms._at,
            "successors": plane._successors,
            "marks": announcer._marks,
            "packed bytes": packer.taken_bytes if packer else 0,
            "bytes of pieces": incoming.room.staging.taken_bytes if incoming else 0,
            "reads": self.transport.num_open,
            "writes": self.transport.may_write,
            "results": self._side._results,
            "finished": self._side._finished,
            "failed": self._side._failed,
        }
        return {name: kept for name, kept in found.items() if kept}

    @property
    def all_faults(self) -> int:
        side = self._side
        faults = side._contain.faults + side._loop.contain.faults
        return faults + side._plane.faults + side._announcer.faults
