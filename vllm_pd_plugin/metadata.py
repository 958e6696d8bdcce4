"""What passes between the two halves of the connector inside one engine, each step."""

from __future__ import annotations

import dataclasses

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.handoffs import FetchSpec
from vllm_pd_plugin.ids import RequestId
from vllm_pd_plugin.layout import EngineLayout, RankMemory


@dataclasses.dataclass(frozen=True, slots=True)
class StepMetadata(KVConnectorMetadata):
    """Scheduler to workers.

    fetches: to start. refused: never started; to be reported as failed receives.
    cancels: to end early, and why.
    released: producer requests whose blocks may be freed; to be reported as sent.
    serving: whether peers may be reading from this engine.
    """

    fetches: tuple[FetchSpec, ...]
    refused: tuple[RequestId, ...]
    cancels: dict[RequestId, Reason]
    released: tuple[RequestId, ...]
    serving: bool


@dataclasses.dataclass(frozen=True, slots=True)
class FetchFailures(KVConnectorWorkerMetadata):
    """Workers to scheduler: why fetches failed."""

    reasons: dict[RequestId, Reason]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> FetchFailures:
        assert isinstance(other, FetchFailures)
        return FetchFailures({**other.reasons, **self.reasons})


@dataclasses.dataclass(frozen=True, slots=True)
class RankHandshake(KVConnectorHandshakeMetadata):
    """Worker to scheduler, once: this rank's memory and the layout that it saw."""

    layout: EngineLayout
    memory: RankMemory
