"""A producer and a consumer, with messages and time that pass between them."""

from __future__ import annotations

from tests.fakes.clock import FakeClock
from tests.fakes.engines import STAGING_BYTES, FakeEngine, Settings, Surroundings, make_layout
from tests.fakes.network import FakeNetwork
from tests.fakes.transport import FakeFabric
from vllm_pd_plugin.ids import Address, Source, new_handoff_id, new_incarnation
from vllm_pd_plugin.memory.layout import RankLayout
from vllm_pd_plugin.packing.incoming import Packing
from vllm_pd_plugin.transfer.rank import Timeouts


class FakeCluster:
    """A producer and a consumer on one network, and the time they share."""

    producer_address: Address = ("127.0.0.1", 7001)
    consumer_address: Address = ("127.0.0.1", 7002)

    def __init__(
        self,
        lease_s: float = 30.0,
        queue_timeout_s: float = 600.0,
        timeouts: Timeouts | None = None,
        layout: RankLayout | None = None,
        checks_bytes: bool = False,
        packing: Packing | None = None,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        self.clock = FakeClock()
        self.network = FakeNetwork()
        self.fabric = FakeFabric()
        self._settings = Settings(
            lease_s,
            queue_timeout_s,
            timeouts or Timeouts(queue_s=600.0, read_s=60.0, drain_s=5.0),
            layout or make_layout(),
            checks_bytes,
            packing,
            staging_bytes,
        )
        self.producer = self._engine("producer", self.producer_address)
        self.consumer = self._engine("consumer", self.consumer_address)

    def restart_producer(self) -> FakeEngine:
        """Replace the producer by a new incarnation on the same address; return the old one."""
        old = self.producer
        old.kill()
        self.producer = self._engine("producer", self.producer_address)
        return old

    # --- messages and time

    def settle(self) -> None:
        """Deliver messages and drive the consumer until nothing happens any more."""
        self.consumer.turn()
        while self.network.deliver():
            self.producer.announcer.turn()
            self.consumer.turn()

    def settle_with_every_message_twice(self) -> None:
        while in_flight := self.network.in_flight:
            in_flight.insert(0, in_flight[0])
            self.network.deliver_one()
            self.network.deliver_one()
            self.producer.announcer.turn()
            self.consumer.turn()

    def deliver_until(self, kind: str) -> None:
        """Deliver one message after the other until one of a kind is under way."""
        while kind not in [packet.kind for packet in self.network.in_flight]:
            self.network.deliver_one()
            self.producer.announcer.turn()
            self.consumer.turn()

    def pass_time(self, seconds: float, step_s: float = 0.5) -> None:
        """Let time pass, with both engines awake."""
        for _ in range(round(seconds / step_s)):
            self.clock.advance(step_s)
            self.producer.turn()
            self.settle()

    # --- handoffs

    def unheard_of(self) -> Source:
        """A handoff whose request has not reached the producer."""
        return Source(new_handoff_id(), self.producer_address, self.producer.identity.incarnation)

    def invented(self) -> Source:
        """A handoff of an incarnation that never was."""
        return Source(new_handoff_id(), self.producer_address, new_incarnation())

    def want(self, request_id: str, source: Source) -> None:
        """The consumer asks for a handoff."""
        self.consumer.control.want(request_id, source)
        self.settle()

    def offer(self, request_id: str = "c") -> Source:
        """A sealed handoff, of the producer's ``p-<request_id>``, that the consumer wants and has
        been offered."""
        source = self.producer.produce(f"p-{request_id}", [1, 2], 8)
        self.want(request_id, source)
        assert request_id in self.consumer.offered()
        return source

    def cancel(self, request_id: str = "c") -> None:
        """The consumer gives up a handoff that it wanted."""
        self.consumer.control.close(request_id, cancel=True)
        self.settle()

    # --- inside

    def _engine(self, name: str, address: Address) -> FakeEngine:
        around = Surroundings(self.network, self.fabric, self.clock)
        return FakeEngine(name, address, around, self._settings)
