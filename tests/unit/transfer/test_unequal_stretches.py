"""What a consumer knows to be final at a producer of another shape, and takes from it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.shapes import Shape
from tests.unit.transfer.test_asked import said
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.ids import HandoffId
from vllm_pd_plugin.mapping.route import Route, find_route
from vllm_pd_plugin.memory.layout import Region
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.transfer.stretches import Stretches

ONE = Shape()
STAGES = Shape(stages=((0, 1), (2,)))
NOTHING = range(0)


class Fetch:
    """Stretches of the only rank of ``ours``, and its route."""

    def __init__(self, theirs: Shape, ours: Shape, num_tokens: int, first_token: int = 0) -> None:
        self.num_tokens, self.ours, self.theirs = num_tokens, ours, theirs
        self.route: Route = find_route(said(theirs), said(ours), 0)
        tables = [[10 + i for i in range(32)]] * ours.num_groups
        regions = [Region(0, 64, ours.page_bytes, ours.page_bytes)] * 3
        remote = [Region(0, 64, theirs.page_bytes, theirs.page_bytes)] * 3
        ranks = {rank: remote for rank in self.route.source_ranks}
        layout = ours.layout(0)
        self.stretches = Stretches(
            layout, self.route, (tables, regions), ranks, first_token, num_tokens
        )

    def learn(self, *written: tuple[int, int, int], epoch: int = 0) -> None:
        tables = tuple(
            wire.TableSlice(0, tuple(range(1, 33))) for _ in range(self.theirs.num_groups)
        )
        progress = wire.Progress(
            HandoffId("h"), epoch, tuple(wire.Written(*one) for one in written), tables
        )
        assert self.stretches.learn(progress)

    def taken(self, *written: tuple[int, int, int], epoch: int = 0) -> list[range]:
        """Learn, and take what is final; positions for each layer."""
        self.learn(*written, epoch=epoch)
        return list(self.stretches.take() or (NOTHING,) * 3)

    def tokens(self) -> list[list[range]]:
        """Take all that there is, once it is sealed; tokens of each share's layers."""
        self.learn(*[(self.num_tokens, self.num_tokens, 3)] * len(self.theirs.stages))
        stretch = self.stretches.take()
        assert stretch is not None
        return [self.stretches.tokens_of(stretch, share) for share in self.route.shares]


# --- stages ------------------------------------------------------------------------------------


def test_each_layer_is_as_far_as_its_stage() -> None:
    fetch = Fetch(STAGES, ONE, 12)
    assert fetch.taken((4, 8, 1), (0, 0, 0)) == [range(2), range(1), NOTHING]
    assert fetch.taken((4, 8, 1), (4, 12, 1)) == [NOTHING, NOTHING, range(3)]
    assert fetch.taken((8, 8, 2), (12, 12, 1)) == [NOTHING, range(1, 2), NOTHING]


def test_a_layer_is_counted_among_those_of_its_stage() -> None:
    """The last layer is the first of the second stage, and the third of one."""
    assert Fetch(STAGES, ONE, 8).taken((0, 0, 0), (0, 8, 1)) == [NOTHING, NOTHING, range(2)]
    assert Fetch(ONE, ONE, 8).taken((0, 8, 2)) == [range(2), range(2), NOTHING]


def test_a_prefix_is_as_long_as_the_slowest_stage_s() -> None:
    fetch = Fetch(STAGES, ONE, 12)
    fetch.taken((12, 12, 2), (4, 8, 0))
    assert fetch.stretches.taken_tokens == 4
    assert not fetch.stretches.is_exhausted


def test_a_message_that_lacks_a_stage_is_of_no_use() -> None:
    fetch = Fetch(STAGES, ONE, 12)
    with pytest.raises(HandoffError, match="how far pipeline stage 1 is") as failure:
        fetch.learn((8, 8, 2))
    assert failure.value.reason is Reason.MISSING_BLOCKS


def test_stages_that_have_nothing_for_us_need_not_be_told_of() -> None:
    ours = Shape(stages=((0, 1), (2,)))
    fetch = Fetch(STAGES, ours, 8)
    fetch.learn((8, 8, 2))
    assert fetch.stretches.take() == (range(2), range(2))


def test_all_is_written_when_every_stage_has_written_its_last_layer() -> None:
    """A rank with the first layers only has all that it wants before the producer grants it."""
    fetch = Fetch(STAGES, ONE, 12)
    for written, is_written in (
        ([(12, 12, 2), (8, 12, 0)], False),
        ([(8, 12, 1), (12, 12, 1)], False),
        ([(12, 12, 2), (12, 12, 1)], True),
        ([(12, 12, 2), (8, 12, 0)], True),  # an earlier message that came twice
    ):
        fetch.learn(*written)
        assert fetch.stretches.is_written is is_written
    first = Fetch(ONE, STAGES, 12)
    first.learn((8, 12, 2))
    assert first.stretches.take() == (range(3), range(3))
    assert first.stretches.is_exhausted
    assert not first.stretches.is_written
    first.learn((12, 12, 3))
    assert first.stretches.is_written


def test_a_seal_says_that_all_is_written_and_a_new_epoch_that_it_is_not() -> None:
    fetch = Fetch(STAGES, ONE, 12)
    fetch.learn((12, 12, 2), (12, 12, 1))
    fetch.learn((4, 4, 2), (4, 4, 1), epoch=1)
    assert not fetch.stretches.is_written
    table = (wire.TableSlice(0, (1, 2, 3)),)
    fetch.stretches.learn(wire.Seal(HandoffId("h"), 1, 12, table))
    assert fetch.stretches.is_written


# --- blocks of other sizes -----------------------------------------------------------------------


def test_what_is_final_counts_in_our_blocks() -> None:
    large, small = Shape(block_tokens=8), Shape(block_tokens=4)
    fetch = Fetch(large, small, 20)
    assert fetch.taken((5, 5, 3)) == [range(1)] * 3
    assert fetch.taken((15, 15, 3)) == [range(1, 3)] * 3
    assert fetch.taken((20, 20, 3)) == [range(3, 5)] * 3
    fetch = Fetch(small, large, 20)
    assert fetch.taken((7, 7, 3)) == [NOTHING] * 3
    assert fetch.taken((8, 8, 3)) == [range(1)] * 3
    assert fetch.taken((20, 20, 3)) == [range(1, 3)] * 3


@pytest.mark.parametrize("blocks", [(8, 4), (4, 8), (6, 4)])
def test_without_windows_exactly_what_is_wanted_is_taken(blocks: tuple[int, int]) -> None:
    theirs, ours = (Shape(block_tokens=size) for size in blocks)
    fetch = Fetch(theirs, ours, 21, first_token=8)
    assert fetch.tokens() == [[range(8, 21)] * 3]
    assert not fetch.stretches.lacks_tokens


SIZE = st.sampled_from([1, 2, 3, 4, 6, 8, 16])


@settings(max_examples=400)
@given(theirs=SIZE, ours=SIZE, window=st.integers(1, 24), n=st.integers(1, 64), skip=st.integers(0))
def test_of_a_window_what_the_producer_keeps_is_taken_and_what_it_lets_go_of_is_lacking(
    theirs: int, ours: int, window: int, n: int, skip: int
) -> None:
    first_token = skip % (1 + (n - 1) // ours) * ours
    shapes = (Shape(block_tokens=size, windowed=(1,), window=window) for size in (theirs, ours))
    fetch = Fetch(*shapes, n, first_token)
    # Tokens of our blocks that are not wholly before the window, and those of theirs.
    needed = range(max(first_token, n - window), n)
    here = {token for token in range(first_token, n) if token // ours >= needed.start // ours}
    kept = {token for token in range(n) if token // theirs >= max(0, n - window) // theirs}
    full, of_window = fetch.tokens()
    assert full == [range(first_token, n)] * 2
    assert set(of_window[0]) == here & kept >= set(needed)
    assert fetch.stretches.lacks_tokens is bool(here - kept)


def test_a_window_that_reaches_past_the_start_lacks_nothing() -> None:
    theirs, ours = (Shape(block_tokens=size, windowed=(1,), window=40) for size in (4, 16))
    fetch = Fetch(theirs, ours, 21)
    assert fetch.tokens()[1] == [range(21)]
    assert not fetch.stretches.lacks_tokens
