"""Writing pieces down for several ranks of a consumer, and for one that takes another's place."""

from __future__ import annotations

import pytest

from tests.fakes.packing_rank import LARGE, A, Rank, unstage
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import Incarnation
from vllm_pd_plugin.packing.staging import ALIGNMENT
from vllm_pd_plugin.protocol import wire


@pytest.fixture
def rank() -> Rank:
    return Rank()


def test_ranks_of_a_consumer_may_use_the_same_numbers(rank: Rank) -> None:
    """Each counts for itself."""
    rank.want(A, 1, rank=0)
    rank.want(A, 1, rank=1, layers=LARGE, num_tokens=16)
    first, second = rank.packer.turn(), rank.packer.turn()
    assert first is not None
    assert second is not None
    assert (first.rank, second.rank) == (0, 1)
    assert first.packed is not None
    assert second.packed is not None
    assert (first.packed.num_bytes, second.packed.num_bytes) == (128, 256)
    assert first.packed.offset != second.packed.offset


def test_what_one_rank_has_read_another_may_still_want(rank: Rank) -> None:
    rank.want(A, 1, rank=0)
    rank.want(A, 1, rank=1)
    assert rank.packed() == [(A, 1), (A, 1)]
    rank.packer.unstage(wire.Unstage(A, Incarnation("consumer"), 1, 1))
    assert rank.packer.taken_bytes == ALIGNMENT
    rank.want(A, 1, rank=0)
    staged = rank.packer.turn()
    assert staged is not None
    assert staged.packed == wire.Packed(A, 3, 1, 0, 128, b"")
    assert (staged.rank, staged.consumer) == (0, "consumer")
    assert rank.coder.num_encoded == 2, "it is there still"
    rank.packer.unstage(wire.Unstage(A))
    assert rank.packer.taken_bytes == 0


def test_what_one_rank_does_not_want_any_more_another_gets_all_the_same(rank: Rank) -> None:
    rank.want(A, 1, rank=0)
    rank.want(A, 1, rank=1)
    rank.packer.unstage(unstage(A, 1))
    staged = rank.packer.turn()
    assert staged is not None
    assert staged.rank == 1
    assert rank.packer.turn() is None


def test_an_answer_says_which_rank_here_it_is_of(rank: Rank) -> None:
    rank.want(A, 1, source_rank=5)
    rank.want(A, 2, source_rank=5, layers=())
    staged = rank.packer.turn()
    assert staged is not None
    assert staged.source_rank == 5
    refused = rank.packer.turn()
    assert refused is not None
    assert (refused.source_rank, refused.reason) == (5, Reason.MISSING_BLOCKS)


def test_the_same_piece_of_two_consumers_is_two_pieces(rank: Rank) -> None:
    """One may have taken the other's place at the same handoff, and counts from the same number."""
    rank.want(A, 1, "one")
    rank.want(A, 1, "other", layers=(wire.LayerRun(2, 0, 1),), num_tokens=4)
    first, second = rank.packer.turn(), rank.packer.turn()
    assert first is not None
    assert second is not None
    assert (first.consumer, second.consumer) == ("one", "other")
    assert rank.coder.num_encoded == 2
    rank.packer.unstage(unstage(A, 1, "one"))
    assert rank.packer.taken_bytes == ALIGNMENT, "the other may be reading its own"
