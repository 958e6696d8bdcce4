"""Pieces of some heads' KV that a peer asks for: what is in them, and what is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mapping.pages import page
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.ids import HandoffId
from vllm_pd_plugin.mapping.kv_cache import FP8, ITEM_BYTES
from vllm_pd_plugin.memory.layout import Group, RankLayout, Region
from vllm_pd_plugin.packing.heads import HeadsPiece, checked_heads, positions_of
from vllm_pd_plugin.packing.pieces import Pieces
from vllm_pd_plugin.protocol.wire import Gather

HEADS, BLOCK, NUM_BLOCKS = 2, 16, 30
WIDTHS = (("key", 8), ("value", 8))
TABLES = ((4, 5, 6), (0, 8, 9, 29))
"""Of the first group, and of a second whose window has left its first block behind."""
GATHER = Gather(HandoffId("h"), 0, 0, 0, 1, 0, (0, 1), 0, HEADS, 0, 40, "bfloat16", False)
SECOND = {"group": 1, "regions": (2,), "start": 16}


def group(*layers: str, dtype: str = "bfloat16", is_known: bool = True) -> Group:
    made = page("rows", WIDTHS, HEADS, BLOCK)
    return Group(
        kind="full",
        block_tokens=BLOCK,
        window=None,
        layers=layers,
        block_shape=(HEADS, BLOCK, 16),
        dtype=dtype,
        block_strides=(made.head_stride, 16, 1),
        parts=made.parts if is_known else (),
    )


def pieces(dtype: str = "bfloat16", is_known: bool = True) -> Pieces:
    layout = RankLayout(tuple(group(*of, dtype=dtype, is_known=is_known) for of in ("ab", "c")))
    return Pieces(layout, [Region(0, NUM_BLOCKS, 512, 512)] * 3)


def asked(of: Pieces | None = None, **changes: Any) -> HeadsPiece:
    return checked_heads(of or pieces(), msgspec.structs.replace(GATHER, **changes), TABLES)


# --- what is in a piece ----------------------------------------------------------------------


def test_a_piece_is_what_was_asked_for() -> None:
    assert asked() == HeadsPiece(
        0, (0, 1), range(2), range(40), "bfloat16", 2 * 40 * 2 * 16 * 2, 2 * 40 * 2 * 16 * 2
    )


def test_a_piece_may_be_of_some_layers_heads_and_tokens() -> None:
    some = asked(regions=(1,), first_head=1, num_heads=1, start=17, stop=20)
    assert some == HeadsPiece(0, (1,), range(1, 2), range(17, 20), "bfloat16", 3 * 32, 3 * 32)


def test_layers_come_in_the_order_in_which_they_are_asked_for() -> None:
    assert asked(regions=(1, 0)).regions == (1, 0)


def test_regions_count_over_all_groups() -> None:
    assert asked(**SECOND).regions == (2,)


def test_a_piece_of_another_type_takes_as_much_as_that_and_the_cache_as_before() -> None:
    wide = pieces("float32")
    piece = asked(wide)
    assert (piece.num_bytes, piece.kv_bytes) == (2 * 40 * 2 * 16 * 2, 2 * 40 * 2 * 16 * 4)
    assert asked(pieces(), dtype="float32").num_bytes == 2 * 40 * 2 * 16 * 4
    assert asked(pieces(), dtype=FP8).num_bytes == 2 * 40 * 2 * 16


@pytest.mark.parametrize(
    ("tokens", "positions"),
    [
        (range(0, 16), range(1)), (range(0, 17), range(2)), (range(15, 17), range(2)),
        (range(16, 32), range(1, 2)), (range(31, 33), range(1, 3)), (range(40, 41), range(2, 3)),
    ],
)  # fmt: skip
def test_the_blocks_of_some_tokens_are_those_that_have_any(tokens: range, positions: range) -> None:
    assert positions_of(group("a"), tokens) == positions


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regions": ()}, "a piece of nothing"),
        ({"num_heads": 0}, "a piece of nothing"),
        ({"start": 40}, "a piece of nothing"),
        ({"start": 41, "stop": 40}, "a piece of nothing"),
        ({"group": 2}, "a piece of nothing"),
        ({"group": 2**64 - 1}, "a piece of nothing"),
        ({"num_heads": 3}, r"heads 0 to 2 of layers \[0, 1\] are wanted; there are 2"),
        ({"first_head": 2, "num_heads": 1}, "heads 2 to 2"),
        ({"first_head": 2**64 - 1}, "there are 2, of layers 0 to 1"),
        ({"regions": (0, 2)}, r"of layers \[0, 2\] are wanted; there are 2, of layers 0 to 1"),
        ({"regions": (3,)}, "layers 0 to 1"),
        (SECOND | {"regions": (1,)}, "of layers 2 to 2"),
        ({"regions": (1, 1)}, "a layer is wanted twice"),
        ({"stop": 49}, "a block table of 3 does not hold positions 0 to 4"),
        ({"stop": 2**64 - 1}, "a block table of 3 does not hold"),
        ({"start": 2**64 - 2, "stop": 2**64 - 1}, "a block table of 3 does not hold"),
        (SECOND | {"start": 0}, "a block table of 4 does not hold positions 0 to 3"),
    ],
    ids=str,
)
def test_what_is_not_there_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HandoffError, match=message) as failure:
        asked(**changes)
    assert failure.value.reason is Reason.MISSING_BLOCKS


@pytest.mark.parametrize("at", [0, 1])
def test_a_block_outside_of_any_of_the_regions_is_refused(at: int) -> None:
    one = pieces()
    small = [Region(0, 6 if region == at else NUM_BLOCKS, 512, 512) for region in range(3)]
    other = Pieces(one.layout, small)
    assert asked(other, stop=32).num_bytes
    with pytest.raises(HandoffError, match="a block lies outside its region"):
        asked(other, stop=33)
    assert asked(other, stop=33, regions=(1 - at,)).num_bytes


@pytest.mark.parametrize("kept", ITEM_BYTES)
@pytest.mark.parametrize("wanted", [*ITEM_BYTES, "float64", ""])
def test_only_types_that_the_cache_s_can_become_are_written(kept: str, wanted: str) -> None:
    floats = {"float32", "bfloat16", "float16"}
    can = {wanted, kept} <= floats or kept == wanted or (kept, wanted) == ("bfloat16", FP8)
    if can:
        assert asked(pieces(kept), dtype=wanted).dtype == wanted
        return
    with pytest.raises(HandoffError, match=f"{kept} cannot be written as {wanted}") as failure:
        asked(pieces(kept), dtype=wanted)
    assert failure.value.reason is Reason.INTERNAL


def test_pages_that_nobody_can_look_into_are_not_taken_apart() -> None:
    with pytest.raises(HandoffError, match="cannot be written as bfloat16"):
        asked(pieces(is_known=False))
    with pytest.raises(HandoffError, match="int8 cannot be written as bfloat16"):
        asked(pieces("int8"))


def test_a_group_of_another_stage_has_nothing_to_give() -> None:
    layout = RankLayout((group("a"), Group("full", BLOCK, None, (), (1,), "")))
    empty = Pieces(layout, [Region(0, NUM_BLOCKS, 512, 512)])
    for region in (0, 1):
        with pytest.raises(HandoffError):
            asked(empty, group=1, regions=(region,), start=16, num_heads=1)


SMALL, HUGE = st.integers(0, 5), st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64 - 1])
COUNT = st.one_of(SMALL, SMALL, st.integers(0, 70), HUGE)


@settings(max_examples=1500)
@given(
    fields=st.fixed_dictionaries(
        {
            "group": st.one_of(st.integers(0, 2), COUNT),
            "regions": st.lists(st.one_of(st.integers(0, 2), COUNT), max_size=4).map(tuple),
            "first_head": COUNT,
            "num_heads": st.one_of(st.integers(1, 2), COUNT),
            "start": COUNT,
            "stop": COUNT,
            "dtype": st.sampled_from([*ITEM_BYTES, "int64", "\0"]),
        }
    ),
    kept=st.sampled_from([*ITEM_BYTES, "int8"]),
    length=st.integers(0, 4),
)
def test_whatever_a_peer_asks_for_it_gets_what_is_there_or_a_reason(
    fields: dict[str, Any], kept: str, length: int
) -> None:
    gather = msgspec.structs.replace(GATHER, **fields)
    travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(gather), type=Gather)
    tables = TABLES[0][:length], TABLES[1][:length]
    try:
        piece = checked_heads(pieces(kept), travelled, tables)
    except HandoffError:
        return
    assert set(piece.regions) <= ({0, 1}, {2})[piece.group]
    assert len(set(piece.regions)) == len(piece.regions) > 0
    assert 0 <= piece.heads.start < piece.heads.stop <= HEADS
    assert 0 <= piece.tokens.start < piece.tokens.stop
    table = tables[piece.group]
    assert all(table[token // BLOCK] for token in piece.tokens)
    elements = len(piece.regions) * len(piece.tokens) * len(piece.heads) * 16
    assert piece.num_bytes == elements * ITEM_BYTES[fields["dtype"]]
    assert piece.tokens == range(fields["start"], fields["stop"])
