"""Both control planes: heartbeats hold a handoff, a cancel or silence ends it."""

from __future__ import annotations

import pytest

from tests.fakes.clock import rests
from tests.fakes.cluster import FakeCluster
from tests.fakes.engines import FakeEngine
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.protocol.events import Abandoned, Released
from vllm_pd_plugin.protocol.export_states import ExportState

LEASE_S = 8.0


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(lease_s=LEASE_S)


def wanted_and_produced(engine: FakeEngine) -> tuple[int, int]:
    known = engine.open_handoffs()
    return known["consumer"], known["producer"]


# --- leases ----------------------------------------------------------------------------------


def test_heartbeats_hold_a_handoff_for_as_long_as_it_is_wanted(cluster: FakeCluster) -> None:
    cluster.offer()
    cluster.consumer.control.allocated("c")
    cluster.pass_time(10 * LEASE_S)
    assert cluster.producer.released() == []
    assert cluster.consumer.lost() == {}
    assert wanted_and_produced(cluster.consumer) == (1, 0)
    assert wanted_and_produced(cluster.producer) == (0, 1)


def test_a_consumer_that_dies_gives_up_its_handoff(cluster: FakeCluster) -> None:
    cluster.offer()
    for _ in range(round(LEASE_S)):
        assert cluster.producer.events == []
        cluster.clock.advance(1.0)
        cluster.producer.turn()
    assert cluster.producer.events == [Released("p-c", ExportState.EXPIRED)]


def test_a_sealed_handoff_that_nobody_ever_wants_expires(cluster: FakeCluster) -> None:
    cluster.producer.produce("p", [1], 4)
    assert cluster.producer.control.turn() == pytest.approx(LEASE_S)
    cluster.clock.advance(LEASE_S)
    assert cluster.producer.control.turn() is None
    assert cluster.producer.events == [Released("p", ExportState.EXPIRED)]


def test_a_consumer_whose_heartbeats_were_lost_learns_of_it(cluster: FakeCluster) -> None:
    cluster.offer()
    cluster.clock.advance(LEASE_S)
    cluster.producer.turn()
    cluster.settle()
    assert cluster.consumer.lost() == {"c": Reason.LEASE_EXPIRED}


def test_a_lease_is_renewed_at_least_four_times(cluster: FakeCluster) -> None:
    cluster.offer()
    before = cluster.network.delivered.count("heartbeat")
    cluster.pass_time(LEASE_S)
    assert cluster.network.delivered.count("heartbeat") - before >= 4


def test_no_heartbeat_is_sent_when_nothing_is_wanted(cluster: FakeCluster) -> None:
    cluster.offer()
    cluster.cancel()
    assert rests(cluster.consumer.control.turn())
    before = len(cluster.network.delivered)
    cluster.pass_time(10 * LEASE_S)
    assert len(cluster.network.delivered) == before


def test_an_idle_engine_has_nothing_to_wait_for(cluster: FakeCluster) -> None:
    assert cluster.producer.control.turn() is None
    assert rests(cluster.consumer.control.turn())


def test_between_two_heartbeats_the_control_thread_may_sleep(cluster: FakeCluster) -> None:
    cluster.offer()
    wait = cluster.consumer.control.turn()
    assert wait is not None
    assert wait >= 0.5


# --- cancelling ------------------------------------------------------------------------------


def test_a_cancelled_handoff_is_released_at_once(cluster: FakeCluster) -> None:
    cluster.offer()
    cluster.cancel()
    assert cluster.producer.events == [Released("p-c", ExportState.CANCELLED)]


def test_a_handoff_that_is_cancelled_while_it_is_produced_is_abandoned(
    cluster: FakeCluster,
) -> None:
    source = cluster.producer.begin("p", 8)
    cluster.want("c", source)
    cluster.cancel()
    assert cluster.producer.events == [Abandoned("p", ExportState.CANCELLED)]
    cluster.producer.drop("p")
    assert wanted_and_produced(cluster.producer) == (0, 0)


def test_a_handoff_that_is_cancelled_before_the_producer_has_its_request_is_abandoned_then(
    cluster: FakeCluster,
) -> None:
    source = cluster.unheard_of()
    cluster.want("c", source)
    cluster.cancel()
    assert cluster.producer.events == []
    cluster.producer.enqueue("p", 8, source.handoff_id)
    assert cluster.producer.events == [Abandoned("p", ExportState.CANCELLED)]


def test_a_consumer_that_dies_while_its_prompt_is_computed_abandons_it(
    cluster: FakeCluster,
) -> None:
    source = cluster.producer.begin("p", 8)
    cluster.want("c", source)
    for _ in range(round(LEASE_S)):
        assert cluster.producer.events == []
        cluster.clock.advance(1.0)
        cluster.producer.turn()
    assert cluster.producer.events == [Abandoned("p", ExportState.EXPIRED)]


def test_a_handoff_that_ended_well_is_not_cancelled(cluster: FakeCluster) -> None:
    cluster.offer()
    cluster.consumer.control.close("c", cancel=False)
    cluster.settle()
    assert "cancel" not in cluster.network.delivered
    assert wanted_and_produced(cluster.consumer) == (0, 0)
    assert wanted_and_produced(cluster.producer) == (0, 1)


def test_a_cancel_before_the_peer_is_known_is_delivered_later(cluster: FakeCluster) -> None:
    source = cluster.producer.produce("p", [1], 4)
    cluster.consumer.control.want("c", source)
    cluster.consumer.control.close("c", cancel=True)
    assert cluster.producer.events == []
    cluster.settle()
    assert cluster.producer.events == [Released("p", ExportState.CANCELLED)]
    assert cluster.consumer.events == []


def test_a_cancel_is_delivered_once(cluster: FakeCluster) -> None:
    source = cluster.producer.produce("p", [1], 4)
    cluster.consumer.control.want("c", source)
    cluster.cancel()
    cluster.consumer.control.want("other", cluster.invented())  # introduces itself again
    cluster.settle()
    assert cluster.network.delivered.count("cancel") == 1


def test_a_cancel_for_a_peer_that_is_only_known_before_its_restart_is_delivered_later(
    cluster: FakeCluster,
) -> None:
    cluster.offer("old")
    cluster.cancel("old")
    cluster.restart_producer()
    source = cluster.producer.produce("p", [1], 4)
    cluster.consumer.control.want("new", source)
    cluster.cancel("new")
    assert cluster.producer.events == [Released("p", ExportState.CANCELLED)]


def test_a_cancel_that_waits_for_another_run_of_the_producer_outlives_one_of_this(
    cluster: FakeCluster,
) -> None:
    cluster.offer("known")
    old = cluster.consumer.control
    cluster.restart_producer()
    source = cluster.producer.produce("p", [1], 4)
    old.want("new", source)
    old.close("new", cancel=True)  # waits until the producer has introduced itself again
    old.close("known", cancel=True)  # the one that is thought to be there
    cluster.settle()
    assert cluster.producer.events == [Released("p", ExportState.CANCELLED)]


def test_introductions_put_no_heartbeat_off(cluster: FakeCluster) -> None:
    cluster.offer()
    for _ in range(round(6 * LEASE_S)):
        cluster.want("other", cluster.invented())  # introduces itself again
        cluster.pass_time(0.5)
    assert cluster.network.delivered.count("hello") > 2 * LEASE_S
    assert cluster.producer.released() == []


def test_closing_an_unknown_request_does_nothing(cluster: FakeCluster) -> None:
    cluster.consumer.control.close("nobody", cancel=True)
    assert cluster.network.in_flight == []
