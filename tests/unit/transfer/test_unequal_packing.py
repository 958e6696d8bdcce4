"""What of an engine of another shape is packed, what is read as it lies, and what is refused."""

from __future__ import annotations

import msgspec
import pytest

from tests.fakes.shapes import Shape
from tests.fakes.unequal import Request, UnequalPair
from tests.unit.transfer.test_unequal import ONE, STAGES, assert_all_is_well, stream
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.packing.incoming import Packing
from vllm_pd_plugin.transfer import peer_reads

TWO = Shape(tp=2)
DIRECT = Shape(block_tokens=8)
"""Read as it lies from blocks of four, and by them."""
BETWEEN = Shape(form="token major")
"""Of which two ranks cannot read their heads as they lie."""


def checked(pair: UnequalPair) -> None:
    """What the first rank of the consumer makes of the producer. Raises PeerError."""
    pair.consumer.ranks[0].plane._peers.check_fit(pair.producer.control._welcome)


def after(pair: UnequalPair, chunk: int = 21) -> UnequalPair:
    stream(pair, chunk)
    assert_all_is_well(pair)
    return pair


# --- what is packed --------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [(ONE, DIRECT), (DIRECT, ONE), (TWO, ONE), (ONE, TWO)])
def test_what_can_be_read_as_it_lies_is_packed_only_if_that_is_wanted(
    shapes: tuple[Shape, Shape],
) -> None:
    never = after(UnequalPair(*shapes, Request(21), Packing.NEVER)).counts
    assert never.packed == 0
    always = after(UnequalPair(*shapes, Request(21), Packing.ALWAYS)).counts
    assert always.packed == always.stretches > 0
    assert always.kv_bytes == 21 * 3 * 4 * 4 * 2, "of every element once"


@pytest.mark.parametrize("packing", Packing)
def test_what_cannot_be_read_as_it_lies_is_packed_whatever_is_wanted(packing: Packing) -> None:
    counts = after(UnequalPair(BETWEEN, TWO, Request(21), packing)).counts
    assert counts.packed == counts.stretches > 0


def test_with_integrity_all_is_packed_where_engines_are_not_alike() -> None:
    """Only a piece can be compared."""
    counts = after(UnequalPair(TWO, ONE, Request(21), Packing.NEVER, checks_bytes=True)).counts
    assert counts.packed == counts.stretches > 0


def test_with_integrity_nothing_need_be_packed_where_engines_are_alike() -> None:
    counts = after(UnequalPair(TWO, TWO, Request(21), Packing.NEVER, checks_bytes=True)).counts
    assert counts.packed == 0


def test_ranks_that_are_alike_ask_for_blocks_and_others_for_heads() -> None:
    for shape in (ONE, TWO):
        pair = after(UnequalPair(TWO, shape, Request(21), Packing.ALWAYS))
        gathered = sum(rank.coder.num_gathered for rank in pair.producer.ranks)
        encoded = sum(rank.coder.num_encoded for rank in pair.producer.ranks)
        assert (gathered > 0, encoded > 0) == (shape is ONE, shape is TWO)
        assert pair.counts.packed == pair.counts.stretches
        assert pair.counts.kv_bytes == 21 * 3 * 4 * 4 * 2 + (shape is TWO) * 3 * 3 * 4 * 4 * 2


@pytest.mark.parametrize("packing", [Packing.AUTO, Packing.ALWAYS])
@pytest.mark.parametrize("bare", [0, 1])
def test_of_a_rank_without_staging_memory_is_read_as_it_lies(bare: int, packing: Packing) -> None:
    pair = UnequalPair(TWO, ONE, Request(21), packing, bare=((bare,), ()))
    counts = after(pair).counts
    if packing is Packing.ALWAYS:
        assert 0 < counts.packed < counts.stretches
    assert pair.producer.ranks[bare].coder.num_gathered == 0


def test_a_share_for_which_staging_memory_is_too_small_is_read_as_it_lies() -> None:
    """Half of 4 * 256 bytes, in which a piece has none."""
    pair = UnequalPair(TWO, ONE, Request(21), Packing.ALWAYS, staging_bytes=1000)
    assert after(pair).counts.packed == 0


def test_a_share_that_has_to_be_packed_and_does_not_fit_fails_its_request_only() -> None:
    pair = UnequalPair(BETWEEN, TWO, Request(21), staging_bytes=1000)
    stream(pair)
    assert pair.reasons == [Reason.INTERNAL] * 2
    pair.close()
    assert pair.leaks() == {}


def test_pieces_are_no_larger_than_either_side_has_room_for() -> None:
    """A piece takes a quarter of either half at the most."""
    pair = UnequalPair(BETWEEN, TWO, Request(60), Packing.ALWAYS, staging_bytes=1024)
    counts = after(pair, chunk=60).counts
    assert counts.packed >= counts.kv_bytes / 256


def test_what_is_packed_is_given_back_on_every_rank_when_the_handoff_is_over() -> None:
    """Even where no rank hears that its pieces were read."""
    pair = UnequalPair(TWO, ONE, Request(21), Packing.ALWAYS)
    pair.settle()
    pair.compute(21)
    pair.seal()
    for _ in range(200):
        pair.turn()
        pair.network.lose("unpacked")
        if pair.network.in_flight:
            pair.network.deliver_one()
    assert pair.reasons == [None]
    assert all(rank.outgoing.taken_bytes == 0 for rank in pair.producer.ranks)
    assert all(rank.coder.num_gathered for rank in pair.producer.ranks)


MIXED = (
    Shape(windowed=(1,), window_form="token major"),
    Shape(tp=2, windowed=(1,), window_form="token major"),
)
"""Of one group heads can be read as they lie, of the other they cannot."""


def test_of_layers_that_can_be_read_as_they_lie_and_others_each_is_taken_its_way() -> None:
    for num_tokens in (21, 22):
        counts = after(UnequalPair(*MIXED, Request(num_tokens), Packing.NEVER)).counts
        assert 0 < counts.packed < counts.stretches


@pytest.mark.parametrize("limits", [(3, 2, 2**20), (100, 1, 2**20), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("shapes", [MIXED, (TWO, ONE), (ONE, DIRECT), (BETWEEN, TWO)])
def test_more_than_is_planned_or_read_at_once_arrives_in_parts(
    shapes: tuple[Shape, Shape], limits: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """limits: blocks of one plan, descriptors and bytes of one read."""
    monkeypatch.setattr(peer_reads, "_MAX_BLOCKS", limits[0])
    monkeypatch.setattr(peer_reads, "_MAX_DESCRIPTORS", limits[1])
    pair = UnequalPair(*shapes, Request(21), Packing.NEVER)
    for rank in pair.consumer.ranks:
        rank.transport.max_read_bytes = limits[2]
    after(pair)


def test_of_a_long_stretch_only_what_is_not_packed_is_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A part of it may have nothing but layers of a stage that packs them."""
    monkeypatch.setattr(peer_reads, "_MAX_BLOCKS", 2)
    for bare in (0, 1):
        shapes = Shape(stages=STAGES), Shape(block_tokens=8)
        pair = UnequalPair(*shapes, Request(21), Packing.ALWAYS, bare=((bare,), ()))
        counts = after(pair).counts
        assert 0 < counts.packed < counts.stretches


# --- what is refused before anything is read --------------------------------------------------


@pytest.mark.parametrize("bare", [((0,), ()), ((), (0, 1))], ids=["theirs", "ours"])
def test_without_staging_memory_what_has_to_be_packed_is_refused(
    bare: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    pair = UnequalPair(BETWEEN, TWO, Request(21), bare=bare)
    with pytest.raises(PeerError, match="layers.0 .*staging_bytes=0.* on both engines") as failure:
        checked(pair)
    assert failure.value.reason is Reason.PEER_INCOMPATIBLE
    stream(pair)
    assert pair.reasons == [Reason.PEER_INCOMPATIBLE] * 2


@pytest.mark.parametrize("bare", [((0,), ()), ((), (0,))], ids=["theirs", "ours"])
def test_without_staging_memory_what_can_be_read_as_it_lies_is(
    bare: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    for pair in (
        UnequalPair(DIRECT, ONE, Request(21), Packing.ALWAYS, bare=bare),
        UnequalPair(ONE, ONE, Request(21), Packing.ALWAYS, bare=bare, checks_bytes=True),
    ):
        assert after(pair).counts.packed == 0


@pytest.mark.parametrize("bare", [((0,), ()), ((), (0,))], ids=["theirs", "ours"])
def test_without_staging_memory_bytes_of_unlike_engines_cannot_be_compared(
    bare: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    pair = UnequalPair(DIRECT, ONE, Request(21), bare=bare, checks_bytes=True)
    with pytest.raises(PeerError, match="staging_bytes=0"):
        checked(pair)


def test_pages_that_nobody_can_look_into_are_read_whole_and_cannot_be_compared() -> None:
    theirs, ours = Shape(is_told=False, stages=STAGES), Shape(is_told=False)
    assert after(UnequalPair(theirs, ours, Request(21))).counts.packed == 0
    assert after(UnequalPair(theirs, ours, Request(21), packing=None)).counts.packed == 0
    with pytest.raises(PeerError, match="integrity=digest cannot compare pages of layers.0"):
        checked(UnequalPair(theirs, ours, Request(21), checks_bytes=True))
    checked(UnequalPair(ours, ours, Request(21), checks_bytes=True))


# --- what a peer may forge ----------------------------------------------------------------------


def test_a_producer_that_does_not_say_how_far_a_stage_is_fails_the_request() -> None:
    pair = UnequalPair(Shape(stages=STAGES), ONE, Request(21))
    pair.schedule(21)
    pair.settle()
    (here,) = pair.consumer.ranks
    (reading,) = here.plane._fetches["c"].readings
    pair.write(0)
    pair.network.deliver_kind("announce")
    (packet,) = [packet for packet in pair.network.in_flight if packet.kind == "progress"]
    progress = packet.message
    short = msgspec.structs.replace(progress, written=progress.written[:1])  # type: ignore[union-attr]
    reading.take(short)  # type: ignore[attr-defined]
    assert pair.reasons == [Reason.MISSING_BLOCKS]
