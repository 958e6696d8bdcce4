"""What an engine's scheduler is told by its control plane."""

from __future__ import annotations

import dataclasses

from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import RequestId, Source
from vllm_pd_plugin.protocol.export_states import ExportState


@dataclasses.dataclass(frozen=True, slots=True)
class Offered:
    """A producer offers what this engine wants; ``source`` names its incarnation."""

    request_id: RequestId
    source: Source
    num_tokens: int
    prompt: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Lost:
    """What this engine wants cannot be had. source: whence; None where that makes no odds."""

    request_id: RequestId
    reason: Reason
    message: str
    source: Source | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Released:
    """What a request of this engine has sealed is over; its blocks may be freed."""

    request_id: RequestId
    state: ExportState


@dataclasses.dataclass(frozen=True, slots=True)
class Abandoned:
    """Nobody wants what a request of this engine is computing."""

    request_id: RequestId
    state: ExportState


@dataclasses.dataclass(frozen=True, slots=True)
class Nudged:
    """A worker of this engine has a result."""


Event = Offered | Lost | Released | Abandoned | Nudged
