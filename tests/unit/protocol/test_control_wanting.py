"""The control plane of a consumer: what becomes of a handoff that is wanted."""

from __future__ import annotations

import dataclasses

import pytest

from tests.fakes.cluster import FakeCluster
from tests.fakes.engines import PEER_TIMEOUT_S
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import Source, new_handoff_id
from vllm_pd_plugin.protocol.events import Abandoned, Lost, Offered, Released
from vllm_pd_plugin.protocol.export_states import ExportState

LEASE_S = 8.0
QUEUE_S = 40.0


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(lease_s=LEASE_S, queue_timeout_s=QUEUE_S)


def test_what_is_wanted_is_offered_while_prefill_still_runs(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", 8)
    cluster.want("c", source)
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
    source = cluster.unheard_of()
    cluster.consumer.control.want("c", source)
    cluster.pass_time(LEASE_S - 1)
    assert cluster.consumer.events == []
    cluster.producer.begin("p", 8, source.handoff_id)
    cluster.settle()
    assert cluster.consumer.events == [Offered("c", source, 8, b"digest")]


def test_a_consumer_need_not_know_the_producer_s_incarnation(cluster: FakeCluster) -> None:
    known = cluster.producer.begin("p", 8)
    cluster.want("c", dataclasses.replace(known, incarnation=None))
    assert cluster.consumer.events == [Offered("c", known, 8, b"digest")]
    another = cluster.producer.begin("q", 8)
    cluster.want("d", dataclasses.replace(another, incarnation=None))
    assert cluster.consumer.offered() == ["c", "d"]


def test_many_wants_of_one_peer_share_one_connection(cluster: FakeCluster) -> None:
    for request_id in "abc":
        cluster.offer(request_id)
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
    cluster.want("c", cluster.unheard_of())
    cluster.pass_time(LEASE_S - 1)
    assert cluster.consumer.lost() == {}
    cluster.pass_time(2)
    assert cluster.consumer.lost() == {"c": Reason.UNKNOWN_HANDOFF}
    assert set(cluster.producer.open_handoffs().values()) == {0}


def test_a_handoff_is_wanted_by_one_request_only(cluster: FakeCluster) -> None:
    source = cluster.offer()
    cluster.want("thief", source)
    assert cluster.consumer.lost() == {"thief": Reason.BAD_PARAMS}
    cluster.consumer.control.close("thief", cancel=True)
    cluster.pass_time(2 * LEASE_S)
    assert cluster.producer.released() == []
    assert cluster.consumer.open_handoffs()["consumer"] == 1


def test_a_producer_that_never_answers_is_unreachable(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", 8)
    cluster.producer.kill()
    cluster.want("c", source)
    assert cluster.consumer.control.turn() == pytest.approx(PEER_TIMEOUT_S)
    cluster.clock.advance(PEER_TIMEOUT_S)
    cluster.consumer.control.turn()
    assert cluster.consumer.lost() == {"c": Reason.PEER_UNREACHABLE}
    assert cluster.consumer.open_handoffs()["consumer"] == 0


def test_a_producer_that_dies_after_its_offer_is_noticed(cluster: FakeCluster) -> None:
    cluster.offer()
    cluster.network.silence(cluster.producer_address)
    for _ in range(14):
        cluster.clock.advance(0.5)
        cluster.settle()
    assert cluster.consumer.lost() == {"c": Reason.PEER_UNREACHABLE}


def test_a_producer_that_restarts_after_its_offer_is_noticed(cluster: FakeCluster) -> None:
    cluster.offer()
    cluster.restart_producer()
    cluster.pass_time(2)
    assert cluster.consumer.lost() == {"c": Reason.PEER_RESTARTED}


def test_a_handoff_of_the_incarnation_before_is_lost_and_the_next_is_offered(
    cluster: FakeCluster,
) -> None:
    stale = cluster.producer.begin("p", 8)
    cluster.offer("first")
    cluster.cancel("first")
    cluster.restart_producer()
    cluster.want("stale", stale)
    assert cluster.consumer.lost() == {"stale": Reason.PEER_RESTARTED}
    cluster.offer("next")


def test_a_handoff_of_the_next_incarnation_finds_its_way(cluster: FakeCluster) -> None:
    cluster.offer("old")
    cluster.restart_producer()
    cluster.offer("new")
    assert cluster.consumer.lost() == {"old": Reason.PEER_RESTARTED}


def anonymous(cluster: FakeCluster, request_id: str = "c") -> Source:
    """A handoff that the consumer wants from whoever runs at the producer's address."""
    source = Source(new_handoff_id(), cluster.producer_address, None)
    cluster.want(request_id, source)
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
    known = cluster.producer.begin("p", 8, source.handoff_id)
    cluster.settle()
    assert cluster.consumer.events == [Offered("c", known, 8, b"digest")]
    cluster.cancel()
    assert cluster.producer.events == [Abandoned("p", ExportState.CANCELLED)]


def test_a_want_without_an_incarnation_that_reaches_a_restarted_producer_is_asked_again(
    cluster: FakeCluster,
) -> None:
    anonymous(cluster, "first")
    cluster.restart_producer()
    source = anonymous(cluster, "second")
    cluster.settle()
    cluster.producer.begin("p", 8, source.handoff_id)
    cluster.settle()
    assert cluster.consumer.offered() == ["second"]
    assert cluster.consumer.lost() == {}


def test_an_offer_binds_to_the_incarnation_that_gave_it(cluster: FakeCluster) -> None:
    source = anonymous(cluster)
    cluster.producer.begin("p", 8, source.handoff_id)
    cluster.settle()
    assert cluster.consumer.offered() == ["c"]
    cluster.restart_producer()
    cluster.pass_time(2)
    assert cluster.consumer.lost() == {"c": Reason.PEER_RESTARTED}


def test_a_handoff_of_an_invented_incarnation_does_not_disturb_another(
    cluster: FakeCluster,
) -> None:
    cluster.offer("honest")
    cluster.consumer.control.want("forged", cluster.invented())
    cluster.pass_time(2 * LEASE_S)
    assert cluster.consumer.lost() == {"forged": Reason.PEER_RESTARTED}
    assert cluster.producer.released() == []


def test_a_want_is_lost_once(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", 8)
    cluster.consumer.control.want("c", source)
    cluster.producer.control.drop(source.handoff_id)
    cluster.network.deliver_one()  # hello
    cluster.network.deliver_one()  # welcome
    assert cluster.network.duplicate("want") == 1
    cluster.settle()
    cluster.pass_time(2 * PEER_TIMEOUT_S)
    assert cluster.consumer.lost() == {"c": Reason.CANCELLED}
    assert len(cluster.consumer.events) == 1


def test_a_want_whose_answer_is_lost_is_given_up_in_the_end(cluster: FakeCluster) -> None:
    first = cluster.producer.begin("p-1", 8)
    cluster.consumer.control.want("first", first)
    for _ in range(3):  # hello, welcome, want
        cluster.network.deliver_one()
    assert cluster.network.lose("offer") == 1
    cluster.offer("second")
    # The answer to the second is a sign of life, so only the first's own deadline is left.
    cluster.pass_time(QUEUE_S - 1)
    assert cluster.consumer.lost() == {}
    cluster.pass_time(1)
    assert cluster.consumer.lost()["first"] is Reason.QUEUE_TIMEOUT


def test_a_request_that_waits_too_long_for_blocks_lets_go_of_the_producer_s(
    cluster: FakeCluster,
) -> None:
    cluster.offer()
    cluster.pass_time(QUEUE_S - 1)
    assert cluster.consumer.lost() == {}
    cluster.pass_time(1)
    assert cluster.consumer.lost() == {"c": Reason.QUEUE_TIMEOUT}
    assert cluster.producer.events == [Released("p-c", ExportState.CANCELLED)]
    assert cluster.consumer.open_handoffs()["consumer"] == 0


def test_a_request_that_has_its_blocks_waits_for_nothing_more(cluster: FakeCluster) -> None:
    cluster.offer()
    cluster.consumer.control.allocated("c")
    cluster.pass_time(2 * QUEUE_S)
    assert cluster.consumer.lost() == {}
    assert cluster.producer.released() == []


def test_the_control_thread_wakes_for_a_request_that_waits_too_long() -> None:
    cluster = FakeCluster(queue_timeout_s=0.25)
    cluster.offer()
    assert cluster.consumer.control.turn() == pytest.approx(0.25)


def test_every_loss_says_why(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", 8)
    cluster.producer.control.drop(source.handoff_id)
    cluster.want("c", source)
    (event,) = cluster.consumer.events
    assert isinstance(event, Lost)
    assert event.source is not None
    assert (event.source.handoff_id, event.source.address) == (source.handoff_id, source.address)
    expected = Lost("c", Reason.CANCELLED, "the producer refused: cancelled", event.source)
    assert event == expected


def test_an_engine_may_fetch_from_itself_and_from_its_consumer(cluster: FakeCluster) -> None:
    there = cluster.consumer.begin("there", 8)
    cluster.producer.control.want("back", there)
    cluster.settle()
    assert cluster.producer.events == [Offered("back", there, 8, b"digest")]
    here = cluster.producer.begin("here", 8)
    cluster.producer.control.want("self", here)
    cluster.settle()
    assert cluster.producer.events[-1] == Offered("self", here, 8, b"digest")


def test_what_the_peer_table_drops_is_counted_too(cluster: FakeCluster) -> None:
    cluster.offer()
    (link,) = cluster.network.links.values()
    link.on_message([b"rubbish"])
    assert cluster.consumer.control.dropped_messages == 1


def test_a_plane_that_is_shut_down_closes_its_links(cluster: FakeCluster) -> None:
    cluster.offer()
    cluster.consumer.control.shut_down()
    assert cluster.network.open_links(cluster.producer_address) == 0
