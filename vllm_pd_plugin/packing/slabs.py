"""Per process: a rank's staging memory, and who uses which half of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.errors import UnsupportedError
from vllm_pd_plugin.memory.layout import RankLayout, Span
from vllm_pd_plugin.memory.regions import region_of
from vllm_pd_plugin.packing.coder import BlockCoder
from vllm_pd_plugin.packing.incoming import Incoming, Packing, Taker
from vllm_pd_plugin.packing.packer import Packer
from vllm_pd_plugin.packing.pieces import Pieces
from vllm_pd_plugin.packing.staging import ALIGNMENT, Room, Staging, max_piece_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Slabs:
    """Two halves: a shared one could be full of what two engines wait for from each other."""

    pieces: Pieces
    coder: BlockCoder
    outgoing: Span
    incoming: Span
    device: str
    """``cpu`` or ``cuda``."""

    @classmethod
    def allocate(
        cls, config: PdConfig, layout: RankLayout, caches: Sequence[torch.Tensor]
    ) -> Slabs | None:
        """Allocate what the configuration says, on the caches' device; None where that is nothing.

        On a CPU, memory that nothing was put into yet takes no room.

        Raises:
            UnsupportedError: a block does not fit in.
        """
        half = config.staging_bytes // 2 // ALIGNMENT * ALIGNMENT
        if not half:
            return None
        regions = tuple(map(region_of, layout.layers, caches))
        pieces = Pieces(layout, regions)
        _check_room(layout, pieces, half, config.narrowest)
        device = caches[0].device
        outgoing, incoming = (torch.empty(half, dtype=torch.uint8, device=device) for _ in range(2))
        coder = BlockCoder(layout, pieces, caches, outgoing, incoming)
        ours, theirs = (Span(t.data_ptr(), half) for t in (outgoing, incoming))
        return cls(pieces, coder, ours, theirs, device.type)

    def packer(self) -> Packer:
        return Packer(self.pieces, Staging(self.outgoing.num_bytes), self.coder)

    def for_reads(self, config: PdConfig) -> Incoming:
        """Return the half that fetches use. The lossy codecs that are allowed are tried on the
        cache, which must not be in use yet."""
        lossy = [c for c in Codec if 0 < c.rank <= config.narrowest.rank]
        coding: dict[Codec, float] = {codec: self.coder.speed(codec) for codec in lossy}
        room: Room[Taker] = Room(Staging(self.incoming.num_bytes))
        packing = Packing(config.packing or ("auto" if self.device == "cpu" else "never"))
        return Incoming(self.incoming, room, self.pieces, self.coder, packing, coding)


def _check_room(layout: RankLayout, pieces: Pieces, half: int, narrowest: Codec) -> None:
    """Refuse lossy codecs where not even one block of some layer fits; raw KV can be read as it
    lies."""
    if narrowest is Codec.RAW:
        return
    groups = [group for group in layout.groups for _ in group.layers]
    for layer, group in enumerate(groups):
        stretch = tuple(range(int(layer == other)) for other in range(len(groups)))
        needed = pieces.piece(stretch, group.block_tokens, Codec.INT8).num_bytes
        if needed > max_piece_bytes(half):
            raise UnsupportedError(
                f"staging_bytes={2 * half} is too small for a block of {layout.layers[layer]}; "
                f"use {8 * needed + 8 * ALIGNMENT} or more"
            )
