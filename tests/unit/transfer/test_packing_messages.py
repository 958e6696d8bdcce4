"""Fetches of packed pieces where messages are lost or come twice, and where a piece is wrong."""

from __future__ import annotations

import pytest

from tests.fakes.packing import PackingCluster
from tests.fakes.streaming import THERE, TIMEOUTS, TOKENS
from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import new_incarnation
from vllm_pd_plugin.protocol import framing, wire


@pytest.fixture
def cluster() -> PackingCluster:
    return PackingCluster()


# --- lost and doubled messages ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pack", "stage", "staged", "packed"])
def test_a_piece_whose_message_was_lost_is_asked_for_again(
    cluster: PackingCluster, kind: str
) -> None:
    cluster.start_packing(kind)
    assert cluster.network.lose(kind) == 1
    wait = cluster.consumer.plane.turn()
    assert wait is not None
    assert 0 < wait <= 3
    cluster.pass_time(3)
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()
    assert cluster.is_empty()


@pytest.mark.parametrize("kind", ["pack", "stage", "staged", "packed"])
def test_a_fetch_whose_pieces_do_not_come_ends_in_time(cluster: PackingCluster, kind: str) -> None:
    cluster.start_packing(kind)
    for _ in range(round(TIMEOUTS.read_s + 2)):
        cluster.network.lose(kind)
        cluster.clock.advance(1.0)
        cluster.consumer.turn()
        while cluster.network.in_flight and not cluster.network.lose(kind):
            cluster.step()
    assert cluster.consumer.outcome("c") is Reason.FETCH_TIMEOUT
    cluster.close()
    cluster.finish()
    cluster.pass_time(1)
    assert cluster.is_empty()
    assert set(cluster.producer.open_handoffs().values()) == {0}


@pytest.mark.parametrize("kind", ["unpacked", "unstage"])
def test_what_was_read_is_given_back_at_the_latest_when_the_handoff_is_over(
    cluster: PackingCluster, kind: str
) -> None:
    cluster.start()
    cluster.settle()
    cluster.compute(range(8))
    cluster.deliver_until(kind)
    assert cluster.network.lose(kind) == 1
    cluster.settle()
    assert cluster.producer.outgoing.taken_bytes > 0
    assert cluster.consumer.incoming.taken_bytes == 0
    cluster.compute(range(8, TOKENS))
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()
    assert cluster.is_empty()


@pytest.mark.parametrize(
    "kind", ["pack", "stage", "staged", "packed", "unpacked", "unstage", "commit", "every"]
)
def test_messages_that_come_twice_do_no_harm(cluster: PackingCluster, kind: str) -> None:
    cluster.start()
    for end in (8, TOKENS):
        cluster.compute(range(end - 8, end))
        while in_flight := cluster.network.in_flight:
            if kind in ("every", in_flight[0].kind):
                in_flight.insert(0, in_flight[0])
                cluster.step()
            cluster.step()
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()
    cluster.close()
    cluster.producer.seal("p", THERE)
    cluster.settle()
    assert cluster.is_empty()


# The producer must not give its place to another piece: the first message was believed.
def test_a_piece_that_is_being_read_keeps_its_place_when_it_is_announced_again(
    cluster: PackingCluster,
) -> None:
    cluster.consumer.transport.holds_reads = True
    cluster.start_packing("packed")
    assert cluster.network.duplicate("packed") == 1
    cluster.settle()
    assert len(cluster.consumer.transport.unfinished) == 1
    assert cluster.producer.outgoing.taken_bytes > 0
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()
    assert cluster.is_empty()


@pytest.mark.parametrize("kind", ["pack", "stage"])
def test_a_piece_that_is_being_read_keeps_its_place_when_it_is_wanted_again(
    cluster: PackingCluster, kind: str
) -> None:
    cluster.consumer.transport.holds_reads = True
    cluster.start_packing(kind)
    (again,) = (packet for packet in cluster.network.in_flight if packet.kind == kind)
    cluster.settle()
    assert len(cluster.consumer.transport.unfinished) == 1
    cluster.network.in_flight.append(again)
    while "staged" not in [packet.kind for packet in cluster.network.in_flight]:
        if not cluster.step():
            break
    assert cluster.producer.outgoing.taken_bytes > 0


# --- what goes wrong with a piece ------------------------------------------------------------


@pytest.mark.parametrize("side", ["producer", "consumer"])
def test_a_coder_that_refuses_ends_the_fetch(cluster: PackingCluster, side: str) -> None:
    getattr(cluster, side).coder.refuses = True
    cluster.start_and_compute()
    assert cluster.consumer.outcome("c") is Reason.INTERNAL
    assert cluster.consumer.result("c").valid_tokens == 0
    cluster.close()
    cluster.finish()
    assert cluster.is_empty()


def test_bytes_that_are_not_what_the_producer_holds_are_found_out() -> None:
    cluster = PackingCluster(checks_bytes=True)
    cluster.producer.coder.is_broken = True
    cluster.start_and_compute()
    assert cluster.consumer.outcome("c") is Reason.DIGEST_MISMATCH
    assert "commit" not in cluster.network.delivered
    cluster.close()
    cluster.finish()
    assert cluster.is_empty()


def test_bytes_that_changed_after_they_were_packed_are_found_out_before_they_are_unpacked() -> None:
    cluster = PackingCluster(checks_bytes=True)
    cluster.start_packing("packed")
    cluster.producer.coder.outgoing[7] ^= 1
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.DIGEST_MISMATCH
    assert cluster.consumer.coder.num_decoded == 0
    cluster.close()
    cluster.finish()
    assert cluster.is_empty()


def test_equal_bytes_are_used_where_they_are_checked() -> None:
    cluster = PackingCluster(checks_bytes=True)
    cluster.start_and_compute()
    assert cluster.consumer.outcome("c") is None
    assert cluster.has_arrived()
    assert cluster.is_empty()


@pytest.mark.parametrize(
    "change", [{"num_bytes": 1}, {"num_bytes": 2**64 - 1}, {"offset": 4096}, {"offset": 2**64 - 1}]
)
def test_a_piece_of_another_size_or_outside_of_the_staging_memory_is_not_read(
    cluster: PackingCluster, change: dict[str, int]
) -> None:
    cluster.start_packing("packed")
    (packed,) = cluster.network.under_way("packed")
    (packet,) = (p for p in cluster.network.in_flight if p.kind == "packed")
    header, _ = framing.decode(packet.frames)
    cluster.network.lose("packed")
    fields = {name: getattr(packed, name) for name in packed.__struct_fields__} | change
    frames = framing.encode(wire.Packed(**fields), header.sender, header.target)
    cluster.network.answer(packet.lane[0], frames)
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.MISSING_BLOCKS
    assert cluster.consumer.transport.num_posted == 0
    cluster.close()
    cluster.finish()
    assert cluster.is_empty()


def test_a_piece_that_nobody_is_to_be_told_of_is_given_back(cluster: PackingCluster) -> None:
    """A rank that wants a piece and has not subscribed."""
    source = cluster.producer.produce("p", THERE, TOKENS)
    target = cluster.producer.identity.incarnation
    link = cluster.network.connect(cluster.producer_address, lambda frames: None)
    runs = (wire.LayerRun(2, 0, 2),)
    pack = wire.Pack(source.handoff_id, 0, 0, 0, 1, Codec.RAW, TOKENS, runs, False)
    link.send(framing.encode(pack, new_incarnation(), target))
    cluster.settle()
    assert cluster.producer.coder.num_encoded == 1
    assert "packed" not in cluster.network.delivered
    assert cluster.producer.outgoing.taken_bytes == 0
