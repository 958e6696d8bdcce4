"""The producer's table: which pieces may be packed, for whom, and until when."""

from __future__ import annotations

import msgspec
import pytest

from tests.fakes.producer import (
    BLOCKS,
    LEASE_S,
    RANK_0,
    RANK_1,
    SCHEDULER,
    SEAL_TABLES,
    TOKENS,
    Producer,
)
from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import HandoffId, new_handoff_id
from vllm_pd_plugin.protocol import wire

TABLES = ((1, 2, 3), (4,))


def pack_of(handoff: HandoffId, **changes: object) -> wire.Pack:
    runs = (wire.LayerRun(3, 0, 1),)
    pack = wire.Pack(handoff, 0, 0, 0, 1, Codec.RAW, TOKENS, runs, False)
    return msgspec.structs.replace(pack, **changes)


def packed_of(pack: wire.Pack) -> wire.Packed:
    return wire.Packed(pack.handoff_id, pack.epoch, pack.number, 256, 100, b"")


def staged_of(pack: wire.Pack) -> wire.Staged:
    consumer = RANK_0.incarnation
    return wire.Staged(pack.handoff_id, consumer, pack.rank, pack.rank, packed_of(pack), None)


@pytest.fixture
def handoff(producer: Producer) -> HandoffId:
    """Complete, and wanted by a rank that has subscribed."""
    handoff = producer.wanted()
    producer.compute(handoff, TOKENS)
    producer.subscribe(handoff, 0, RANK_0)
    return handoff


# --- asking ----------------------------------------------------------------------------------


def test_a_rank_is_to_pack_from_the_blocks_as_they_are(
    producer: Producer, handoff: HandoffId
) -> None:
    pack = pack_of(handoff)
    assert producer.pack(pack) == wire.Stage(pack, TABLES, RANK_0.incarnation)


def test_a_piece_may_be_wanted_before_the_prompt_is_complete(producer: Producer) -> None:
    handoff = producer.wanted()
    producer.compute(handoff, 50, ([1, 2], [4]))
    pack = pack_of(handoff)
    assert producer.pack(pack) == wire.Stage(pack, ((1, 2), (4,)), RANK_0.incarnation)


def test_a_sealed_handoff_is_packed_too(producer: Producer) -> None:
    pack = pack_of(producer.sealed())
    assert producer.pack(pack) == wire.Stage(pack, TABLES, RANK_0.incarnation)


@pytest.mark.parametrize(
    "changes", [{"source_rank": 1}, {"source_rank": 2**63}, {"num_tokens": TOKENS + 1}], ids=str
)
def test_what_the_handoff_does_not_have_is_refused(
    producer: Producer, handoff: HandoffId, changes: dict[str, int]
) -> None:
    refusal = wire.Refuse(handoff, Reason.MISSING_BLOCKS)
    assert producer.pack(pack_of(handoff, **changes)) == refusal


def test_an_unknown_handoff_is_refused(producer: Producer) -> None:
    handoff = new_handoff_id()
    refusal = wire.Refuse(handoff, Reason.UNKNOWN_HANDOFF)
    assert producer.pack(pack_of(handoff)) == refusal


def test_a_handoff_that_has_expired_is_refused(producer: Producer, handoff: HandoffId) -> None:
    producer.clock.advance(LEASE_S)
    assert producer.pack(pack_of(handoff)) == wire.Refuse(handoff, Reason.LEASE_EXPIRED)


def test_a_piece_of_an_earlier_epoch_is_answered_with_how_things_stand(
    producer: Producer, handoff: HandoffId
) -> None:
    producer.table.withdraw(handoff, 1)
    answer = producer.pack(pack_of(handoff))
    assert isinstance(answer, wire.Progress)
    assert (answer.epoch, answer.written) == (1, (wire.Written(),))
    producer.table.seal(handoff, "r", TOKENS, BLOCKS)
    answer = producer.pack(pack_of(handoff))
    assert answer == wire.Seal(handoff, 1, TOKENS, SEAL_TABLES)


def test_a_piece_of_an_earlier_epoch_for_a_rank_that_never_subscribed_is_refused(
    producer: Producer,
) -> None:
    handoff = producer.wanted()
    producer.table.withdraw(handoff, 1)
    assert producer.pack(pack_of(handoff)) == wire.Refuse(handoff, Reason.MISSING_BLOCKS)


# --- answering -------------------------------------------------------------------------------


def test_the_rank_that_has_subscribed_is_told_where_the_piece_is(
    producer: Producer, handoff: HandoffId
) -> None:
    pack = pack_of(handoff)
    producer.pack(pack)
    assert producer.answering.staged(staged_of(pack)) == (RANK_0, packed_of(pack))


def test_a_rank_that_has_subscribed_anew_is_told_at_its_new_address(
    producer: Producer, handoff: HandoffId
) -> None:
    pack = pack_of(handoff)
    producer.pack(pack)
    again = RANK_0._replace(identity=b"again")
    producer.subscribe(handoff, 0, again)
    assert producer.answering.staged(staged_of(pack)) == (again, packed_of(pack))


def test_who_takes_a_rank_s_place_is_not_told_of_what_that_has_asked_for(
    producer: Producer, handoff: HandoffId
) -> None:
    """Another consumer counts its pieces from the same number on, and means others."""
    pack = pack_of(handoff)
    producer.pack(pack)
    producer.subscribe(handoff, 0, RANK_1)
    assert producer.answering.staged(staged_of(pack)) is None


@pytest.mark.parametrize("reason", [Reason.MISSING_BLOCKS, None])
def test_a_rank_whose_piece_cannot_be_made_is_refused(
    producer: Producer, handoff: HandoffId, reason: Reason | None
) -> None:
    staged = wire.Staged(handoff, RANK_0.incarnation, 0, 0, None, reason)
    answer = producer.answering.staged(staged)
    assert answer == (RANK_0, wire.Refuse(handoff, reason or Reason.INTERNAL))


def test_a_piece_of_an_earlier_epoch_is_told_to_nobody(
    producer: Producer, handoff: HandoffId
) -> None:
    """Its blocks may have been another's when it was written down."""
    pack = pack_of(handoff)
    producer.pack(pack)
    producer.table.withdraw(handoff, 1)
    assert producer.answering.staged(staged_of(pack)) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_a_piece_that_nobody_waits_for_is_told_to_nobody(producer: Producer, rank: int) -> None:
    handoff = producer.sealed()
    assert (
        producer.answering.staged(staged_of(pack_of(handoff, rank=rank, source_rank=rank))) is None
    )
    assert producer.answering.staged(staged_of(pack_of(new_handoff_id()))) is None


def test_a_piece_of_a_handoff_that_is_over_is_told_to_nobody(
    producer: Producer, handoff: HandoffId
) -> None:
    pack = pack_of(handoff)
    producer.pack(pack)
    producer.answering.cancel(handoff)
    assert producer.answering.staged(staged_of(pack)) is None


# --- when it is over -------------------------------------------------------------------------


def over(producer: Producer, handoff: HandoffId, how: str) -> None:
    match how:
        case "committed":
            producer.commit(handoff)
        case "cancelled":
            producer.answering.cancel(handoff)
        case "expired":
            producer.expire()
        case "dropped":
            producer.table.drop(handoff)
        case "used again":
            producer.queued("r2", handoff)


WAYS = ["committed", "cancelled", "expired", "dropped", "used again"]


@pytest.mark.parametrize("how", WAYS)
def test_the_rank_that_packed_is_told_once_when_the_handoff_is_over(
    producer: Producer, handoff: HandoffId, how: str
) -> None:
    for number in (1, 2):
        producer.pack(pack_of(handoff, number=number))
    assert producer.unpacked == []
    over(producer, handoff, how)
    assert producer.unpacked == [(handoff, 0)]
    producer.table.drop(handoff)
    assert producer.unpacked == [(handoff, 0)]


@pytest.mark.parametrize("how", ["committed", "cancelled", "expired"])
def test_so_it_is_after_the_seal(producer: Producer, handoff: HandoffId, how: str) -> None:
    producer.pack(pack_of(handoff))
    producer.table.seal(handoff, "r", TOKENS, BLOCKS)
    assert producer.unpacked == []
    over(producer, handoff, how)
    assert producer.unpacked == [(handoff, 0)]


@pytest.mark.parametrize("how", WAYS)
def test_a_rank_that_packed_nothing_is_told_nothing(
    producer: Producer, handoff: HandoffId, how: str
) -> None:
    over(producer, handoff, how)
    assert producer.unpacked == []


def test_every_rank_that_packed_is_told() -> None:
    producer = Producer(num_ranks=3)
    handoff = producer.sealed()
    for rank in (0, 2):
        producer.pack(pack_of(handoff, rank=rank, source_rank=rank))
    producer.answering.cancel(handoff)
    assert sorted(producer.unpacked) == [(handoff, 0), (handoff, 2)]


def test_one_rank_s_commit_takes_nothing_from_another() -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.sealed()
    for rank in (0, 1):
        producer.pack(pack_of(handoff, rank=rank, source_rank=rank))
    producer.commit(handoff, rank=0)
    assert producer.unpacked == []
    producer.commit(handoff, rank=1)
    assert sorted(producer.unpacked) == [(handoff, 0), (handoff, 1)]


def test_packing_does_not_keep_a_silent_consumer_s_handoff_alive(producer: Producer) -> None:
    """Only heartbeats of its scheduler, and its ranks' subscriptions, do."""
    handoff = producer.sealed()
    assert isinstance(producer.answering.want(handoff, SCHEDULER), wire.Offer)
    producer.clock.advance(LEASE_S / 2)
    producer.pack(pack_of(handoff))
    producer.clock.advance(LEASE_S / 2)
    producer.table.tick()
    assert producer.unpacked == [(handoff, 0)]
