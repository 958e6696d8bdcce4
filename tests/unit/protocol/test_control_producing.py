"""The control plane of a producer: what it tells its consumers, its own workers and strangers."""

from __future__ import annotations

import msgspec
import pytest

from tests.fakes.cluster import FakeCluster
from tests.fakes.engines import FakeEngine
from tests.fakes.producer import progress
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import Incarnation, Source, new_handoff_id, new_incarnation
from vllm_pd_plugin.protocol import framing, wire
from vllm_pd_plugin.protocol.events import Released
from vllm_pd_plugin.protocol.export_states import ExportState

LEASE_S = 8.0


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(lease_s=LEASE_S)


def ask(cluster: FakeCluster, message: wire.Message, target: Incarnation) -> list[wire.Message]:
    """Send to the producer as a stranger would; return what it answers at once."""
    sender = new_incarnation()
    answers: list[wire.Message] = []

    def take(frames: list[bytes]) -> None:
        header, reply = framing.decode(frames)
        assert header.target == sender
        assert header.sender == cluster.producer.identity.incarnation
        answers.append(reply)

    link = cluster.network.connect(cluster.producer_address, take)
    link.send(framing.encode(message, sender, target))
    cluster.network.deliver()
    return answers


def receive(engine: FakeEngine, frames: list[bytes]) -> None:
    engine.control.receive(b"stranger", frames)


# --- endings ---------------------------------------------------------------------------------


def test_a_request_that_ends_without_kv_tells_who_has_been_waiting(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", 8)
    subscribe = wire.Subscribe(source.handoff_id, 0, 1, (0,))
    (answer,) = ask(cluster, subscribe, cluster.producer.identity.incarnation)
    assert answer == progress(source.handoff_id, 0, 0, 0, 0, (wire.TableSlice(0, ()),))
    cluster.producer.control.drop(source.handoff_id)
    (packet,) = cluster.network.in_flight
    assert packet.message == wire.Refuse(source.handoff_id, Reason.PRODUCER_ENDED)


def test_the_seal_tells_who_has_been_waiting(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", 8)
    target = cluster.producer.identity.incarnation
    ask(cluster, wire.Subscribe(source.handoff_id, 0, 1, (0,)), target)
    cluster.producer.control.seal(source.handoff_id, "p", 8, ([3, 4],))
    (packet,) = cluster.network.in_flight
    expected = wire.Seal(source.handoff_id, 0, 8, (wire.TableSlice(0, (3, 4)),))
    assert packet.message == expected


# --- announcements of this engine's own workers ----------------------------------------------


def subscribed(cluster: FakeCluster) -> tuple[Source, list[wire.Message]]:
    """A handoff that is being produced, and what one rank of a consumer is told from then on."""
    source = cluster.producer.begin("p", 8)
    told: list[wire.Message] = []
    link = cluster.network.connect(
        cluster.producer_address, lambda frames: told.append(framing.decode(frames)[1])
    )
    subscribe = wire.Subscribe(source.handoff_id, 0, 1, (0,))
    target = cluster.producer.identity.incarnation
    link.send(framing.encode(subscribe, new_incarnation(), target))
    cluster.network.deliver()
    assert len(told) == 1
    told.clear()
    return source, told


def test_what_a_worker_announces_is_told_to_who_subscribed(cluster: FakeCluster) -> None:
    source, told = subscribed(cluster)
    step = cluster.producer.advance("p", 8, [3, 4])
    cluster.network.deliver()
    assert told == []
    cluster.producer.announce(step, num_layers=1)
    cluster.producer.announce(step, num_layers=2)
    cluster.network.deliver()
    first, second = (wire.TableSlice(0, (3, 4)),), (wire.TableSlice(2, ()),)
    assert told == [
        progress(source.handoff_id, 0, 0, 8, 1, first),
        progress(source.handoff_id, 0, 8, 8, 2, second),
    ]
    assert cluster.producer.control.dropped_messages == 0


@pytest.mark.parametrize("sender", ["stranger", "consumer", "the engine itself"])
def test_an_announcement_of_anybody_else_is_dropped_and_counted(
    cluster: FakeCluster, sender: str
) -> None:
    _, told = subscribed(cluster)
    step = cluster.producer.advance("p", 8, [3, 4])
    incarnation = {
        "stranger": new_incarnation(),
        "consumer": cluster.consumer.worker.incarnation,
        "the engine itself": cluster.producer.identity.incarnation,
    }[sender]
    frames = framing.encode(
        wire.Announce(step, 0, 2), incarnation, cluster.producer.identity.incarnation
    )
    receive(cluster.producer, frames)
    cluster.network.deliver()
    assert told == []
    assert cluster.producer.control.dropped_messages == 1


def test_an_announcement_to_the_incarnation_before_is_ignored(cluster: FakeCluster) -> None:
    subscribed(cluster)
    step = cluster.producer.advance("p", 8, [3, 4])
    announce = wire.Announce(step, 0, 2)
    frames = framing.encode(announce, cluster.producer.worker.incarnation, new_incarnation())
    receive(cluster.producer, frames)
    (packet,) = cluster.network.in_flight
    assert packet.message == wire.Alive({})


def test_a_preemption_is_told_to_who_subscribed(cluster: FakeCluster) -> None:
    source, told = subscribed(cluster)
    cluster.producer.compute("p", 8, [3, 4])
    cluster.network.deliver()
    told.clear()
    cluster.producer.preempt("p")
    cluster.network.deliver()
    void = progress(source.handoff_id, 1, 0, 0, 0, (wire.TableSlice(0, ()),))
    assert told == [void]


# --- commits and strangers -------------------------------------------------------------------


def test_a_commit_to_the_incarnation_before_commits_nothing(cluster: FakeCluster) -> None:
    source = cluster.producer.produce("p", [1], 4)
    answers = ask(cluster, wire.Commit(source.handoff_id, 0, 0, True), new_incarnation())
    assert answers == [wire.Alive({})]
    assert cluster.producer.events == []


def test_a_commit_is_granted_and_the_blocks_released(cluster: FakeCluster) -> None:
    source = cluster.producer.produce("p", [1], 4)
    target = cluster.producer.identity.incarnation
    ask(cluster, wire.Subscribe(source.handoff_id, 0, 1, (0,)), target)
    answers = ask(cluster, wire.Commit(source.handoff_id, 0, 0, True), target)
    assert answers == [wire.Committed(source.handoff_id, 0, True)]
    assert cluster.producer.events == [Released("p", ExportState.COMMITTED)]


def test_a_hello_needs_no_target(cluster: FakeCluster) -> None:
    (welcome,) = ask(cluster, wire.Hello("stranger"), Incarnation(""))
    assert isinstance(welcome, wire.Welcome)
    assert welcome.lease_s == LEASE_S
    assert welcome.kv_cache.layers_of(0) == cluster.producer.layout.layers


def test_rubbish_is_counted_and_not_answered(cluster: FakeCluster) -> None:
    receive(cluster.producer, [b"rubbish"])
    assert cluster.producer.control.dropped_messages == 1
    assert cluster.network.in_flight == []


def test_what_only_a_producer_says_is_counted_and_not_answered(cluster: FakeCluster) -> None:
    target = cluster.producer.identity.incarnation
    assert ask(cluster, wire.Alive({}), target) == []
    assert ask(cluster, wire.Committed(new_handoff_id(), 0, True), target) == []
    assert cluster.producer.control.dropped_messages == 2


def test_a_peer_of_another_version_is_told_ours(cluster: FakeCluster) -> None:
    answers: list[framing.Header] = []
    link = cluster.network.connect(
        cluster.producer_address, lambda frames: answers.append(framing.decode(frames)[0])
    )
    header = msgspec.msgpack.encode([99, "greeting", new_incarnation(), ""])
    cluster.producer.control.receive(link.identity, [header, b""])
    cluster.network.deliver()
    assert [answer.version for answer in answers] == [framing.PROTOCOL_VERSION]
    assert cluster.producer.control.dropped_messages == 1
