"""A packer of one rank, and what consumers want of it."""

from __future__ import annotations

import msgspec

from tests.fakes.coder import FakeCoder
from tests.fakes.engines import make_layout
from tests.fakes.memory import FakeMemory
from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import HandoffId, Incarnation
from vllm_pd_plugin.packing.packer import Packer
from vllm_pd_plugin.packing.pieces import Pieces
from vllm_pd_plugin.packing.staging import ALIGNMENT, Staging
from vllm_pd_plugin.protocol import wire

A, B, C = HandoffId("a"), HandoffId("b"), HandoffId("c")
LARGE = (wire.LayerRun(2, 0, 4),)
"""256 bytes."""
ROOM = 4 * ALIGNMENT
"""For four pieces of up to 256 bytes."""
TABLE = tuple(range(1, 9))


def unstage(handoff_id: HandoffId, number: int | None, consumer: str = "consumer") -> wire.Unstage:
    """What tells that rank 0 of a consumer does not need a piece any more, or nobody any of a
    handoff's."""
    if number is None:
        return wire.Unstage(handoff_id)
    return wire.Unstage(handoff_id, Incarnation(consumer), 0, number)


class Rank:
    """A packer, with two layers of KV to pack."""

    def __init__(self) -> None:
        layout = make_layout()
        self.memory = FakeMemory(layout)
        for block in TABLE:
            self.memory.fill([block], block)
        self.staging = Staging(ROOM)
        self.coder = FakeCoder(self.memory, ROOM)
        pieces = Pieces(layout, self.memory.regions)
        self.packer = Packer(pieces, self.staging, self.coder)

    def want(
        self, handoff_id: HandoffId, number: int, consumer: str = "consumer", **changes: object
    ) -> wire.Stage:
        """A consumer wants the first of two blocks in both layers, unless told."""
        runs = (wire.LayerRun(2, 0, 2),)
        pack = wire.Pack(handoff_id, 3, 0, 0, number, Codec.RAW, 8, runs, False)
        stage = wire.Stage(
            msgspec.structs.replace(pack, **changes), (TABLE,), Incarnation(consumer)
        )
        self.packer.stage(stage)
        return stage

    def packed(self) -> list[tuple[HandoffId, int]]:
        """Everything that can be written down now."""
        done = []
        while staged := self.packer.turn():
            assert staged.packed is not None
            done.append((staged.handoff_id, staged.packed.number))
        return done

    def refused(self) -> Reason | None:
        staged = self.packer.turn()
        assert staged is not None
        assert staged.packed is None
        return staged.reason
