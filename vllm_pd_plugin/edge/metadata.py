"""What passes between the two halves of the connector inside one engine, each step."""

from __future__ import annotations

import dataclasses

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import Address, Incarnation, RequestId
from vllm_pd_plugin.mapping.kv_cache import EngineKvCache
from vllm_pd_plugin.memory.layout import RankLayout, RankMemory
from vllm_pd_plugin.memory.probe import Sums
from vllm_pd_plugin.transfer.announcer import Announcement
from vllm_pd_plugin.transfer.specs import FetchSpec


@dataclasses.dataclass(frozen=True, slots=True)
class StepMetadata(KVConnectorMetadata):
    """Scheduler to workers.

    fetches: to start. refused: never started; to be reported as failed receives.
    cancels: to end early, and why.
    released: producer requests whose blocks may be freed; to be reported as sent.
    lending: whether peers may be reading from this engine.
    announcement: set when this step computes KV that is to be handed off.
    control: the engine's own control channel, and its incarnation.
    """

    fetches: tuple[FetchSpec, ...]
    refused: tuple[RequestId, ...]
    cancels: dict[RequestId, Reason]
    released: tuple[RequestId, ...]
    lending: bool
    announcement: Announcement | None
    control: tuple[Address, Incarnation]


@dataclasses.dataclass(frozen=True, slots=True)
class FetchReport(KVConnectorWorkerMetadata):
    """Workers to scheduler: why fetches failed, how many of the prompt's first tokens have usable
    KV all the same, and which attempt it was; and of all, the token that the producer sampled, and
    the narrowest codec that their KV came through; and of which some blocks lack tokens
    (``FetchResult.lacks_tokens``)."""

    reasons: dict[RequestId, Reason]
    valid_tokens: dict[RequestId, int]
    attempts: dict[RequestId, int]
    sampled: dict[RequestId, int]
    codecs: dict[RequestId, Codec]
    lacking: set[RequestId] = dataclasses.field(default_factory=set)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> FetchReport:
        assert isinstance(other, FetchReport)
        valid, attempts = dict(other.valid_tokens), dict(other.attempts)
        for request_id, tokens in self.valid_tokens.items():
            valid[request_id] = min(tokens, valid.get(request_id, tokens))
        for request_id, attempt in self.attempts.items():
            attempts[request_id] = max(attempt, attempts.get(request_id, attempt))
        codecs = dict(other.codecs)
        for request_id, codec in self.codecs.items():
            codecs[request_id] = max(codec, codecs.get(request_id, codec), key=lambda c: c.rank)
        reasons, sampled = {**other.reasons, **self.reasons}, {**other.sampled, **self.sampled}
        lacking = self.lacking | other.lacking
        return FetchReport(reasons, valid, attempts, sampled, codecs, lacking)


@dataclasses.dataclass(frozen=True, slots=True)
class RankHandshake(KVConnectorHandshakeMetadata):
    """Worker to scheduler, once: this rank's memory and the layout that it saw.

    kv_cache: what it can say of its engine's.
    probe: its part of the sketch of what the engine computes; None where it has not computed it.
    """

    incarnation: Incarnation
    layout: RankLayout
    kv_cache: EngineKvCache
    memory: RankMemory
    probe: dict[str, Sums] | None = None
