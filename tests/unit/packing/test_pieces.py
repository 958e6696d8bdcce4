"""Which KV is in a piece, how large it is, and what a peer may have of it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from tests.fakes.engines import make_layout
from vllm_pd_plugin.codecs.codec import SINK_TOKENS, TOKEN_GROUP, Codec, Part, row_bytes
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.memory.layout import Group, RankLayout, Region, Stretch
from vllm_pd_plugin.packing.pieces import Piece, Pieces, Slice, blocks_at
from vllm_pd_plugin.protocol.wire import LayerRun

T = 16
HEADS, WIDTH = 2, 64
BLOCK_BYTES = HEADS * T * 2 * WIDTH * 2
NUM_BLOCKS = 100
PARTS = (Part.of_rows("key", WIDTH, 0, 2 * WIDTH), Part.of_rows("value", WIDTH, WIDTH, 2 * WIDTH))


def group(*layers: str, tokens: int = T, parts: tuple[Part, ...] = PARTS) -> Group:
    """Blocks of bfloat16 keys and values, as many bytes whatever the number of their tokens."""
    shape = (HEADS * T // tokens, tokens, 2 * WIDTH)
    return Group("full", tokens, None, layers, shape, "bfloat16", parts=parts)


# Regions 0 and 1 are layers 1 and 3 of the model, regions 2 to 4 layers 0, 2 and 4.
LAYOUT = make_layout(groups=[group("l.1", "l.3"), group("l.0", "l.2", "l.4", tokens=32)])
ORDER = [2, 0, 3, 1, 4]
GROUP_OF = [0, 0, 1, 1, 1]
NOTHING = range(0)


def pieces_of(layout: RankLayout = LAYOUT) -> Pieces:
    region = Region(0, NUM_BLOCKS, BLOCK_BYTES, BLOCK_BYTES)
    return Pieces(layout, [region] * len(layout.layers))


PIECES = pieces_of()


def stretch(**layers: range) -> Stretch:
    """Positions of some regions, given as ``r0`` and so on."""
    return tuple(layers.get(f"r{region}", NOTHING) for region in range(5))


# --- what is in a piece ----------------------------------------------------------------------


def test_layers_of_a_group_that_need_the_same_positions_are_one_slice() -> None:
    piece = PIECES.piece(stretch(r0=range(2), r1=range(2), r3=range(1, 3)), 90, Codec.RAW)
    assert piece.slices == (
        Slice(0, (0, 1), range(2), 32),
        Slice(1, (3,), range(1, 3), 58),  # tokens 32 to 90
    )


def test_layers_of_a_group_that_need_others_are_slices_of_their_own() -> None:
    piece = PIECES.piece(stretch(r0=range(3), r1=range(2)), 40, Codec.RAW)
    assert piece.slices == (Slice(0, (0,), range(3), 40), Slice(0, (1,), range(2), 32))


def test_raw_pieces_have_whole_blocks() -> None:
    piece = PIECES.piece(stretch(r0=range(3), r1=range(3), r2=range(1)), 33, Codec.RAW)
    assert piece.num_bytes == piece.kv_bytes == 7 * BLOCK_BYTES


def test_the_bytes_of_a_lossy_piece_are_those_of_its_rows() -> None:
    piece = PIECES.piece(stretch(r0=range(3), r1=range(3), r2=range(1, 2)), 45, Codec.INT4)
    expected = 2 * HEADS * row_bytes(Codec.INT4, PARTS, 45, SINK_TOKENS)
    expected += HEADS // 2 * row_bytes(Codec.INT4, PARTS, 13, 0)
    assert piece.num_bytes == expected
    assert piece.kv_bytes == 7 * BLOCK_BYTES


@pytest.mark.parametrize(("start", "sinks"), [(0, SINK_TOKENS), (1, 0), (2, 0)])
def test_only_the_first_tokens_of_a_sequence_are_sinks(start: int, sinks: int) -> None:
    assert Slice(0, (0,), range(start, start + 1), T).sinks == sinks


# --- splitting -------------------------------------------------------------------------------

RANGES = st.tuples(st.integers(0, 6), st.integers(0, 9)).map(lambda r: range(r[0], r[0] + r[1]))
STRETCHES = st.tuples(*[RANGES] * 5)
END = 15 * T  # of the group of smaller blocks; the other's layers are cut to it


def within(wanted: Stretch, num_tokens: int) -> Stretch:
    """Without what lies behind the last token."""
    ends = [-(-num_tokens // LAYOUT.groups[GROUP_OF[layer]].block_tokens) for layer in range(5)]
    return tuple(
        range(positions.start, max(positions.start, min(positions.stop, end)))
        for positions, end in zip(wanted, ends, strict=True)
    )


@settings(max_examples=200, deadline=None)
@given(STRETCHES, st.integers(1, END), st.sampled_from(Codec), st.integers(BLOCK_BYTES, 10**6))
def test_a_split_has_each_position_once_in_pieces_that_fit(
    wanted: Stretch, num_tokens: int, codec: Codec, max_bytes: int
) -> None:
    wanted = within(wanted, num_tokens)
    parts = PIECES.split(wanted, num_tokens, codec, max_bytes)
    sizes = [PIECES.piece(part, num_tokens, codec).num_bytes for part in parts]
    assert all(0 < size <= max_bytes for size in sizes)
    places = [
        (ORDER.index(layer), position)
        for part in parts
        for layer in ORDER
        for position in part[layer]
    ]
    expected = [(place, i) for place, layer in enumerate(ORDER) for i in wanted[layer]]
    assert places == expected, "not each once, in the order of the forward pass"
    whole = PIECES.piece(wanted, num_tokens, codec).num_bytes
    if whole <= max_bytes:
        assert len(parts) <= 1


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 15), st.sampled_from(Codec), st.integers(3 * BLOCK_BYTES, 10**6))
def test_a_layer_is_cut_between_groups_of_tokens(
    num_blocks: int, codec: Codec, max_bytes: int
) -> None:
    """What does not fill a group takes eight bits a channel."""
    parts = PIECES.split(stretch(r0=range(num_blocks)), num_blocks * T, codec, max_bytes)
    for part in parts[:-1]:
        assert len(part[0]) * T % TOKEN_GROUP == 0


def test_no_piece_is_smaller_than_it_need_be() -> None:
    wanted = stretch(r0=range(4), r1=range(4), r2=range(2), r3=range(2), r4=range(2))
    parts = PIECES.split(wanted, 64, Codec.RAW, 6 * BLOCK_BYTES)
    assert parts == [
        stretch(r2=range(2), r0=range(4)),
        stretch(r3=range(2), r1=range(4)),
        stretch(r4=range(2)),
    ]


def test_nothing_is_split_into_nothing() -> None:
    assert PIECES.split(stretch(), 64, Codec.RAW, 10**6) == []


def test_a_block_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(HandoffError, match="raise staging_bytes") as caught:
        PIECES.split(stretch(r0=range(2)), 32, Codec.RAW, BLOCK_BYTES - 1)
    assert caught.value.reason is Reason.INTERNAL


# --- as a peer is told -----------------------------------------------------------------------


def test_layers_are_told_in_the_order_of_the_forward_pass() -> None:
    wanted = stretch(r0=range(1, 3), r1=range(2), r2=range(1, 3), r3=range(2), r4=NOTHING)
    assert PIECES.layer_runs(wanted) == (
        LayerRun(2, 1, 3),  # regions 2 and 0
        LayerRun(2, 0, 2),  # regions 3 and 1
        LayerRun(1, 0, 0),
    )


@given(STRETCHES)
def test_what_a_peer_is_told_is_what_it_understands(wanted: Stretch) -> None:
    assert PIECES.stretch(PIECES.layer_runs(wanted)) == wanted


@given(STRETCHES)
def test_all_layers_alike_are_told_in_one_run(wanted: Stretch) -> None:
    assert len(PIECES.layer_runs((wanted[0],) * 5)) == 1


# --- what a peer must not get ----------------------------------------------------------------

TABLES = ([7, 3, 9, 4], [0, 5])
ALL = (LayerRun(5, 1, 2),)


def refusal(
    runs: Sequence[LayerRun],
    num_tokens: int = 64,
    codec: Codec = Codec.RAW,
    tables: Sequence[Sequence[int]] = TABLES,
    layout: RankLayout = LAYOUT,
) -> Reason:
    with pytest.raises(HandoffError) as caught:
        pieces_of(layout).checked(runs, num_tokens, codec, tables)
    return caught.value.reason


@pytest.mark.parametrize("codec", Codec)
def test_a_piece_of_what_the_tables_hold_is_made(codec: Codec) -> None:
    expected = PIECES.piece((range(1, 2),) * 5, 64, codec)
    assert isinstance(expected, Piece)
    assert PIECES.checked(ALL, 64, codec, TABLES) == expected


@pytest.mark.parametrize(
    "runs",
    [
        (LayerRun(4, 1, 2),),
        (LayerRun(6, 1, 2),),
        (LayerRun(5, 1, 2), LayerRun(1, 0, 0)),
        (LayerRun(0, 1, 2),),
        (),
    ],
    ids=str,
)
def test_a_wrong_number_of_layers_is_refused(runs: Sequence[LayerRun]) -> None:
    assert refusal(runs) is Reason.MISSING_BLOCKS


def test_a_number_of_layers_that_is_beyond_all_reason_is_refused_without_counting_them() -> None:
    """A message of a few bytes must not take the memory of millions of layers."""
    tracemalloc.start()
    try:
        assert refusal([LayerRun(300_000, 0, 0)] * 3) is Reason.MISSING_BLOCKS
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("stop", [3, 5, 2**31, 2**63, 2**64 - 1])
def test_positions_beyond_the_table_are_refused(stop: int) -> None:
    assert refusal([LayerRun(5, 0, stop)], num_tokens=2**64 - 1) is Reason.MISSING_BLOCKS


@pytest.mark.parametrize("start", [2**31, 2**63, 2**64 - 2])
def test_positions_that_begin_beyond_the_table_are_refused(start: int) -> None:
    runs = [LayerRun(5, start, start + 1)]
    assert refusal(runs, num_tokens=2**64 - 1) is Reason.MISSING_BLOCKS


def test_a_block_that_is_no_longer_held_is_refused() -> None:
    assert refusal([LayerRun(5, 0, 1)]) is Reason.MISSING_BLOCKS


def test_a_block_outside_of_its_region_is_refused() -> None:
    assert refusal(ALL, tables=([7, NUM_BLOCKS], [0, 5])) is Reason.MISSING_BLOCKS
    PIECES.checked(ALL, 64, Codec.RAW, ([7, NUM_BLOCKS - 1], [0, 5]))


def test_a_handoff_without_blocks_yet_has_no_piece() -> None:
    assert refusal(ALL, tables=([], [])) is Reason.MISSING_BLOCKS


@pytest.mark.parametrize("num_tokens", [0, 1, 32])
def test_blocks_behind_the_last_token_are_refused(num_tokens: int) -> None:
    """Of 32 tokens, the second block of 32 has none."""
    assert refusal(ALL, num_tokens) is Reason.MISSING_BLOCKS
    PIECES.checked(ALL, 33, Codec.RAW, TABLES)


@pytest.mark.parametrize("runs", [(LayerRun(5, 0, 0),), (LayerRun(5, 3, 2),)], ids=str)
def test_a_piece_of_nothing_is_refused(runs: Sequence[LayerRun]) -> None:
    """It has no place of its own in the staging memory."""
    assert refusal(runs) is Reason.MISSING_BLOCKS


@pytest.mark.parametrize("codec", [codec for codec in Codec if codec is not Codec.RAW])
@pytest.mark.parametrize("change", [{"parts": ()}, {"dtype": "float8_e4m3fn"}], ids=str)
def test_a_lossy_piece_of_a_cache_that_no_codec_knows_is_refused(
    codec: Codec, change: dict[str, object]
) -> None:
    groups = tuple(msgspec.structs.replace(one, **change) for one in LAYOUT.groups)
    layout = msgspec.structs.replace(LAYOUT, groups=groups)
    assert refusal(ALL, codec=codec, layout=layout) is Reason.INTERNAL
    pieces_of(layout).checked(ALL, 64, Codec.RAW, TABLES)


def test_blocks_are_those_at_the_positions() -> None:
    assert blocks_at([5, 6, 7, 8], range(1, 3)) == [6, 7]
    assert blocks_at((5, 6), range(0)) == []
    with pytest.raises(HandoffError, match="a block table of 2 does not hold positions 1 to 3"):
        blocks_at([5, 6], range(1, 3))
    with pytest.raises(HandoffError, match="does not hold positions 0 to 2"):
        blocks_at([5, 0], range(2))
