"""Two engines of which one fetches what the other has computed."""

from __future__ import annotations

from collections.abc import Sequence

from tests.fakes.clock import rests
from tests.fakes.cluster import FakeCluster
from vllm_pd_plugin.ids import Source
from vllm_pd_plugin.packing.incoming import Packing
from vllm_pd_plugin.transfer.rank import Timeouts

TOKENS = 8
THERE, HERE = [3, 4], [7, 9]
KV, EMPTY = 0x11, 0x00
LEASE_S = 30.0
QUEUE_S, READ_S, DRAIN_S = 100.0, 60.0, 5.0


class FetchingCluster(FakeCluster):
    """The producer has ``KV`` in its blocks ``THERE``; the consumer wants it in ``HERE``."""

    def __init__(self, packing: Packing | None = None) -> None:
        timeouts = Timeouts(QUEUE_S, READ_S, DRAIN_S)
        super().__init__(lease_s=LEASE_S, timeouts=timeouts, packing=packing)
        self.producer.fill(THERE, KV)

    def sealed(self, request_id: str = "p") -> Source:
        return self.producer.produce(request_id, THERE, TOKENS)

    def start(
        self, request_id: str = "c", source: Source | None = None, blocks: Sequence[int] = HERE
    ) -> Source:
        """Start a fetch, of a sealed handoff ``p-<request_id>`` unless another is given."""
        source = source or self.sealed(f"p-{request_id}")
        self.consumer.fetch(request_id, source, blocks, TOKENS)
        return source

    def start_reading(self, request_id: str = "c", source: Source | None = None) -> Source:
        """Start a fetch whose read is posted and does not end by itself."""
        self.consumer.transport.holds_reads = True
        source = self.start(request_id, source)
        self.settle()
        assert not self.consumer.is_reported(request_id)
        assert self.consumer.transport.unfinished
        return source

    def start_committing(self, request_id: str = "c") -> Source:
        """Start a fetch whose read has ended, and whose commit is under way."""
        source = self.start_reading(request_id)
        self.consumer.transport.finish_reads()
        self.consumer.look_at_reads()
        assert [packet.kind for packet in self.network.in_flight] == ["commit"]
        return source

    def consumer_is_idle(self) -> bool:
        """Whether its transfer plane has nothing left to do."""
        return rests(self.consumer.plane.turn()) and not self.consumer.transport.reads
