"""Writing pieces down for consumers, as long as there is room."""

from __future__ import annotations

import pytest

from tests.fakes.memory import BLOCK_BYTES
from tests.fakes.packing_rank import LARGE, TABLE, A, B, C, Rank, unstage
from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import Incarnation
from vllm_pd_plugin.packing.staging import ALIGNMENT
from vllm_pd_plugin.protocol import wire


@pytest.fixture
def rank() -> Rank:
    return Rank()


def test_a_piece_is_written_down_and_its_place_told(rank: Rank) -> None:
    rank.want(A, 7)
    staged = rank.packer.turn()
    size = 2 * 2 * BLOCK_BYTES
    packed = wire.Packed(A, 3, 7, 0, size, b"")
    assert staged == wire.Staged(A, Incarnation("consumer"), 0, 0, packed, None)
    content = rank.coder.outgoing[:size].reshape(4, BLOCK_BYTES)
    assert content.tolist() == [[block] * BLOCK_BYTES for block in (1, 2, 1, 2)]
    assert rank.packer.taken_bytes == ALIGNMENT
    assert rank.packer.turn() is None


def test_its_digest_is_told_if_it_is_asked_for(rank: Rank) -> None:
    rank.want(A, 1, digest=True)
    staged = rank.packer.turn()
    assert staged is not None
    assert staged.packed is not None
    assert staged.packed.digest == rank.coder.digest_outgoing(0, staged.packed.num_bytes) != b""


def test_pieces_are_written_down_one_at_a_time_first_come_first_served(rank: Rank) -> None:
    for handoff, number in [(A, 1), (B, 1), (A, 2)]:
        rank.want(handoff, number)
    rank.packer.turn()
    assert rank.coder.num_encoded == 1
    assert rank.packed() == [(B, 1), (A, 2)]


def test_a_piece_waits_for_room_and_those_behind_it_too(rank: Rank) -> None:
    for number in range(3):
        rank.want(A, number, layers=LARGE, num_tokens=16)
    rank.want(B, 1)
    assert rank.packed() == [(A, 0), (A, 1)]
    assert rank.packer.turn() is None
    rank.packer.unstage(unstage(A, 1))
    assert rank.packed() == [(A, 2)]
    rank.packer.unstage(unstage(A, 0))
    assert rank.packed() == [(B, 1)]


def test_consumers_take_turns(rank: Rank) -> None:
    for number in range(3):
        rank.want(A, number, "greedy")
    rank.want(B, 1, "modest")
    assert rank.packed() == [(A, 0), (B, 1), (A, 1)]


def test_consumers_that_do_not_read_leave_room_for_others(rank: Rank) -> None:
    for number in range(4):
        rank.want(A, number, "stopped", layers=LARGE, num_tokens=16)
        rank.want(B, number, "stopped too", layers=LARGE, num_tokens=16)
    assert rank.packed() == [(A, 0), (B, 0), (A, 1)]
    for number in range(4):
        rank.want(C, number, "reads", layers=LARGE, num_tokens=16)
        assert rank.packed() == [(C, number)]
        rank.packer.unstage(unstage(C, number, "reads"))
    assert rank.packer.taken_bytes == 3 * ALIGNMENT


def test_a_consumer_whose_pieces_are_gone_counts_as_one_that_holds_none(rank: Rank) -> None:
    rank.want(A, 1, "consumer", layers=LARGE, num_tokens=16)
    rank.packed()
    rank.packer.unstage(unstage(A, None))
    assert not rank.packer._held
    assert not rank.packer._waiting


# --- where writing takes its time -------------------------------------------------------------


def test_a_piece_is_told_of_when_it_is_written(rank: Rank) -> None:
    rank.coder.holds = True
    rank.want(A, 1)
    rank.want(B, 1)
    assert rank.packer.turn() is None
    assert rank.packer.is_writing
    assert rank.packer.turn() is None
    assert rank.coder.num_encoded == 1, "one at a time"
    rank.coder.finish()
    staged = rank.packer.turn()
    assert staged is not None
    assert staged.handoff_id == A
    assert rank.coder.outgoing[:BLOCK_BYTES].tolist() == [1] * BLOCK_BYTES


def test_a_piece_that_is_given_up_while_it_is_written_keeps_its_place_until_then(
    rank: Rank,
) -> None:
    rank.coder.holds = True
    rank.want(A, 1)
    rank.packer.turn()
    rank.packer.unstage(unstage(A, None))
    assert rank.packer.taken_bytes == ALIGNMENT
    rank.coder.finish()
    assert rank.packer.turn() is None
    assert rank.packer.taken_bytes == 0
    assert not rank.packer.is_writing


def test_what_waits_behind_a_piece_that_is_given_up_is_begun_at_once(rank: Rank) -> None:
    rank.coder.holds = True
    rank.want(A, 1)
    rank.packer.turn()
    rank.want(B, 1, "another")
    rank.packer.unstage(unstage(A, 1))
    rank.coder.finish()
    rank.coder.holds = False
    staged = rank.packer.turn()
    assert staged is not None, "nobody calls again before another message comes"
    assert staged.handoff_id == B


def test_a_piece_that_is_wanted_again_while_it_is_written_has_one_place(rank: Rank) -> None:
    rank.coder.holds = True
    rank.want(A, 1)
    rank.packer.turn()
    rank.want(A, 1)
    rank.coder.finish()
    rank.coder.holds = False
    assert rank.packed() == [(A, 1)]
    rank.packer.unstage(unstage(A, 1))
    assert rank.packer.taken_bytes == 0


def test_a_piece_that_is_wanted_again_after_it_was_given_up_is_written_again(rank: Rank) -> None:
    rank.coder.holds = True
    rank.want(A, 1)
    rank.packer.turn()
    rank.packer.unstage(unstage(A, 1))
    rank.want(A, 1)
    rank.coder.finish()
    rank.coder.holds = False
    assert rank.packed() == [(A, 1)]
    assert rank.packer.taken_bytes == ALIGNMENT


def test_a_device_that_fails_while_it_writes_is_answered_for(rank: Rank) -> None:
    class Broken:
        def is_done(self) -> bool:
            raise RuntimeError("the device is lost")

        def wait(self) -> None:
            raise AssertionError

    rank.coder.encode = lambda *_: Broken()  # type: ignore[method-assign,assignment,return-value]
    rank.want(A, 1)
    assert rank.refused() is Reason.INTERNAL
    assert rank.packer.taken_bytes == 0
    assert rank.packer.faults == 1


def test_what_is_not_wanted_any_more_is_not_written_down(rank: Rank) -> None:
    rank.want(A, 1)
    rank.want(B, 1)
    rank.packer.unstage(unstage(A, 1))
    assert rank.packed() == [(B, 1)]


def test_all_of_a_handoff_is_given_back_together(rank: Rank) -> None:
    for number in (1, 2):
        rank.want(A, number)
        rank.want(B, number, "another")
    rank.packed()
    rank.want(A, 3)
    rank.packer.unstage(unstage(A, None))
    assert rank.packed() == []
    assert rank.packer.taken_bytes == 2 * ALIGNMENT
    rank.packer.unstage(unstage(B, None))
    assert rank.packer.taken_bytes == 0


def test_clearing_frees_all_and_forgets_what_waits(rank: Rank) -> None:
    for number in range(6):
        rank.want(A, number)
    rank.packed()
    rank.packer.clear()
    assert rank.packer.taken_bytes == 0
    assert rank.packer.turn() is None
    rank.want(B, 1)
    assert rank.packed() == [(B, 1)]


@pytest.mark.parametrize("number", [1, None])
def test_giving_back_what_is_not_there_does_nothing(rank: Rank, number: int | None) -> None:
    rank.want(B, 1)
    rank.packed()
    rank.packer.unstage(unstage(A, number))
    rank.packer.unstage(unstage(A, number))
    assert rank.packer.taken_bytes == ALIGNMENT


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": (wire.LayerRun(1, 0, 2),)}, Reason.MISSING_BLOCKS),
        ({"layers": (wire.LayerRun(2, 0, 9),), "num_tokens": 36}, Reason.MISSING_BLOCKS),
        ({"layers": (wire.LayerRun(2, 0, 2**64 - 1),)}, Reason.MISSING_BLOCKS),
        ({"layers": (wire.LayerRun(2, 0, 0),)}, Reason.MISSING_BLOCKS),
        ({"layers": ()}, Reason.MISSING_BLOCKS),
        ({"num_tokens": 0}, Reason.MISSING_BLOCKS),
        ({"codec": Codec.INT4}, Reason.INTERNAL),
        ({"layers": (wire.LayerRun(2, 0, 5),), "num_tokens": 20}, Reason.INTERNAL),  # too large
    ],
    ids=str,
)
def test_a_malformed_request_is_answered_with_a_reason_and_takes_no_memory(
    rank: Rank, changes: dict[str, object], reason: Reason
) -> None:
    rank.want(A, 1, **changes)
    rank.want(B, 1)
    assert rank.refused() is reason
    assert rank.packer.taken_bytes == 0
    assert rank.packed() == [(B, 1)]


def test_a_coder_that_refuses_is_answered_for_and_leaves_no_memory_taken(rank: Rank) -> None:
    rank.coder.refuses = True
    rank.want(A, 1)
    assert rank.refused() is Reason.INTERNAL
    assert rank.packer.taken_bytes == 0
    rank.coder.refuses = False
    rank.want(A, 1)
    assert rank.packed() == [(A, 1)]


def test_the_same_piece_of_two_handoffs_is_two_pieces(rank: Rank) -> None:
    rank.want(A, 1)
    rank.want(B, 1)
    assert rank.packed() == [(A, 1), (B, 1)]
    assert rank.packer.taken_bytes == 2 * ALIGNMENT


# The answer may have been lost; or the piece may just be read, and its place must stay its own.
def test_a_piece_that_is_wanted_again_keeps_its_place_and_is_told_again(rank: Rank) -> None:
    rank.want(A, 1)
    first = rank.packer.turn()
    assert first is not None
    rank.memory.fill(TABLE, 0xEE)
    rank.want(A, 1)
    rank.want(B, 1)
    assert rank.packer.turn() == first
    assert rank.coder.num_encoded == 1
    assert rank.packer.taken_bytes == ALIGNMENT
    assert rank.packed() == [(B, 1)]
    rank.packer.unstage(unstage(A, 1))
    assert rank.packer.taken_bytes == ALIGNMENT


def test_a_piece_that_is_wanted_twice_while_it_waits_is_written_down_once(rank: Rank) -> None:
    for _ in range(3):
        rank.want(A, 1)
    assert rank.packed() == [(A, 1)]
    assert rank.packer.taken_bytes == ALIGNMENT


@pytest.mark.parametrize("number", [1, None])
def test_a_piece_that_was_wanted_again_and_then_not_any_more_is_not_told(
    rank: Rank, number: int | None
) -> None:
    rank.want(A, 1)
    rank.packed()
    rank.want(A, 1)
    rank.packer.unstage(unstage(A, number))
    assert rank.packer.turn() is None
    assert rank.packer.taken_bytes == 0


def test_a_refused_piece_leaves_others_of_its_handoff_alone(rank: Rank) -> None:
    rank.want(A, 1)
    rank.packed()
    rank.want(A, 2, layers=())
    assert rank.refused() is Reason.MISSING_BLOCKS
    assert rank.packer.taken_bytes == ALIGNMENT


def test_a_piece_can_be_had_again_after_it_was_given_back(rank: Rank) -> None:
    for _ in range(2):
        rank.want(A, 1)
        assert rank.packed() == [(A, 1)]
        rank.packer.unstage(unstage(A, 1))
