"""What all fetches of one tensor parallel rank share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from vllm_pd_plugin.memory.layout import EngineLayout, Region
from vllm_pd_plugin.net.transport import Transport
from vllm_pd_plugin.packing.incoming import Incoming
from vllm_pd_plugin.transfer.plan import Digest


@dataclasses.dataclass(frozen=True, slots=True)
class LocalRank:
    """Which tensor parallel rank this is, and its memory.

    incoming: None where nothing can be packed.
    """

    rank: int
    layout: EngineLayout
    regions: tuple[Region, ...]
    incoming: Incoming | None


@dataclasses.dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a fetch may take.

    queue_s: until the producer has computed everything.
    read_s: for one read, and from the last read to the commit.
    drain_s: how long a failed fetch waits for its reads before the connection is closed.
    """

    queue_s: float
    read_s: float
    drain_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Rank:
    """What all fetches of one rank share.

    digest: compares what was read with what the producer holds; None relies on the commit alone.
    """

    local: LocalRank
    transport: Transport
    timeouts: Timeouts
    clock: Callable[[], float]
    digest: Digest | None
