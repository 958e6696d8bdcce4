"""An export whose owner fails in one thing that follows from its end."""

from __future__ import annotations

from tests.fakes.producer import Producer
from vllm_pd_plugin.protocol.export_states import ExportState


def test_blocks_are_freed_though_what_was_packed_of_them_cannot_be_let_go() -> None:
    producer = Producer()

    def fail(*_: object) -> None:
        raise RuntimeError("no")

    producer.table._on_unpacked = fail
    handoff = producer.sealed()
    producer.table._held[handoff].packing_ranks.add(0)
    producer.answering.cancel(handoff)
    assert producer.released == [("r", ExportState.CANCELLED)]
    assert producer.table.faults == 1
