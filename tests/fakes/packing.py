"""Two engines of which one packs what the other fetches while it is computed."""

from __future__ import annotations

from tests.fakes.engines import STAGING_BYTES
from tests.fakes.streaming import HERE, PROMPT, THERE, TOKENS, StreamingCluster
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import Source
from vllm_pd_plugin.packing.incoming import Packing

GIVEN_BACK = 0xDD


class PackingCluster(StreamingCluster):
    """Every read is of a packed piece; the consumer's scheduler knows of its fetch, and tells the
    producer when it is over."""

    def __init__(self, checks_bytes: bool = False, staging_bytes: int = STAGING_BYTES) -> None:
        super().__init__(
            checks_bytes=checks_bytes, packing=Packing.ALWAYS, staging_bytes=staging_bytes
        )

    def start(self, first_token: int = 0) -> Source:
        source = self.producer.begin("p", TOKENS)
        self.want("c", source)
        self.consumer.control.allocated("c")
        self.consumer.fetch("c", source, HERE, TOKENS, first_token)
        return source

    def start_and_compute(self) -> None:
        """A fetch of a prompt that is computed in two steps."""
        self.start()
        for end in (TOKENS // 2, TOKENS):
            self.compute(range(end - TOKENS // 2, end))
            self.settle()

    def start_packing(self, until: str) -> None:
        """A fetch of a prompt that is complete, until a message of a kind is under way."""
        self.start()
        self.settle()
        self.compute(range(TOKENS))
        self.deliver_until(until)

    def step(self) -> bool:
        """Deliver a message, and let both sides do what follows; False when there is none."""
        if not self.network.in_flight:
            return False
        self.network.deliver_one()
        self.producer.announcer.turn()
        self.consumer.turn()
        return True

    def go_on(self, num_messages: int) -> None:
        """Deliver some of the messages of a fetch whose prompt is computed in two chunks."""
        computed = 0
        for _ in range(num_messages):
            if not self.step() and computed < TOKENS:
                self.compute(range(computed, computed + TOKENS // 2))
                computed += TOKENS // 2
        self.computed = computed

    def abort(self) -> None:
        """The consumer does not want it any more, wherever it has got to."""
        self.consumer.plane.cancel("c", Reason.ABORTED)
        self.close()

    def close(self) -> None:
        """The consumer's scheduler is done with it."""
        reported = self.consumer.is_reported("c")
        is_good = reported and self.consumer.outcome("c") is None
        self.consumer.control.close("c", cancel=not is_good)

    def finish(self) -> None:
        """The consumer's reads end, and the producer's request does."""
        transport = self.consumer.transport
        transport.holds_reads = False
        transport.finish_reads()
        self.settle()
        if "p" in self.producer.running:
            self.producer.seal("p", THERE) if self.is_computed else self.producer.drop("p")
        self.settle()

    @property
    def is_computed(self) -> bool:
        return self.producer.holds_kv(PROMPT, (THERE,), TOKENS)

    def staged_bytes(self) -> dict[str, int]:
        """What is taken of each engine's staging memory."""
        return {
            f"{name} {half}": getattr(engine, half).taken_bytes
            for name, engine in (("producer", self.producer), ("consumer", self.consumer))
            for half in ("outgoing", "incoming")
        }

    def is_empty(self) -> bool:
        return not any(self.staged_bytes().values())
