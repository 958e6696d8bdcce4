"""What goes to one peer in one turn goes together, in its order, if the peer understands that."""

from __future__ import annotations

import pytest

from tests.fakes.cluster import FakeCluster
from vllm_pd_plugin.containment import Containment
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.ids import HandoffId, Incarnation, new_handoff_id
from vllm_pd_plugin.protocol import framing, wire
from vllm_pd_plugin.protocol.outbox import Outbox, ReturnAddress

US, THEM = Incarnation("us"), Incarnation("them")
PEER, OTHER = ReturnAddress(b"peer", THEM), ReturnAddress(b"other", THEM)


class Sent:
    """An outbox, and what it has sent."""

    def __init__(self) -> None:
        self.messages: list[tuple[bytes, wire.Message]] = []
        self.contain = Containment("test")
        self.outbox = Outbox(US, self._send, self.contain)

    def _send(self, identity: bytes, frames: list[bytes]) -> None:
        if identity == b"gone":
            raise OSError("no such peer")
        self.messages.append((identity, framing.decode(frames)[1]))

    def flush(self) -> list[tuple[bytes, wire.Message]]:
        self.outbox.flush()
        said, self.messages = self.messages, []
        return said


@pytest.fixture
def sent() -> Sent:
    return Sent()


def refuse() -> wire.Refuse:
    return wire.Refuse(new_handoff_id(), Reason.CANCELLED)


def test_one_answer_goes_as_it_is(sent: Sent) -> None:
    one = refuse()
    sent.outbox.add(PEER, one)
    assert sent.flush() == [(b"peer", one)]
    assert sent.flush() == []


def test_answers_to_one_peer_go_together(sent: Sent) -> None:
    one, two, three = refuse(), refuse(), refuse()
    sent.outbox.add(PEER, one)
    sent.outbox.add(OTHER, two)
    sent.outbox.add(PEER, three)
    assert sent.flush() == [(b"peer", wire.Batch((one, three))), (b"other", two)]


def test_what_cannot_be_batched_keeps_its_place(sent: Sent) -> None:
    one, two, three = refuse(), refuse(), refuse()
    unstage = wire.Unstage(HandoffId("h" * 32))
    for message in (one, two, unstage, three):
        sent.outbox.add(PEER, message)
    assert sent.flush() == [
        (b"peer", wire.Batch((one, two))),
        (b"peer", unstage),
        (b"peer", three),
    ]


def test_a_batch_is_of_limited_length(sent: Sent) -> None:
    messages = [refuse() for _ in range(1000)]
    for message in messages:
        sent.outbox.add(PEER, message)
    batches = [message for _, message in sent.flush()]
    assert len(batches) == 4
    said = [m for batch in batches if isinstance(batch, wire.Batch) for m in batch.messages]
    assert said == messages


def test_a_peer_that_cannot_be_reached_costs_the_others_nothing(sent: Sent) -> None:
    one = refuse()
    sent.outbox.add(ReturnAddress(b"gone", THEM), refuse())
    sent.outbox.add(PEER, one)
    assert sent.flush() == [(b"peer", one)]
    assert sent.contain.faults == 1


def test_a_batch_that_cannot_be_sent_costs_one_answer_at_the_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent, failures = Sent(), iter([OSError("once")])

    def send(identity: bytes, frames: list[bytes]) -> None:
        if error := next(failures, None):
            raise error
        Sent._send(sent, identity, frames)

    monkeypatch.setattr(sent.outbox, "_send", send)
    one, two = refuse(), refuse()
    sent.outbox.add(PEER, one)
    sent.outbox.add(PEER, two)
    assert sent.flush() == [(b"peer", one), (b"peer", two)]


# --- at the peer -------------------------------------------------------------------------------


def test_a_batch_is_taken_in_answer_by_answer() -> None:
    cluster = FakeCluster()
    for name in ("a", "b"):
        source = cluster.producer.enqueue(f"p-{name}", 8)
        cluster.want(name, source)
    assert cluster.consumer.offered() == []
    for name in ("a", "b"):
        cluster.producer.control.open(cluster.producer.running[f"p-{name}"].source.handoff_id)
    assert [packet.kind for packet in cluster.network.in_flight] == ["batch"]
    cluster.settle()
    assert cluster.consumer.offered() == ["a", "b"]


def test_a_defect_in_taking_one_answer_of_a_batch_ends_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = FakeCluster()
    for name in ("a", "b"):
        cluster.want(name, cluster.producer.enqueue(f"p-{name}", 8))
    wanting = cluster.consumer.control._wanting
    offered = wanting._offered
    bad = cluster.producer.running["p-a"].source.handoff_id

    def broken(peer: object, offer: wire.Offer) -> None:
        if offer.handoff_id == bad:
            raise RuntimeError("a defect")
        offered(peer, offer)  # type: ignore[arg-type]

    monkeypatch.setattr(wanting, "_offered", broken)
    for name in ("a", "b"):
        cluster.producer.control.open(cluster.producer.running[f"p-{name}"].source.handoff_id)
    cluster.settle()
    assert cluster.consumer.offered() == ["b"]
    assert cluster.consumer.control.faults == 1


def test_what_follows_the_loss_of_a_peer_in_a_batch_is_void() -> None:
    cluster = FakeCluster()
    wanting = cluster.consumer.control._wanting
    for name in ("a", "b"):
        cluster.want(name, cluster.producer.enqueue(f"p-{name}", 8))
    peer = wanting._peers.get(cluster.producer_address)
    assert peer is not None
    told: list[wire.Message] = []

    def lose(_: object, message: wire.Message) -> None:
        told.append(message)
        gone = PeerError(Reason.PEER_UNREACHABLE, "gone")
        wanting._peers.drop(cluster.producer_address, gone)

    wanting.peer_replied = lose  # type: ignore[method-assign]
    for name in ("a", "b"):
        cluster.producer.control.open(cluster.producer.running[f"p-{name}"].source.handoff_id)
    cluster.settle()
    assert len(told) == 1
    assert set(cluster.consumer.lost()) == {"a", "b"}
