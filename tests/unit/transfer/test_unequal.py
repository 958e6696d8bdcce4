"""One engine computes a prompt while another of another shape fetches it: what is usable is right,
in every element, and nothing is late, or lost, or touched that is somebody else's."""

from __future__ import annotations

import pytest

from tests.fakes.shapes import Shape
from tests.fakes.unequal import PROMPT, Request, UnequalPair
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.packing.incoming import Packing
from vllm_pd_plugin.transfer import peer_reads

ONE = Shape()
STAGES = ((0, 1), (2,))
PAIRS = {
    "one rank to two": (ONE, Shape(tp=2)),
    "two ranks to one": (Shape(tp=2), ONE),
    "two ranks to four": (Shape(tp=2), Shape(tp=4)),
    "more ranks than heads": (Shape(tp=8), Shape(tp=2)),
    "two stages to one": (Shape(stages=STAGES), ONE),
    "one stage to two": (ONE, Shape(stages=STAGES)),
    "stages cut elsewhere": (Shape(stages=STAGES), Shape(stages=((0,), (1, 2)))),
    "two by two to one": (Shape(tp=2, stages=STAGES), ONE),
    "one to two by two": (ONE, Shape(tp=2, stages=STAGES)),
    "small blocks to large": (Shape(block_tokens=4), Shape(block_tokens=8)),
    "large blocks to small": (Shape(block_tokens=8), Shape(block_tokens=4)),
    "blocks that do not divide each other": (Shape(block_tokens=6), Shape(block_tokens=4)),
    "float32 to bfloat16": (Shape(dtype="float32"), ONE),
    "bfloat16 to float32": (ONE, Shape(dtype="float32")),
    "heads between others": (Shape(form="token major"), Shape(tp=2)),
    "tiles to rows": (Shape(form="tiles"), Shape(block_tokens=8)),
    "everything": (
        Shape(tp=2, stages=STAGES, block_tokens=8, dtype="float32"),
        Shape(tp=4, stages=((0,), (1, 2)), form="columns"),
    ),
}
ALL_PAIRS = pytest.mark.parametrize("shapes", PAIRS.values(), ids=PAIRS.keys())
Shapes = tuple[Shape, Shape]


def stream(pair: UnequalPair, chunk: int = 5) -> None:
    """The prompt is computed chunk by chunk, layer by layer, and all that is said arrives."""
    pair.settle()
    while pair.computed < pair.request.num_tokens:
        pair.schedule(chunk)
        while any(pair.passes.values()):
            for rank in pair.passes:
                pair.write(rank)
                pair.settle()
    pair.seal()
    pair.settle()


def assert_all_is_well(pair: UnequalPair) -> None:
    assert pair.reasons == [None] * len(pair.consumer.ranks)
    pair.close()
    assert pair.is_released
    assert pair.leaks() == {}


# --- whatever the shapes -----------------------------------------------------------------------


@pytest.mark.parametrize("packing", Packing)
@ALL_PAIRS
def test_a_prompt_is_handed_off_while_it_is_computed(shapes: Shapes, packing: Packing) -> None:
    pair = UnequalPair(*shapes, Request(21), packing)
    stream(pair)
    assert_all_is_well(pair)


@ALL_PAIRS
def test_a_prompt_is_handed_off_once_it_is_complete(shapes: Shapes) -> None:
    pair = UnequalPair(*shapes, Request(21))
    pair.compute(21)
    pair.seal()
    pair.settle()
    assert_all_is_well(pair)


@pytest.mark.parametrize("packing", [Packing.ALWAYS, Packing.NEVER])
@ALL_PAIRS
def test_a_stretch_that_is_planned_in_parts_is_all_read(
    shapes: Shapes, packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of a long prompt is, whether it can be read as it lies or not."""
    monkeypatch.setattr(peer_reads, "_MAX_BLOCKS", 2)
    pair = UnequalPair(*shapes, Request(21), packing)
    pair.compute(21)
    pair.seal()
    pair.settle()
    assert_all_is_well(pair)


@ALL_PAIRS
def test_what_the_consumer_has_is_not_fetched_again(shapes: Shapes) -> None:
    """Eight tokens are whole blocks of any size here."""
    pair = UnequalPair(*shapes, Request(27, first_token=8))
    stream(pair)
    assert_all_is_well(pair)


@ALL_PAIRS
def test_a_prompt_that_is_computed_anew_is_fetched_anew(shapes: Shapes) -> None:
    """Its blocks are somebody else's when the consumer learns of it."""
    pair = UnequalPair(*shapes, Request(21))
    pair.settle()
    pair.compute(13)
    pair.settle()
    pair.preempt()
    stream(pair)
    assert pair.num_epochs == 2
    assert_all_is_well(pair)


@ALL_PAIRS
def test_bytes_are_compared_where_engines_are_not_alike(shapes: Shapes) -> None:
    pair = UnequalPair(*shapes, Request(21), checks_bytes=True)
    stream(pair)
    assert_all_is_well(pair)


@ALL_PAIRS
def test_a_rank_whose_bytes_are_not_what_was_written_down_fails(shapes: Shapes) -> None:
    pair = UnequalPair(*shapes, Request(21), Packing.ALWAYS, checks_bytes=True)
    for rank in pair.producer.ranks:
        rank.coder.digest_outgoing = lambda *_: b"another"  # type: ignore[method-assign]
    stream(pair)
    assert Reason.DIGEST_MISMATCH in pair.reasons
    pair.close()
    assert pair.leaks() == {}


# --- what is not read too early, nor used too late --------------------------------------------


def test_nothing_of_a_stage_is_read_before_that_stage_has_written_it() -> None:
    pair = UnequalPair(Shape(stages=STAGES), ONE, Request(8))
    pair.settle()
    pair.schedule(8)
    pair.write(0)
    pair.write(0)
    pair.settle()
    (here,) = pair.consumer.ranks
    whole = range(8)
    assert [here.has(PROMPT, pair.blocks, whole, region) for region in range(3)] == [
        True, True, False,
    ]  # fmt: skip
    pair.write(1)
    pair.settle()
    assert here.has(PROMPT, pair.blocks, whole, 2)


def test_a_stage_with_more_layers_than_the_first_tells_of_each_of_them() -> None:
    layers = tuple(range(4))
    pair = UnequalPair(Shape(stages=((0,), layers[1:])), Shape(stages=(layers,)), Request(8))
    pair.settle()
    pair.schedule(8)
    (here,) = pair.consumer.ranks
    for layer in layers[1:]:
        pair.write(1)
        pair.settle()
        assert here.has(PROMPT, pair.blocks, range(8), layer)


def test_nothing_is_read_before_the_slowest_rank_has_written_it() -> None:
    pair = UnequalPair(Shape(tp=2), ONE, Request(8))
    pair.settle()
    pair.schedule(8)
    for _ in range(3):
        pair.write(0)
        pair.settle()
    assert [rank.transport.num_posted for rank in pair.consumer.ranks] == [0]
    pair.write(1)
    pair.settle()
    (here,) = pair.consumer.ranks
    assert here.has(PROMPT, pair.blocks, range(8), 0)
    assert here.transport.num_posted


def test_a_rank_of_the_consumer_does_not_wait_for_ranks_it_does_not_read_from() -> None:
    pair = UnequalPair(Shape(tp=2), Shape(tp=4), Request(8))
    pair.settle()
    pair.schedule(8)
    for _ in range(3):
        pair.write(0)
    pair.settle()
    assert [rank.transport.num_posted > 0 for rank in pair.consumer.ranks] == [
        True, True, False, False,
    ]  # fmt: skip


def test_blocks_are_held_until_every_rank_of_the_consumer_has_read() -> None:
    pair = UnequalPair(ONE, Shape(tp=2), Request(21))
    pair.consumer.ranks[1].transport.holds_reads = True
    stream(pair)
    first, second = pair.consumer.ranks
    assert first.results
    assert not second.results
    assert not pair.is_released
    second.transport.finish_reads()
    second.transport.holds_reads = False
    pair.settle()
    assert_all_is_well(pair)


def test_the_prefix_that_has_arrived_is_told_when_the_last_share_has() -> None:
    """Reads of one rank are done, those of the other are not."""
    pair = UnequalPair(Shape(tp=2), ONE, Request(21), Packing.NEVER)
    (here,) = pair.consumer.ranks
    here.transport.holds_reads = True
    pair.settle()
    pair.compute(16)
    pair.settle()
    (reading,) = here.plane._fetches["c"].readings
    reads = reading._reads  # type: ignore[attr-defined]
    assert here.transport.num_posted == 2
    here.transport.finish_one(0)
    here.turn()
    assert reads.arrived_tokens == 0
    here.transport.finish_one(0)
    here.turn()
    assert reads.arrived_tokens == 16


def test_a_read_that_fails_closes_the_connections_to_all_ranks_of_the_peer() -> None:
    pair = UnequalPair(Shape(tp=2), ONE, Request(21), Packing.NEVER, holds_reads=True)
    (here,) = pair.consumer.ranks
    pair.compute(21)
    pair.seal()
    pair.settle()
    assert len(here.transport.connected) == 2
    here.transport.fail_reads()
    pair.settle()
    assert pair.reasons == [Reason.READ_FAILED]
    assert not here.transport.connected
    assert here.transport.unfinished == []
    pair.close()
    assert pair.leaks() == {}


def test_the_whole_engine_gives_up_what_one_of_its_ranks_could_not_read() -> None:
    pair = UnequalPair(ONE, Shape(tp=2), Request(21), Packing.NEVER, holds_reads=True)
    pair.compute(21)
    pair.seal()
    pair.settle()
    first, second = pair.consumer.ranks
    first.transport.finish_reads()
    first.transport.holds_reads = False
    second.transport.fail_reads()
    pair.settle()
    assert pair.reasons == [None, Reason.READ_FAILED]
    assert not pair.is_released
    pair.close()
    assert pair.is_released
    assert pair.leaks() == {}


# --- windows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [Packing.AUTO, Packing.ALWAYS])
@pytest.mark.parametrize("num_tokens", range(17, 33))
@pytest.mark.parametrize("blocks", [(4, 8), (8, 4), (4, 4), (4, 6)])
@pytest.mark.parametrize("is_complete", [False, True])
def test_a_window_is_handed_off_between_blocks_of_any_sizes(
    is_complete: bool, blocks: tuple[int, int], num_tokens: int, packing: Packing
) -> None:
    """What the producer's window has left behind is another's at once. A block of ours that begins
    before what is left there is told to lack tokens, and no other is."""
    theirs, ours = (Shape(block_tokens=size, windowed=(1,)) for size in blocks)
    pair = UnequalPair(theirs, ours, Request(num_tokens), packing)
    if is_complete:
        pair.compute(num_tokens)
        pair.seal()
        pair.settle()
    else:
        stream(pair)
    first = num_tokens - theirs.window
    begins, kept = first // blocks[1] * blocks[1], first // blocks[0] * blocks[0]
    assert pair.lacks_tokens == [begins < kept]
    assert_all_is_well(pair)


def test_a_stage_without_layers_of_a_group_hands_off_what_it_has() -> None:
    theirs = Shape(tp=2, stages=STAGES, windowed=(2,))
    ours = Shape(stages=((0,), (1, 2)), windowed=(2,), block_tokens=8)
    for pair in (UnequalPair(theirs, ours, Request(22)), UnequalPair(ours, theirs, Request(22))):
        stream(pair)
        assert_all_is_well(pair)
