"""One read of a fetch, posted or still to be, and what one is made of."""

from __future__ import annotations

import dataclasses

from vllm_pd_plugin.memory.layout import Stretch
from vllm_pd_plugin.net.transport import ReadHandle, ReadPlan
from vllm_pd_plugin.packing.packer import Coding
from vllm_pd_plugin.packing.pieces import Piece
from vllm_pd_plugin.protocol import wire


@dataclasses.dataclass(slots=True, eq=False)
class Read:
    """One read, posted or still to be.

    is_void: nobody wants it any more.
    handle: None while the producer packs it.
    coding: the piece is on its way from the staging memory into the cache.
    prefix_tokens: ``Stretches.taken_tokens`` once it has arrived.
    descriptor_bytes: how long the runs of blocks are on average.
    """

    prefix_tokens: int
    descriptor_bytes: float
    began_at: float
    num_bytes: int
    kv_bytes: int
    is_void: bool = False
    handle: ReadHandle | None = None
    coding: Coding | None = None
    pack: wire.Pack | None = None
    asked_at: float = 0.0
    posted_at: float = 0.0
    piece: Piece | None = None
    number: int = 0
    offset: int = 0
    digest: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True)
class ToPack:
    """A piece that is to be asked for, as soon as there is room; see ``Read``."""

    stretch: Stretch
    prefix_tokens: int
    descriptor_bytes: float


@dataclasses.dataclass(frozen=True, slots=True)
class ToPlan:
    """Blocks that are to be read as they lie."""

    stretch: Stretch
    prefix_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class ToRead:
    """The same, planned."""

    plan: ReadPlan
    prefix_tokens: int
