"""Two engines of which one computes a prompt while the other fetches it."""

from __future__ import annotations

from tests.fakes.cluster import FakeCluster
from tests.fakes.engines import STAGING_BYTES
from tests.fakes.memory import kv_of
from vllm_pd_plugin.ids import Source
from vllm_pd_plugin.memory.layout import RankLayout
from vllm_pd_plugin.packing.incoming import Packing
from vllm_pd_plugin.transfer.rank import Timeouts

TOKENS = 16
PROMPT, ANOTHER = 1, 2
THERE, ELSEWHERE = [3, 4, 5, 6], [13, 14, 15, 16]
HERE = [7, 9, 11, 13]
LEASE_S = 30.0
TIMEOUTS = Timeouts(queue_s=100.0, read_s=60.0, drain_s=5.0)
VOUCH_S = 0.75
"""Rather longer than a fetch waits before it asks whether what has arrived is valid."""


class StreamingCluster(FakeCluster):
    """The producer computes ``PROMPT`` for its request ``p``, and the consumer fetches it to
    ``HERE`` for its request ``c``."""

    def __init__(
        self,
        layout: RankLayout | None = None,
        checks_bytes: bool = False,
        packing: Packing | None = None,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        super().__init__(
            lease_s=LEASE_S,
            timeouts=TIMEOUTS,
            layout=layout,
            checks_bytes=checks_bytes,
            packing=packing,
            staging_bytes=staging_bytes,
        )

    # --- at the producer

    def compute(
        self, tokens: range, blocks: list[int] = THERE, num_layers: int | None = None
    ) -> int:
        """A step: some layers are written and announced, and no message is delivered.

        Returns the step.
        """
        step = self.producer.advance("p", tokens.stop, blocks)
        self.write(step, tokens, blocks, num_layers or self.producer.num_layers)
        return step

    def write(self, step: int, tokens: range, blocks: list[int], num_layers: int) -> None:
        for layer in self.producer.layout.forward_order()[:num_layers]:
            self.producer.write_kv(PROMPT, (blocks,), tokens, layer)
        self.producer.announce(step, num_layers)

    def overwrite(self) -> None:
        """Another request computes in the blocks that were given back."""
        for layer in range(self.producer.num_layers):
            self.producer.write_kv(ANOTHER, (THERE,), range(TOKENS), layer)

    def preempt_unheard(self) -> None:
        """A preemption, and the first step after it; the consumer hears of neither."""
        self.producer.preempt("p")
        self.overwrite()
        assert self.network.lose("progress") == 1
        self.compute(range(4), blocks=ELSEWHERE[:1])
        self.network.deliver_kind("announce")
        assert self.network.lose("progress") == 1

    # --- at the consumer

    def start(self, first_token: int = 0) -> Source:
        """A fetch of a prompt whose first token is still to be computed."""
        source = self.producer.begin("p", TOKENS)
        self.consumer.fetch("c", source, HERE, TOKENS, first_token)
        self.settle()
        return source

    def start_reading(self) -> Source:
        """A fetch whose reads do not end by themselves, of a prompt that is complete."""
        self.consumer.transport.holds_reads = True
        source = self.start()
        self.compute(range(TOKENS))
        self.settle()
        assert self.consumer.transport.unfinished
        return source

    def finish_reads_too_late(self) -> None:
        """The reads that are under way end when the bytes are another's."""
        self.overwrite()
        self.consumer.transport.finish_reads()
        self.consumer.transport.holds_reads = False

    def has_arrived(self, num_tokens: int = TOKENS) -> bool:
        return self.consumer.holds_kv(PROMPT, (HERE,), num_tokens)

    def holds_stale_bytes(self) -> bool:
        """Whether the consumer has KV of another prompt where its own should be."""
        stale = kv_of(ANOTHER, self.consumer.num_layers, TOKENS)
        return any(
            bool((self.consumer.kv_in(layer, HERE) == stale[layer]).all(axis=1).any())
            for layer in range(self.consumer.num_layers)
        )
