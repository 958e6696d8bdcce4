"""Any two engines of one model: each rank ends up with what it would have computed itself."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings

from tests.mapping.handoff import Pair, check
from tests.mapping.pairs import pairs
from tests.unit.mapping.examples import ROW, request


@settings(max_examples=300)
@given(pairs())
def test_every_element_is_written_once_from_the_right_place(pair: Pair) -> None:
    """``python -m tests.mapping`` tries 20,000."""
    check(pair)


@pytest.mark.parametrize(
    "blocks", [(32, 64), (64, 32), (32, 96), (128, 32), (16, 48), (48, 16)], ids=str
)
def test_blocks_of_which_one_divides_the_other_are_read_as_they_lie(
    blocks: tuple[int, int],
) -> None:
    seen = check(request(blocks))
    assert seen["direct"]
    assert not seen["slab"]


@pytest.mark.parametrize("blocks", [(48, 32), (16, 24), (7, 5)], ids=str)
def test_blocks_of_which_none_divides_the_other_are_written_down(blocks: tuple[int, int]) -> None:
    seen = check(request(blocks))
    assert seen["slab"]
    assert not seen["direct"]


def test_equal_engines_read_a_descriptor_a_block_or_fewer() -> None:
    pair = request((32, 32), num_tokens=1000)
    assert check(pair)["descriptors"] <= 2 * 32


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (4, 2), (1, 8), (8, 1), (8, 2)], ids=str)
def test_heads_that_lie_head_by_head_are_read_as_they_lie_whatever_the_tp(
    sizes: tuple[int, int],
) -> None:
    seen = check(request((16, 16), sizes=sizes))
    assert not seen["slab"]


def test_heads_that_lie_token_by_token_are_written_down_where_some_are_wanted() -> None:
    seen = check(request((16, 16), ("token major", "token major"), sizes=(1, 2)))
    assert not seen["direct"]


def test_all_heads_are_read_as_they_lie_even_token_by_token() -> None:
    seen = check(request((16, 32), ("token major", "token major")))
    assert not seen["slab"]


def test_keys_in_columns_are_read_as_they_lie_between_equal_blocks_only() -> None:
    columns = ("columns", "columns")
    assert not check(request((32, 32), columns, sizes=(1, 2)))["slab"]
    assert not check(request((32, 64), columns, sizes=(1, 2)))["direct"]


def test_what_could_be_read_as_it_lies_can_be_written_down_too() -> None:
    pair = request((32, 64), sizes=(2, 1))
    seen = check(dataclasses.replace(pair, prefers_slabs=True))
    assert not seen["direct"]
    assert check(pair)["direct"]


def test_only_the_tokens_that_are_missing_cross_the_wire() -> None:
    """4 heads of 8 channels in bfloat16, two layers."""
    seen = check(request((48, 32), num_tokens=101, first_token=64))
    assert seen["slab_bytes"] == (101 - 64) * 4 * 8 * 2 * 2


def test_only_a_windows_tokens_cross_the_wire() -> None:
    window = {"kind": "sliding_window", "window": 50}
    seen = check(request((48, 32), num_tokens=101, **window))
    assert seen["slab_bytes"] == 50 * 4 * 8 * 2 * 2


def test_float32_that_becomes_bfloat16_crosses_the_wire_as_bfloat16() -> None:
    narrow = check(request((16, 16), dtypes=("bfloat16", "bfloat16"), num_tokens=160))
    for dtypes in (("float32", "bfloat16"), ("bfloat16", "float32")):
        seen = check(request((16, 16), dtypes=dtypes, num_tokens=160))
        assert seen["slab_bytes"] == narrow["direct_bytes"]


def test_a_latent_comes_once_to_each_rank() -> None:
    """12 channels in bfloat16, two layers, four ranks."""
    pair = request((16, 24), sizes=(2, 4), heads=1, num_tokens=100, kind="mla", channels=ROW)
    assert check(pair)["slab_bytes"] == 4 * 100 * 12 * 2 * 2
