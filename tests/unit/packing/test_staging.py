"""The staging memory, whatever is taken and given back in whichever order."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_pd_plugin.ids import RequestId
from vllm_pd_plugin.packing.staging import ALIGNMENT, Room, Staging, max_piece_bytes

MEMORY = 20 * ALIGNMENT
SIZE = st.integers(1, 8 * ALIGNMENT)


class AnyOrder(RuleBasedStateMachine):
    """What is taken does not overlap, and what is given back can be taken again."""

    def __init__(self) -> None:
        super().__init__()
        self.staging = Staging(MEMORY)
        self.taken: dict[int, int] = {}

    def free_stretches(self) -> list[int]:
        """How long each stretch is between what is taken, worked out anew."""
        starts = sorted(self.taken) + [MEMORY]
        ends = [0] + [start + aligned(self.taken[start]) for start in sorted(self.taken)]
        return [start - end for start, end in zip(starts, ends, strict=True)]

    @rule(size=SIZE)
    def take(self, size: int) -> None:
        is_room = max(self.free_stretches()) >= aligned(size)
        offset = self.staging.take(size)
        assert (offset is not None) == is_room
        if offset is None:
            return
        assert offset % ALIGNMENT == 0
        assert 0 <= offset <= MEMORY - size
        for start, length in self.taken.items():
            assert offset + size <= start or start + length <= offset, "two pieces overlap"
        self.taken[offset] = size

    @precondition(lambda self: self.taken)
    @rule(index=st.integers(0, 99))
    def give_back(self, index: int) -> None:
        offset = sorted(self.taken)[index % len(self.taken)]
        del self.taken[offset]
        self.staging.give_back(offset)

    @invariant()
    def what_is_taken_is_counted(self) -> None:
        assert self.staging.taken_bytes == sum(map(aligned, self.taken.values()))

    def teardown(self) -> None:
        for offset in self.taken:
            self.staging.give_back(offset)
        assert self.staging.taken_bytes == 0
        assert self.staging.take(MEMORY) == 0, "the gaps are not one again"


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


AnyOrder.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestWhateverIsTakenAndGivenBack = AnyOrder.TestCase


def test_the_first_gap_that_is_large_enough_is_taken() -> None:
    staging = Staging(10 * ALIGNMENT)
    small, _, large, _ = (staging.take(n * ALIGNMENT) for n in (1, 1, 3, 1))
    for offset in (small, large):
        assert offset is not None
        staging.give_back(offset)
    assert staging.take(2 * ALIGNMENT) == large
    assert staging.take(ALIGNMENT) == small


def test_no_memory_has_no_room() -> None:
    staging = Staging(0)
    assert staging.take(1) is None
    assert staging.max_piece_bytes == 0
    assert staging.taken_bytes == 0


def test_all_of_it_can_be_taken_at_once_and_not_a_byte_more() -> None:
    staging = Staging(MEMORY)
    assert staging.take(MEMORY + 1) is None
    assert staging.take(MEMORY) == 0
    assert staging.take(1) is None


def test_giving_back_what_is_not_taken_is_a_mistake() -> None:
    staging = Staging(MEMORY)
    with pytest.raises(KeyError):
        staging.give_back(0)


@pytest.mark.parametrize("num_bytes", [4096, 1_000_000, 32 * 2**20])
def test_four_of_the_largest_pieces_fit(num_bytes: int) -> None:
    staging = Staging(num_bytes)
    assert staging.max_piece_bytes == max_piece_bytes(num_bytes)
    assert staging.max_piece_bytes % ALIGNMENT == 0
    offsets = [staging.take(staging.max_piece_bytes) for _ in range(4)]
    assert None not in offsets
    assert staging.max_piece_bytes > num_bytes // 4 - ALIGNMENT


# --- a queue for room --------------------------------------------------------------------------

A, B, C = RequestId("a"), RequestId("b"), RequestId("c")


@pytest.fixture
def room() -> Room[RequestId]:
    return Room(Staging(4 * ALIGNMENT))


def taken(room: Room[RequestId], who: RequestId, units: int) -> int:
    offset = room.take(who, units * ALIGNMENT)
    assert offset is not None
    return offset


def test_who_asks_while_others_wait_waits_behind_them(room: Room[RequestId]) -> None:
    held = taken(room, A, 3)
    assert room.take(B, 2 * ALIGNMENT) is None
    assert room.take(C, ALIGNMENT) is None, "a small one passes a large one"
    assert room.next_up() is None, "nothing has changed"
    room.give_back(held)
    assert room.next_up() == B
    taken(room, B, 2)
    assert room.next_up() == C
    taken(room, C, 1)
    assert room.next_up() is None


def test_one_that_is_next_and_finds_no_room_stays_first(room: Room[RequestId]) -> None:
    held = [taken(room, A, 1) for _ in range(4)]
    assert room.take(B, 2 * ALIGNMENT) is None
    assert room.take(C, ALIGNMENT) is None
    room.give_back(held[0])
    assert room.next_up() == B
    assert room.take(B, 2 * ALIGNMENT) is None
    assert room.next_up() is None
    room.give_back(held[1])
    assert room.next_up() == B


def test_one_that_leaves_lets_the_next_try(room: Room[RequestId]) -> None:
    taken(room, A, 3)
    assert room.take(B, 2 * ALIGNMENT) is None
    assert room.take(C, ALIGNMENT) is None
    room.leave(B)
    assert room.next_up() == C
    room.leave(A)  # which does not wait
    assert room.next_up() is None


def test_one_that_waits_and_asks_again_waits_once(room: Room[RequestId]) -> None:
    held = taken(room, A, 4)
    for _ in range(3):
        assert room.take(B, ALIGNMENT) is None
    room.give_back(held)
    taken(room, B, 1)
    room.give_back(taken(room, C, 1))
    assert room.next_up() is None
