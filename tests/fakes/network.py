"""Messages between engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from vllm_pd_plugin.ids import Address
from vllm_pd_plugin.protocol import framing, wire


@dataclasses.dataclass(slots=True, eq=False)
class Packet:
    """A message under way; ``kind`` is the wire's tag, such as ``hello``.

    lane: the link and the direction; messages of one lane arrive in order, as over TCP.
    """

    kind: str
    lane: tuple[bytes, str]
    frames: list[bytes]
    deliver: Callable[[], None]

    @property
    def message(self) -> wire.Message:
        return framing.decode(self.frames)[1]


class FakeLink:
    """The connecting end, in place of ``channel.Dealer``."""

    def __init__(
        self,
        network: FakeNetwork,
        identity: bytes,
        address: Address,
        on_message: Callable[[list[bytes]], None],
    ) -> None:
        self._network = network
        self.identity = identity
        self.address = address
        self.on_message = on_message
        self.is_closed = False

    def send(self, frames: list[bytes]) -> None:
        assert not self.is_closed, "a message was sent on a closed link"
        self._network.post((self.identity, "there"), frames, lambda: self._arrive(frames))

    def close(self) -> None:
        assert not self.is_closed, "a link was closed twice"
        self.is_closed = True

    def _arrive(self, frames: list[bytes]) -> None:
        listener = self._network.listeners.get(self.address)
        if listener is not None:
            listener(self.identity, frames)


class FakeNetwork:
    """Addresses, and the messages between them; they queue up until ``deliver``.

    A message to an address where nobody listens is lost. A link outlives its peer, as ZeroMQ's
    does: what is sent after a restart reaches whoever listens then.
    """

    def __init__(self) -> None:
        self.listeners: dict[Address, Callable[[bytes, list[bytes]], None]] = {}
        self.links: dict[bytes, FakeLink] = {}
        self.senders: list[Callable[[], None]] = []
        """Of each engine: what has gathered in its turn is sent."""
        self._in_flight: list[Packet] = []
        self.delivered: list[str] = []

    @property
    def in_flight(self) -> list[Packet]:
        """Messages that are under way, once everybody's turn has ended."""
        for send in self.senders:
            send()
        return self._in_flight

    @in_flight.setter
    def in_flight(self, packets: list[Packet]) -> None:
        self._in_flight = packets

    def listen(self, address: Address, receive: Callable[[bytes, list[bytes]], None]) -> None:
        assert address not in self.listeners, f"{address} is in use"
        self.listeners[address] = receive

    def silence(self, address: Address) -> None:
        """From now on nobody listens there."""
        del self.listeners[address]

    def connect(self, address: Address, on_message: Callable[[list[bytes]], None]) -> FakeLink:
        """Stand in for ``peers.Connect``."""
        identity = f"link-{len(self.links)}".encode()
        link = self.links[identity] = FakeLink(self, identity, address, on_message)
        return link

    def answer(self, identity: bytes, frames: list[bytes]) -> None:
        """Stand in for ``channel.Listener.send``."""
        self.post((identity, "back"), frames, lambda: self._arrive(identity, frames))

    def post(
        self, lane: tuple[bytes, str], frames: list[bytes], deliver: Callable[[], None]
    ) -> None:
        header, _ = framing.decode(frames)
        self._in_flight.append(Packet(header.kind, lane, frames, deliver))

    def deliver_one(self, index: int = 0) -> None:
        packet = self.in_flight.pop(index)
        self.delivered.append(packet.kind)
        packet.deliver()

    def deliver(self) -> int:
        """Deliver everything, answers to it included; return how many messages that was."""
        count = 0
        while self.in_flight:
            self.deliver_one()
            count += 1
            assert count < 10_000, "the messages never end"
        return count

    def deliver_kind(self, kind: str) -> None:
        """Deliver the first message of a kind, before all others that are under way."""
        kinds = [packet.kind for packet in self.in_flight]
        self.deliver_one(kinds.index(kind))

    def under_way(self, kind: str) -> list[wire.Message]:
        return [packet.message for packet in self.in_flight if packet.kind == kind]

    def next_of_each_lane(self) -> list[Packet]:
        """What may arrive next: the first of each lane."""
        first: dict[tuple[bytes, str], Packet] = {}
        for packet in self.in_flight:
            first.setdefault(packet.lane, packet)
        return list(first.values())

    def lose(self, kind: str) -> int:
        """Drop every message of a kind that is under way; return how many."""
        kept = [packet for packet in self.in_flight if packet.kind != kind]
        lost, self.in_flight = len(self.in_flight) - len(kept), kept
        return lost

    def duplicate(self, kind: str) -> int:
        """Send every message of a kind that is under way once more, at the end of the queue."""
        copies = [packet for packet in self.in_flight if packet.kind == kind]
        self.in_flight += copies
        return len(copies)

    def open_links(self, address: Address) -> int:
        links = self.links.values()
        return sum(link.address == address and not link.is_closed for link in links)

    def _arrive(self, identity: bytes, frames: list[bytes]) -> None:
        link = self.links[identity]
        if not link.is_closed:
            link.on_message(frames)
