"""One read of a fetch, posted or still to be, and what one is made of."""

from __future__ import annotations

import dataclasses

from vllm_pd_plugin.mapping.match import Share
from vllm_pd_plugin.memory.layout import Stretch
from vllm_pd_plugin.net.transport import ReadHandle, ReadPlan
from vllm_pd_plugin.packing.packer import Coding
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.transfer.asked import Asked


@dataclasses.dataclass(slots=True, eq=False)
class Read:
    """One read, posted or still to be.

    source_rank: whose memory is read.
    asked: the piece that it is of; None where blocks are read as they lie.
    message: what asks for it.
    is_void: nobody wants it any more.
    handle: None while the producer packs it.
    coding: the piece is on its way from the staging memory into the cache.
    prefix_tokens: ``Stretches.taken_tokens`` once it has arrived.
    descriptor_bytes: how long the runs of blocks are on average.
    """

    source_rank: int
    prefix_tokens: int
    descriptor_bytes: float
    began_at: float
    num_bytes: int
    kv_bytes: int
    asked: Asked | None = None
    message: wire.Pack | wire.Gather | None = None
    is_void: bool = False
    handle: ReadHandle | None = None
    coding: Coding | None = None
    asked_at: float = 0.0
    posted_at: float = 0.0
    number: int = 0
    offset: int = 0
    digest: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True)
class ToPack:
    """A piece that is to be asked for, as soon as there is room; see ``Read``."""

    asked: Asked
    descriptor_bytes: float
    prefix_tokens: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class ToPlan:
    """What is to be read as it lies: of a stretch some shares."""

    stretch: Stretch
    shares: tuple[Share, ...]
    prefix_tokens: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class ToRead:
    """The same, planned."""

    source_rank: int
    plan: ReadPlan
    prefix_tokens: int = 0


Pending = ToPack | ToPlan | ToRead
