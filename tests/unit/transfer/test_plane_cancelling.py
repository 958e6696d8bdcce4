"""The transfer plane: nothing writes to the blocks of a fetch that is over."""

from __future__ import annotations

import pytest

from tests.fakes.clock import rests
from tests.fakes.fetching import DRAIN_S, EMPTY, HERE, KV, READ_S, THERE, TOKENS, FetchingCluster
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import Source, new_handoff_id, new_incarnation
from vllm_pd_plugin.transfer.specs import FetchSpec, Segment


@pytest.fixture
def cluster() -> FetchingCluster:
    return FetchingCluster()


# --- cancelling ------------------------------------------------------------------------------


def test_a_cancelled_read_is_drained_before_it_is_reported(cluster: FetchingCluster) -> None:
    cluster.start_reading()
    cluster.consumer.plane.cancel("c", Reason.ABORTED)
    cluster.settle()
    assert cluster.consumer.results == []
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.ABORTED
    assert "commit" not in cluster.network.delivered
    assert cluster.consumer.transport.removed == []


def test_a_cancelled_read_that_fails_keeps_the_reason_of_the_cancel(
    cluster: FetchingCluster,
) -> None:
    cluster.start_reading()
    cluster.consumer.plane.cancel("c", Reason.ABORTED)
    cluster.consumer.plane.cancel("c", Reason.CANCELLED)
    cluster.consumer.transport.fail_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.ABORTED


def test_a_read_that_never_ends_is_cut_off_and_then_reported(cluster: FetchingCluster) -> None:
    cluster.start_reading()
    cluster.consumer.plane.cancel("c", Reason.ABORTED)
    cluster.pass_time(DRAIN_S - 0.5)
    assert cluster.consumer.results == []
    assert cluster.consumer.transport.removed == []
    cluster.pass_time(0.5)
    assert cluster.consumer.outcome("c") is Reason.ABORTED
    assert cluster.consumer.transport.removed == [cluster.producer.transport.name]
    cluster.consumer.transport.write_late()
    assert cluster.consumer.holds(HERE, EMPTY)


def test_a_read_that_never_ends_times_out_and_is_cut_off(cluster: FetchingCluster) -> None:
    cluster.start_reading()
    cluster.pass_time(READ_S + DRAIN_S - 0.5)
    assert cluster.consumer.results == []
    cluster.pass_time(0.5)
    assert cluster.consumer.outcome("c") is Reason.FETCH_TIMEOUT
    assert cluster.consumer.transport.removed == [cluster.producer.transport.name]


def test_a_refusal_while_reading_is_drained_too(cluster: FetchingCluster) -> None:
    source = cluster.producer.begin("p", TOKENS)
    cluster.producer.compute("p", TOKENS, THERE)
    cluster.start_reading(source=source)
    cluster.producer.drop("p")
    cluster.settle()
    assert cluster.network.delivered[-1] == "refuse"
    assert cluster.consumer.results == []
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.PRODUCER_ENDED
    assert "commit" not in cluster.network.delivered


def test_a_read_is_released_only_when_its_peer_was_removed(cluster: FetchingCluster) -> None:
    cluster.start_reading()
    cluster.consumer.plane.cancel("c", Reason.ABORTED)
    cluster.pass_time(DRAIN_S)
    assert cluster.consumer.is_reported("c")
    assert cluster.consumer.transport.released_while_pending == 0


@pytest.mark.parametrize("stage", ["connecting", "subscribed", "committing"])
def test_a_fetch_without_a_read_is_cancelled_at_once(cluster: FetchingCluster, stage: str) -> None:
    if stage == "committing":
        cluster.start_committing()
    else:
        cluster.start(source=cluster.producer.begin("p", TOKENS))
        if stage == "subscribed":
            cluster.settle()
    cluster.consumer.plane.cancel("c", Reason.ABORTED)
    assert cluster.consumer.outcome("c") is Reason.ABORTED
    cluster.settle()
    assert len(cluster.consumer.results) == 1


def test_cancelling_what_is_over_or_unknown_does_nothing(cluster: FetchingCluster) -> None:
    cluster.start()
    cluster.settle()
    cluster.consumer.plane.cancel("c", Reason.ABORTED)
    cluster.consumer.plane.cancel("nobody", Reason.ABORTED)
    assert len(cluster.consumer.results) == 1
    assert cluster.consumer.outcome("c") is None


def test_a_request_may_fetch_again_after_a_failure(cluster: FetchingCluster) -> None:
    source = cluster.start_reading()
    cluster.consumer.transport.fail_reads()
    cluster.settle()
    cluster.consumer.results.clear()
    cluster.consumer.transport.holds_reads = False
    cluster.start("c", source)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.holds(HERE, KV)


# --- several producers -----------------------------------------------------------------------


def whole(source: Source) -> tuple[Segment, ...]:
    return (Segment(range(TOKENS), source),)


def begin(cluster: FetchingCluster, source: Source, is_last: bool = True, attempt: int = 0) -> None:
    """Start a fetch that may not be the last chance."""
    spec = FetchSpec("c", whole(source), (tuple(HERE),), attempt, is_last)
    cluster.consumer.specs["c"] = spec
    cluster.consumer.plane.fetch(spec)


def test_a_fetch_from_elsewhere_takes_the_place_of_one_that_is_under_way(
    cluster: FetchingCluster,
) -> None:
    transport = cluster.consumer.transport
    transport.holds_reads = True
    begin(cluster, cluster.sealed("first"), is_last=False)
    cluster.settle()
    begin(cluster, cluster.sealed("second"), attempt=1)
    cluster.settle()
    assert transport.num_posted == 1  # the first read may still write to the same blocks
    transport.finish_reads()
    cluster.settle()
    assert transport.num_posted == 2
    transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.results[0].attempt == 1
    assert cluster.consumer.holds(HERE, KV)


def test_a_rank_that_has_succeeded_reports_nothing_more(cluster: FetchingCluster) -> None:
    begin(cluster, cluster.sealed(), is_last=False)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    begin(cluster, cluster.sealed("second"), attempt=1)
    cluster.consumer.plane.refuse("c")
    cluster.settle()
    assert cluster.consumer.outcome("c") is None  # and only once


def test_a_refusal_is_reported_when_the_reads_have_ended(cluster: FetchingCluster) -> None:
    transport = cluster.consumer.transport
    transport.holds_reads = True
    begin(cluster, cluster.sealed(), is_last=False)
    cluster.settle()
    cluster.consumer.plane.refuse("c")
    cluster.settle()
    assert not cluster.consumer.is_reported("c")
    transport.finish_reads()
    cluster.settle()
    (result,) = cluster.consumer.results
    assert result.reason is Reason.INTERNAL
    assert result.is_final


def test_a_refusal_of_what_was_never_begun_is_reported_at_once(cluster: FetchingCluster) -> None:
    spec = FetchSpec("c", whole(cluster.invented()), (tuple(HERE),))
    cluster.consumer.specs["c"] = spec
    cluster.consumer.plane.refuse("c")
    (result,) = cluster.consumer.results
    assert (result.reason, result.is_final) == (Reason.INTERNAL, True)


# --- closing ---------------------------------------------------------------------------------


def test_a_closed_plane_serves_nobody(cluster: FetchingCluster) -> None:
    plane, transport = cluster.producer.plane, cluster.producer.transport
    plane.set_lending(True)
    plane.close()
    assert plane.turn() is None
    assert transport.num_progress == 0


def test_closing_reports_every_fetch_and_leaves_nothing_that_writes(
    cluster: FetchingCluster,
) -> None:
    cluster.start_reading("reading")
    cluster.start("subscribed", cluster.producer.begin("p", TOKENS))
    cluster.settle()
    elsewhere = Source(new_handoff_id(), ("127.0.0.1", 7999), new_incarnation())
    cluster.start("connecting", elsewhere)
    cluster.consumer.plane.close()
    for request_id in ("reading", "subscribed", "connecting"):
        assert cluster.consumer.outcome(request_id) is Reason.CANCELLED
    transport = cluster.consumer.transport
    assert transport.is_closed
    assert transport.reads == {}
    assert transport.removed == [cluster.producer.transport.name]
    assert cluster.network.open_links(cluster.producer_address) == 0
    assert cluster.network.open_links(elsewhere.address) == 0


def test_a_closed_plane_hears_nothing_more(cluster: FetchingCluster) -> None:
    cluster.start_committing()
    cluster.network.deliver_one()
    cluster.consumer.plane.close()
    cluster.network.deliver()
    assert cluster.consumer.outcome("c") is Reason.CANCELLED
    assert rests(cluster.consumer.plane.turn())
