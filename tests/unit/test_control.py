from __future__ import annotations

import dataclasses

import msgspec
import pytest

from tests.fakes.engines import FakeCluster, FakeEngine
from vllm_pd_plugin import wire
from vllm_pd_plugin.control import Abandoned, Lost, Offered, Released
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import Incarnation, Source, new_handoff_id, new_incarnation
from vllm_pd_plugin.produced import ProducerState

LEASE_S = 8.0
TIMEOUT_S = 5.0
QUEUE_S = 40.0


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(lease_s=LEASE_S, queue_timeout_s=QUEUE_S)


def offered(cluster: FakeCluster, request_id: str = "c") -> Source:
    """A sealed handoff that the consumer wants and has been offered."""
    source = cluster.producer.produce(f"p-{request_id}", [1, 2], 8)
    cluster.consumer.control.want(request_id, source)
    cluster.settle()
    assert request_id in cluster.consumer.offered()
    return source


def unheard_of(cluster: FakeCluster) -> Source:
    """A handoff whose request has not reached the producer."""
    incarnation = cluster.producer.identity.incarnation
    return Source(new_handoff_id(), cluster.producer_address, incarnation)


def ask(cluster: FakeCluster, message: wire.Message, target: Incarnation) -> list[wire.Message]:
    """Send to the producer as a stranger would; return what it answers at once."""
    sender = new_incarnation()
    answers: list[wire.Message] = []

    def take(frames: list[bytes]) -> None:
        header, reply = wire.decode(frames)
        assert header.target == sender
        assert header.sender == cluster.producer.identity.incarnation
        answers.append(reply)

    link = cluster.network.connect(cluster.producer_address, take)
    link.send(wire.encode(message, sender, target))
    cluster.network.deliver()
    return answers


def wanted_and_produced(engine: FakeEngine) -> tuple[int, int]:
    known = engine.open_handoffs()
    return known["consumer"], known["producer"]


# --- wanting ---------------------------------------------------------------------------------


def test_what_is_wanted_is_offered_while_prefill_still_runs(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", 8)
    cluster.consumer.control.want("c", source)
    cluster.settle()
    assert cluster.consumer.events == [Offered("c", source, 8, b"digest")]


def test_what_is_wanted_before_it_is_scheduled_is_offered_when_it_is(
    cluster: FakeCluster,
) -> None:
    source = cluster.producer.enqueue("p", 8)
    cluster.consumer.control.want("c", source)
    cluster.pass_time(2 * LEASE_S)  # in the queue for as long as the consumer asks for it
    assert cluster.consumer.events == []
    assert cluster.producer.events == []
    cluster.producer.control.open(source.handoff_id)
    cluster.settle()
    assert cluster.consumer.events == [Offered("c", source, 8, b"digest")]


def test_a_consumer_may_ask_before_the_producer_has_its_request(cluster: FakeCluster) -> None:
    source = unheard_of(cluster)
    cluster.consumer.control.want("c", source)
    cluster.pass_time(LEASE_S - 1)
    assert cluster.consumer.events == []
    cluster.producer.enqueue("p", 8, source.handoff_id)
    cluster.producer.control.open(source.handoff_id)
    cluster.settle()
    assert cluster.consumer.events == [Offered("c", source, 8, b"digest")]


def test_a_consumer_need_not_know_the_producer_s_incarnation(cluster: FakeCluster) -> None:
    known = cluster.producer.begin("p", 8)
    cluster.consumer.control.want("c", dataclasses.replace(known, incarnation=None))
    cluster.settle()
    assert cluster.consumer.events == [Offered("c", known, 8, b"digest")]
    cluster.consumer.control.want(
        "d", dataclasses.replace(cluster.producer.begin("q", 8), incarnation=None)
    )
    cluster.settle()
    assert cluster.consumer.offered() == ["c", "d"]


def test_many_wants_of_one_peer_share_one_connection(cluster: FakeCluster) -> None:
    for request_id in "abc":
        offered(cluster, request_id)
    assert cluster.network.open_links(cluster.producer_address) == 1
    assert cluster.network.delivered.count("hello") == 1


def test_wants_that_wait_for_the_introduction_are_all_sent_after_it(cluster: FakeCluster) -> None:
    for request_id in "abc":
        source = cluster.producer.begin(f"p-{request_id}", 8)
        cluster.consumer.control.want(request_id, source)
    cluster.settle()
    assert cluster.consumer.offered() == ["a", "b", "c"]
    assert cluster.network.delivered.count("want") == 3


def test_a_handoff_that_the_producer_does_not_hear_of_within_a_lease_is_lost(
    cluster: FakeCluster,
) -> None:
    cluster.consumer.control.want("c", unheard_of(cluster))
    cluster.settle()
    cluster.pass_time(LEASE_S - 1)
    assert cluster.consumer.lost() == {}
    cluster.pass_time(2)
    assert cluster.consumer.lost() == {"c": Reason.UNKNOWN_HANDOFF}
    assert set(cluster.producer.open_handoffs().values()) == {0}


def test_a_handoff_is_wanted_by_one_request_only(cluster: FakeCluster) -> None:
    source = offered(cluster)
    cluster.consumer.control.want("thief", source)
    cluster.settle()
    assert cluster.consumer.lost() == {"thief": Reason.BAD_PARAMS}
    cluster.consumer.control.close("thief", cancel=True)
    cluster.pass_time(2 * LEASE_S)
    assert cluster.producer.released() == []
    assert cluster.consumer.open_handoffs()["consumer"] == 1


def test_a_producer_that_never_answers_is_unreachable(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", 8)
    cluster.producer.kill()
    cluster.consumer.control.want("c", source)
    cluster.settle()
    assert cluster.consumer.control.turn() == pytest.approx(TIMEOUT_S)
    cluster.clock.advance(TIMEOUT_S)
    cluster.consumer.control.turn()
    assert cluster.consumer.lost() == {"c": Reason.PEER_UNREACHABLE}
    assert cluster.consumer.open_handoffs()["consumer"] == 0


def test_a_producer_that_dies_after_its_offer_is_noticed(cluster: FakeCluster) -> None:
    offered(cluster)
    cluster.network.silence(cluster.producer_address)
    for _ in range(14):
        cluster.clock.advance(0.5)
        cluster.settle()
    assert cluster.consumer.lost() == {"c": Reason.PEER_UNREACHABLE}


def test_a_producer_that_restarts_after_its_offer_is_noticed(cluster: FakeCluster) -> None:
    offered(cluster)
    cluster.restart_producer()
    cluster.pass_time(2)
    assert cluster.consumer.lost() == {"c": Reason.PEER_RESTARTED}


def test_a_handoff_of_the_incarnation_before_is_lost_and_the_next_is_offered(
    cluster: FakeCluster,
) -> None:
    stale = cluster.producer.begin("p", 8)
    offered(cluster, "first")
    cluster.consumer.control.close("first", cancel=True)
    cluster.settle()
    cluster.restart_producer()
    cluster.consumer.control.want("stale", stale)
    cluster.settle()
    assert cluster.consumer.lost() == {"stale": Reason.PEER_RESTARTED}
    offered(cluster, "next")


def test_a_handoff_of_the_next_incarnation_finds_its_way(cluster: FakeCluster) -> None:
    offered(cluster, "old")
    cluster.restart_producer()
    offered(cluster, "new")
    assert cluster.consumer.lost() == {"old": Reason.PEER_RESTARTED}


def anonymous(cluster: FakeCluster, request_id: str = "c") -> Source:
    """A handoff that the consumer wants from whoever runs at the producer's address."""
    source = Source(new_handoff_id(), cluster.producer_address, None)
    cluster.consumer.control.want(request_id, source)
    cluster.settle()
    return source


def test_a_want_without_an_incarnation_turns_to_a_producer_that_was_restarted(
    cluster: FakeCluster,
) -> None:
    source = anonymous(cluster)
    assert cluster.network.delivered.count("want") == 1
    cluster.restart_producer()
    cluster.pass_time(2)
    assert cluster.network.delivered.count("want") == 2
    assert cluster.consumer.events == []
    known = cluster.producer.enqueue("p", 8, source.handoff_id)
    cluster.producer.control.open(source.handoff_id)
    cluster.settle()
    assert cluster.consumer.events == [Offered("c", known, 8, b"digest")]
    cluster.consumer.control.close("c", cancel=True)
    cluster.settle()
    assert cluster.producer.events == [Abandoned("p", ProducerState.CANCELLED)]


def test_a_want_without_an_incarnation_that_reaches_a_restarted_producer_is_asked_again(
    cluster: FakeCluster,
) -> None:
    anonymous(cluster, "first")
    cluster.restart_producer()
    source = anonymous(cluster, "second")
    cluster.settle()
    cluster.producer.enqueue("p", 8, source.handoff_id)
    cluster.producer.control.open(source.handoff_id)
    cluster.settle()
    assert cluster.consumer.offered() == ["second"]
    assert cluster.consumer.lost() == {}


def test_an_offer_binds_to_the_incarnation_that_gave_it(cluster: FakeCluster) -> None:
    source = anonymous(cluster)
    cluster.producer.enqueue("p", 8, source.handoff_id)
    cluster.producer.control.open(source.handoff_id)
    cluster.settle()
    assert cluster.consumer.offered() == ["c"]
    cluster.restart_producer()
    cluster.pass_time(2)
    assert cluster.consumer.lost() == {"c": Reason.PEER_RESTARTED}


def test_a_handoff_of_an_invented_incarnation_does_not_disturb_another(
    cluster: FakeCluster,
) -> None:
    offered(cluster, "honest")
    invented = Source(new_handoff_id(), cluster.producer_address, new_incarnation())
    cluster.consumer.control.want("forged", invented)
    cluster.pass_time(2 * LEASE_S)
    assert cluster.consumer.lost() == {"forged": Reason.PEER_RESTARTED}
    assert cluster.producer.released() == []


def test_a_want_is_lost_once(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", 8)
    cluster.consumer.control.want("c", source)
    cluster.producer.control.drop(source.handoff_id)
    cluster.network.deliver_one()  # hello
    cluster.network.deliver_one()  # welcome
    cluster.network.duplicate("want")
    cluster.settle()
    cluster.pass_time(2 * TIMEOUT_S)
    assert cluster.consumer.lost() == {"c": Reason.CANCELLED}
    assert len(cluster.consumer.events) == 1


def test_a_want_whose_answer_is_lost_is_given_up_in_the_end(cluster: FakeCluster) -> None:
    first = cluster.producer.begin("p-1", 8)
    cluster.consumer.control.want("first", first)
    for _ in range(3):  # hello, welcome, want
        cluster.network.deliver_one()
    assert cluster.network.lose("offer") == 1
    offered(cluster, "second")
    # The answer to the second is a sign of life, so only the first's own deadline is left.
    cluster.pass_time(QUEUE_S)
    assert cluster.consumer.lost()["first"] is Reason.QUEUE_TIMEOUT


def test_a_request_that_waits_too_long_for_blocks_lets_go_of_the_producer_s(
    cluster: FakeCluster,
) -> None:
    offered(cluster)
    cluster.pass_time(QUEUE_S - 1)
    assert cluster.consumer.lost() == {}
    cluster.pass_time(1)
    assert cluster.consumer.lost() == {"c": Reason.QUEUE_TIMEOUT}
    assert cluster.producer.events == [Released("p-c", ProducerState.CANCELLED)]
    assert cluster.consumer.open_handoffs()["consumer"] == 0


def test_a_request_that_has_its_blocks_waits_for_nothing_more(cluster: FakeCluster) -> None:
    offered(cluster)
    cluster.consumer.control.allocated("c")
    cluster.pass_time(2 * QUEUE_S)
    assert cluster.consumer.lost() == {}
    assert cluster.producer.released() == []


def test_the_control_thread_wakes_for_a_request_that_waits_too_long() -> None:
    cluster = FakeCluster(queue_timeout_s=0.25)
    offered(cluster)
    assert cluster.consumer.control.turn() == pytest.approx(0.25)


# --- leases ----------------------------------------------------------------------------------


def test_heartbeats_hold_a_handoff_for_as_long_as_it_is_wanted(cluster: FakeCluster) -> None:
    offered(cluster)
    cluster.consumer.control.allocated("c")
    cluster.pass_time(10 * LEASE_S)
    assert cluster.producer.released() == []
    assert cluster.consumer.lost() == {}
    assert wanted_and_produced(cluster.consumer) == (1, 0)
    assert wanted_and_produced(cluster.producer) == (0, 1)


def test_a_consumer_that_dies_gives_up_its_handoff(cluster: FakeCluster) -> None:
    offered(cluster)
    for _ in range(round(LEASE_S)):
        assert cluster.producer.events == []
        cluster.clock.advance(1.0)
        cluster.producer.turn()
    assert cluster.producer.events == [Released("p-c", ProducerState.EXPIRED)]


def test_a_sealed_handoff_that_nobody_ever_wants_expires(cluster: FakeCluster) -> None:
    cluster.producer.produce("p", [1], 4)
    assert cluster.producer.control.turn() == pytest.approx(LEASE_S)
    cluster.clock.advance(LEASE_S)
    assert cluster.producer.control.turn() is None
    assert cluster.producer.events == [Released("p", ProducerState.EXPIRED)]


def test_a_consumer_whose_heartbeats_were_lost_learns_of_it(cluster: FakeCluster) -> None:
    offered(cluster)
    cluster.clock.advance(LEASE_S)
    cluster.producer.turn()
    cluster.settle()
    assert cluster.consumer.lost() == {"c": Reason.LEASE_EXPIRED}


def test_a_lease_is_renewed_at_least_four_times(cluster: FakeCluster) -> None:
    offered(cluster)
    before = cluster.network.delivered.count("heartbeat")
    cluster.pass_time(LEASE_S)
    assert cluster.network.delivered.count("heartbeat") - before >= 4


def test_no_heartbeat_is_sent_when_nothing_is_wanted(cluster: FakeCluster) -> None:
    offered(cluster)
    cluster.consumer.control.close("c", cancel=True)
    cluster.settle()
    assert cluster.consumer.control.turn() is None
    before = len(cluster.network.delivered)
    cluster.pass_time(10 * LEASE_S)
    assert len(cluster.network.delivered) == before


def test_an_idle_engine_has_nothing_to_wait_for(cluster: FakeCluster) -> None:
    assert cluster.producer.control.turn() is None
    assert cluster.consumer.control.turn() is None


def test_between_two_heartbeats_the_control_thread_may_sleep(cluster: FakeCluster) -> None:
    offered(cluster)
    wait = cluster.consumer.control.turn()
    assert wait is not None
    assert wait >= 0.5


# --- cancelling ------------------------------------------------------------------------------


def test_a_cancelled_handoff_is_released_at_once(cluster: FakeCluster) -> None:
    offered(cluster)
    cluster.consumer.control.close("c", cancel=True)
    cluster.settle()
    assert cluster.producer.events == [Released("p-c", ProducerState.CANCELLED)]


def test_a_handoff_that_is_cancelled_while_it_is_produced_is_abandoned(
    cluster: FakeCluster,
) -> None:
    source = cluster.producer.begin("p", 8)
    cluster.consumer.control.want("c", source)
    cluster.settle()
    cluster.consumer.control.close("c", cancel=True)
    cluster.settle()
    assert cluster.producer.events == [Abandoned("p", ProducerState.CANCELLED)]
    cluster.producer.drop("p")
    assert wanted_and_produced(cluster.producer) == (0, 0)


def test_a_handoff_that_is_cancelled_before_the_producer_has_its_request_is_abandoned_then(
    cluster: FakeCluster,
) -> None:
    source = unheard_of(cluster)
    cluster.consumer.control.want("c", source)
    cluster.settle()
    cluster.consumer.control.close("c", cancel=True)
    cluster.settle()
    assert cluster.producer.events == []
    cluster.producer.enqueue("p", 8, source.handoff_id)
    assert cluster.producer.events == [Abandoned("p", ProducerState.CANCELLED)]


def test_a_consumer_that_dies_while_its_prompt_is_computed_abandons_it(
    cluster: FakeCluster,
) -> None:
    source = cluster.producer.begin("p", 8)
    cluster.consumer.control.want("c", source)
    cluster.settle()
    for _ in range(round(LEASE_S)):
        assert cluster.producer.events == []
        cluster.clock.advance(1.0)
        cluster.producer.turn()
    assert cluster.producer.events == [Abandoned("p", ProducerState.EXPIRED)]


def test_a_handoff_that_ended_well_is_not_cancelled(cluster: FakeCluster) -> None:
    offered(cluster)
    cluster.consumer.control.close("c", cancel=False)
    cluster.settle()
    assert "cancel" not in cluster.network.delivered


def test_a_cancel_before_the_peer_is_known_is_delivered_later(cluster: FakeCluster) -> None:
    source = cluster.producer.produce("p", [1], 4)
    cluster.consumer.control.want("c", source)
    cluster.consumer.control.close("c", cancel=True)
    assert cluster.producer.events == []
    cluster.settle()
    assert cluster.producer.events == [Released("p", ProducerState.CANCELLED)]
    assert cluster.consumer.events == []


def test_a_cancel_is_delivered_once(cluster: FakeCluster) -> None:
    source = cluster.producer.produce("p", [1], 4)
    cluster.consumer.control.want("c", source)
    cluster.consumer.control.close("c", cancel=True)
    cluster.settle()
    invented = Source(new_handoff_id(), cluster.producer_address, new_incarnation())
    cluster.consumer.control.want("other", invented)  # introduces itself again
    cluster.settle()
    assert cluster.network.delivered.count("cancel") == 1


def test_a_cancel_for_a_peer_that_is_only_known_before_its_restart_is_delivered_later(
    cluster: FakeCluster,
) -> None:
    offered(cluster, "old")
    cluster.consumer.control.close("old", cancel=True)
    cluster.settle()
    cluster.restart_producer()
    source = cluster.producer.produce("p", [1], 4)
    cluster.consumer.control.want("new", source)
    cluster.consumer.control.close("new", cancel=True)
    cluster.settle()
    assert cluster.producer.events == [Released("p", ProducerState.CANCELLED)]


def test_closing_an_unknown_request_does_nothing(cluster: FakeCluster) -> None:
    cluster.consumer.control.close("nobody", cancel=True)
    assert cluster.network.in_flight == []


# --- producing -------------------------------------------------------------------------------


def test_a_request_that_ends_without_kv_tells_who_has_been_waiting(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", 8)
    subscribe = wire.Subscribe(source.handoff_id, 0)
    (progress,) = ask(cluster, subscribe, cluster.producer.identity.incarnation)
    assert progress == wire.Progress(source.handoff_id, 0, 0, 0, 0, (wire.TableSlice(0, ()),))
    cluster.producer.control.drop(source.handoff_id)
    (packet,) = cluster.network.in_flight
    assert packet.message == wire.Refuse(source.handoff_id, Reason.PRODUCER_ENDED)


def test_the_seal_tells_who_has_been_waiting(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", 8)
    target = cluster.producer.identity.incarnation
    ask(cluster, wire.Subscribe(source.handoff_id, 0), target)
    cluster.producer.control.seal(source.handoff_id, 8, ([3, 4],))
    (packet,) = cluster.network.in_flight
    expected = wire.Seal(source.handoff_id, 0, 8, (wire.TableSlice(0, (3, 4)),))
    assert packet.message == expected


# --- announcements of this engine's own workers ------------------------------------------------


def subscribed(cluster: FakeCluster) -> tuple[Source, list[wire.Message]]:
    """A handoff that is being produced, and what one rank of a consumer is told from then on."""
    source = cluster.producer.begin("p", 8)
    told: list[wire.Message] = []
    link = cluster.network.connect(
        cluster.producer_address, lambda frames: told.append(wire.decode(frames)[1])
    )
    subscribe = wire.Subscribe(source.handoff_id, 0)
    target = cluster.producer.identity.incarnation
    link.send(wire.encode(subscribe, new_incarnation(), target))
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
        wire.Progress(source.handoff_id, 0, 0, 8, 1, first),
        wire.Progress(source.handoff_id, 0, 8, 8, 2, second),
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
    frames = wire.encode(
        wire.Announce(step, 0, 2), incarnation, cluster.producer.identity.incarnation
    )
    receive(cluster.producer, frames)
    cluster.network.deliver()
    assert told == []
    assert cluster.producer.control.dropped_messages == 1


def test_an_announcement_to_the_incarnation_before_is_ignored(cluster: FakeCluster) -> None:
    _, told = subscribed(cluster)
    step = cluster.producer.advance("p", 8, [3, 4])
    announce = wire.Announce(step, 0, 2)
    frames = wire.encode(announce, cluster.producer.worker.incarnation, new_incarnation())
    receive(cluster.producer, frames)
    assert told == []


def test_a_preemption_is_told_to_who_subscribed(cluster: FakeCluster) -> None:
    source, told = subscribed(cluster)
    cluster.producer.compute("p", 8, [3, 4])
    cluster.network.deliver()
    told.clear()
    cluster.producer.preempt("p")
    cluster.network.deliver()
    void = wire.Progress(source.handoff_id, 1, 0, 0, 0, (wire.TableSlice(0, ()),))
    assert told == [void]


# --- commits and strangers -----------------------------------------------------------------


def test_a_commit_to_the_incarnation_before_commits_nothing(cluster: FakeCluster) -> None:
    source = cluster.producer.produce("p", [1], 4)
    answers = ask(cluster, wire.Commit(source.handoff_id, 0, 0, True), new_incarnation())
    assert answers == [wire.Alive({})]
    assert cluster.producer.events == []


def test_a_commit_is_granted_and_the_blocks_released(cluster: FakeCluster) -> None:
    source = cluster.producer.produce("p", [1], 4)
    commit = wire.Commit(source.handoff_id, 0, 0, True)
    answers = ask(cluster, commit, cluster.producer.identity.incarnation)
    assert answers == [wire.Committed(source.handoff_id, 0, True)]
    assert cluster.producer.events == [Released("p", ProducerState.COMMITTED)]


def test_a_hello_needs_no_target(cluster: FakeCluster) -> None:
    (welcome,) = ask(cluster, wire.Hello("stranger"), Incarnation(""))
    assert isinstance(welcome, wire.Welcome)
    assert welcome.lease_s == LEASE_S
    assert welcome.layout == cluster.producer.layout


def receive(engine: FakeEngine, frames: list[bytes]) -> None:
    engine.control.receive(b"stranger", frames)


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
    answers: list[wire.Header] = []
    link = cluster.network.connect(
        cluster.producer_address, lambda frames: answers.append(wire.decode(frames)[0])
    )
    header = msgspec.msgpack.encode([99, "greeting", new_incarnation(), ""])
    cluster.producer.control.receive(link.identity, [header, b""])
    cluster.network.deliver()
    assert [answer.version for answer in answers] == [wire.PROTOCOL_VERSION]
    assert cluster.producer.control.dropped_messages == 1


def test_what_the_peer_table_drops_is_counted_too(cluster: FakeCluster) -> None:
    offered(cluster)
    (link,) = cluster.network.links.values()
    link.on_message([b"rubbish"])
    assert cluster.consumer.control.dropped_messages == 1


def test_a_plane_that_is_shut_down_closes_its_links(cluster: FakeCluster) -> None:
    offered(cluster)
    cluster.consumer.control.shut_down()
    assert cluster.network.open_links(cluster.producer_address) == 0


def test_an_engine_may_fetch_from_itself_and_from_its_consumer(cluster: FakeCluster) -> None:
    there = cluster.consumer.begin("there", 8)
    cluster.producer.control.want("back", there)
    cluster.settle()
    assert cluster.producer.events == [Offered("back", there, 8, b"digest")]
    here = cluster.producer.begin("here", 8)
    cluster.producer.control.want("self", here)
    cluster.settle()
    assert cluster.producer.events[-1] == Offered("self", here, 8, b"digest")


def test_every_loss_says_why(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", 8)
    cluster.producer.control.drop(source.handoff_id)
    cluster.consumer.control.want("c", source)
    cluster.settle()
    (event,) = cluster.consumer.events
    assert event == Lost("c", Reason.CANCELLED, "the producer refused: cancelled")
