"""What all fetches of one rank share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from vllm_pd_plugin.mapping.kv_cache import EngineKvCache
from vllm_pd_plugin.memory.layout import BlockTables, RankLayout, Region
from vllm_pd_plugin.net.transport import Transport
from vllm_pd_plugin.packing.incoming import Incoming

Digest = Callable[[BlockTables, int, int], bytes]
"""Tells the bytes of the KV in these blocks, from one token up to another; see ``kv_digest``."""


@dataclasses.dataclass(frozen=True, slots=True)
class LocalRank:
    """Which rank of its engine this is, and its memory.

    kv_cache: what this rank can say of its engine's.
    incoming: None where nothing can be packed.
    allow_fp8: see ``PdConfig``.
    """

    rank: int
    layout: RankLayout
    kv_cache: EngineKvCache
    regions: tuple[Region, ...]
    incoming: Incoming | None
    allow_fp8: bool = False


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
