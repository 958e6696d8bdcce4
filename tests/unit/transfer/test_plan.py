from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.memory.layout import Group, Region
from vllm_pd_plugin.net.transport import ReadPlan
from vllm_pd_plugin.transfer.plan import plan_reads

TOKENS = 4
BYTES = 8
SENTINEL = 0xA5


def full(layers: int = 1) -> Group:
    return Group("full", TOKENS, None, tuple("abcdef"[:layers]), (TOKENS, 2), "uint8")


def sliding(window: int, layers: int = 1) -> Group:
    return Group("sliding_window", TOKENS, window, tuple("uvwxyz"[:layers]), (TOKENS, 2), "uint8")


def region(base: int, num_blocks: int = 100, stride_bytes: int = BYTES) -> Region:
    return Region(base, num_blocks, BYTES, stride_bytes)


def rows(plan: ReadPlan) -> list[tuple[int, int, int]]:
    """Descriptors as (local address, remote address, bytes)."""
    columns = (plan.local.tolist(), plan.remote.tolist(), plan.num_bytes.tolist())
    return list(zip(*columns, strict=True))


def whole(groups: Sequence[Group], first_token: int, num_tokens: int) -> list[range]:
    """All that a consumer with KV for ``first_token`` tokens lacks, for each layer."""
    return [g.needed_blocks(first_token, num_tokens) for g in groups for _ in g.layers]


def plan_one(
    local: Sequence[int],
    remote: Sequence[int],
    num_tokens: int,
    first_token: int = 0,
    here: Region | None = None,
    there: Region | None = None,
) -> list[tuple[int, int, int]]:
    """Plan one group of one layer: local memory at 0, remote at 1000."""
    ours, theirs = [here or region(0)], [there or region(1000)]
    plan = plan_reads(
        [full()], ([local], ours), ([remote], theirs), whole([full()], first_token, num_tokens)
    )
    return rows(plan)


def refusal(*args: object, **kwargs: object) -> str:
    with pytest.raises(HandoffError) as caught:
        plan_one(*args, **kwargs)  # type: ignore[arg-type]
    assert caught.value.reason is Reason.MISSING_BLOCKS
    return str(caught.value)


def test_a_run_on_both_sides_is_one_descriptor() -> None:
    assert plan_one([3, 4, 5], [7, 8, 9], 12) == [(24, 1056, 24)]


def test_a_gap_on_the_local_side_ends_a_run() -> None:
    assert plan_one([3, 4, 6], [7, 8, 9], 12) == [(24, 1056, 16), (48, 1072, 8)]


def test_a_gap_on_the_remote_side_ends_a_run() -> None:
    assert plan_one([3, 4, 5], [7, 9, 10], 12) == [(24, 1056, 8), (32, 1072, 16)]


def test_blocks_that_descend_on_both_sides_are_a_run() -> None:
    assert plan_one([5, 4, 3], [9, 8, 7], 12) == [(24, 1056, 24)]


def test_blocks_that_ascend_on_one_side_only_are_not_a_run() -> None:
    assert plan_one([3, 2], [8, 9], 8) == [(24, 1064, 8), (16, 1072, 8)]
    assert plan_one([3, 4], [9, 8], 8) == [(32, 1064, 8), (24, 1072, 8)]


def test_blocks_in_any_order_are_merged_where_pairs_are_neighbours() -> None:
    assert plan_one([4, 1, 3], [8, 5, 7], 12) == [(8, 1040, 8), (24, 1056, 16)]


def test_equal_blocks_are_not_a_run() -> None:
    assert plan_one([3, 4], [8, 8], 8) == [(24, 1064, 8), (32, 1064, 8)]


@pytest.mark.parametrize("padded", ["here", "there"])
def test_nothing_is_merged_where_blocks_do_not_touch(padded: str) -> None:
    stride = {"here": BYTES, "there": BYTES} | {padded: 12}
    here, there = region(0, 100, stride["here"]), region(1000, 100, stride["there"])
    assert plan_one([3, 4], [7, 8], 8, here=here, there=there) == [
        (3 * stride["here"], 1000 + 7 * stride["there"], BYTES),
        (4 * stride["here"], 1000 + 8 * stride["there"], BYTES),
    ]


def test_only_the_missing_suffix_moves() -> None:
    assert plan_one([1, 2, 3, 4], [5, 6, 7, 8], 16, first_token=8) == [(24, 1056, 16)]


def test_a_suffix_that_begins_inside_a_block_brings_the_whole_block() -> None:
    assert plan_one([1, 2], [5, 6], 8, first_token=7) == [(16, 1048, 8)]


def test_a_block_that_is_partly_filled_is_read_whole() -> None:
    assert plan_one([1, 2], [5, 6], 5) == [(8, 1040, 16)]


def test_blocks_beyond_the_tokens_stay_where_they_are() -> None:
    assert plan_one([1, 2, 3], [5, 6, 7], 8) == [(8, 1040, 16)]


def test_nothing_is_read_when_nothing_is_missing() -> None:
    plan = plan_reads([full()], ([[1]], [region(0)]), ([[1]], [region(0)]), whole([full()], 4, 4))
    assert (plan.num_descriptors, plan.total_bytes) == (0, 0)


def test_no_groups_make_an_empty_plan() -> None:
    plan = plan_reads([], ([], []), ([], []), whole([], 0, 8))
    assert (plan.num_descriptors, plan.total_bytes) == (0, 0)


def test_a_plan_counts_its_descriptors_and_bytes() -> None:
    group, regions = full(2), [region(0), region(0)]
    plan = plan_reads(
        [group], ([[1, 2, 9]], regions), ([[1, 2, 9]], regions), whole([group], 0, 12)
    )
    assert (plan.num_descriptors, plan.total_bytes) == (4, 2 * 3 * BYTES)


def test_a_window_needs_only_blocks_that_the_last_token_looks_back_on() -> None:
    group = sliding(window=8)
    here, there = [region(0)], [region(1000)]
    # Token 15 is computed again; it looks back on 8 to 15, which is blocks 2 and 3.
    plan = plan_reads(
        [group], ([[0, 0, 3, 4]], here), ([[0, 0, 7, 8]], there), whole([group], 0, 16)
    )
    assert rows(plan) == [(24, 1056, 16)]


def test_a_window_that_begins_on_the_last_token_of_a_block_needs_that_block() -> None:
    group = sliding(window=8)
    here, there = [region(0)], [region(1000)]
    # Token 14 looks back on 7, the last of block 1.
    plan = plan_reads(
        [group], ([[0, 2, 3, 4]], here), ([[0, 6, 7, 8]], there), whole([group], 0, 15)
    )
    assert rows(plan) == [(16, 1048, 24)]
    with pytest.raises(HandoffError, match="remote KV cache group 0 no longer holds"):
        plan_reads([group], ([[0, 2, 3, 4]], here), ([[0, 0, 7, 8]], there), whole([group], 0, 15))


def test_a_window_never_reaches_back_before_the_missing_suffix() -> None:
    group, regions = sliding(window=8), [region(0)]
    plan = plan_reads(
        [group], ([[1, 2, 3, 4]], regions), ([[1, 2, 3, 4]], regions), whole([group], 12, 16)
    )
    assert rows(plan) == [(32, 32, 8)]


def test_a_null_block_is_refused_on_either_side() -> None:
    assert "remote KV cache group 0" in refusal([1, 2], [1, 0], 8)
    assert "local KV cache group 0" in refusal([1, 0], [1, 2], 8)


def test_a_block_outside_the_region_is_refused_on_either_side() -> None:
    assert "block 100 lies outside a region of 100 blocks" in refusal([1, 2], [1, 100], 8)
    assert "block 100 lies outside a region of 100 blocks" in refusal([1, 100], [1, 2], 8)
    assert plan_one([99], [99], 4) == [(99 * BYTES, 1000 + 99 * BYTES, BYTES)]


def test_the_bounds_of_every_layer_are_checked() -> None:
    small = [region(0), region(0, num_blocks=5)]
    large = [region(0), region(0)]
    with pytest.raises(HandoffError, match="a region of 5 blocks"):
        plan_reads([full(2)], ([[1]], large), ([[5]], small), whole([full(2)], 0, 4))


@pytest.mark.parametrize("block", [2**40, 2**63, 2**64 - 1])
def test_a_huge_block_number_is_refused(block: int) -> None:
    assert "outside a region" in refusal([1], [block], 4)


# The wire lets any 64-bit number in.
@pytest.mark.parametrize("block", [-1, -(2**63), 2**64])
def test_a_block_number_that_is_no_uint64_is_refused(block: int) -> None:
    refusal([1], [block], 4)


def test_a_table_that_is_too_short_is_refused_on_either_side() -> None:
    assert "remote KV cache group 0 has 1 blocks, 2 are needed" in refusal([1, 2], [1], 8)
    assert "local KV cache group 0 has 1 blocks, 2 are needed" in refusal([1], [1, 2], 8)
    assert "has 0 blocks" in refusal([1], [], 1)


def test_a_wrong_number_of_tables_or_regions_is_refused() -> None:
    group, table = full(), [[1]]
    with pytest.raises(HandoffError, match="2 block tables and 1 regions; 1 and 1 are needed"):
        plan_reads([group], (table, [region(0)]), (table * 2, [region(0)]), whole([group], 0, 4))
    with pytest.raises(HandoffError, match="1 block tables and 2 regions; 1 and 1 are needed"):
        plan_reads([group], (table, [region(0)]), (table, [region(0)] * 2), whole([group], 0, 4))


# Two dense regions whose blocks differ in size would be merged into a run of the wrong bytes.
def test_blocks_of_another_size_are_refused() -> None:
    refusal([1, 2], [1, 2], 8, there=Region(1000, 100, 2 * BYTES, 2 * BYTES))


def test_each_group_has_its_own_table_and_each_layer_its_own_region() -> None:
    groups = [full(2), sliding(window=4)]
    local = ([[1, 2], [3, 4]], [region(0), region(1000), region(2000)])
    remote = ([[5, 6], [0, 8]], [region(10_000), region(11_000), region(12_000)])
    assert rows(plan_reads(groups, local, remote, whole(groups, 0, 8))) == [
        (8, 10_040, 16),
        (1008, 11_040, 16),
        (2032, 12_064, 8),
    ]


# --- against a naive copy --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Side:
    """One engine's arrays ``[num_blocks, stride]``, one a layer, with a margin on both ends."""

    memory: list[NDArray[np.uint8]]
    regions: list[Region]
    tables: list[list[int]]

    def block(self, layer: int, block: int) -> NDArray[np.uint8]:
        there = self.regions[layer]
        start = there.address(block) - self.memory[layer].ctypes.data
        return self.memory[layer][start : start + there.block_bytes]


NUM_BLOCKS = 24
MARGIN = 16


def make_side(data: st.DataObject, groups: Sequence[Group], table_length: int, seed: int) -> Side:
    tables, memory, regions = [], [], []
    generator = np.random.default_rng(seed)
    for group in groups:
        # Short shuffled stretches, so that runs of every length occur.
        start = data.draw(st.integers(1, NUM_BLOCKS - table_length))
        blocks = list(range(start, start + table_length))
        for a, b in data.draw(
            st.lists(st.tuples(*[st.integers(0, table_length - 1)] * 2), max_size=3)
        ):
            blocks[a], blocks[b] = blocks[b], blocks[a]
        tables.append(blocks)
        for _ in group.layers:
            stride = data.draw(st.sampled_from([BYTES, BYTES, BYTES + 4]))
            size = 2 * MARGIN + NUM_BLOCKS * stride
            array = generator.integers(0, 256, size, dtype=np.uint8)
            memory.append(array)
            regions.append(Region(array.ctypes.data + MARGIN, NUM_BLOCKS, BYTES, stride))
    return Side(memory, regions, tables)


def execute(plan: ReadPlan) -> None:
    for here, there, size in rows(plan):
        ctypes.memmove(here, there, size)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_plan_moves_exactly_what_a_copy_block_by_block_would(data: st.DataObject) -> None:
    windows = data.draw(st.lists(st.none() | st.integers(1, 40), min_size=1, max_size=3))
    layers = data.draw(st.integers(1, 2))
    groups = [full(layers) if w is None else sliding(w, layers) for w in windows]
    num_tokens = data.draw(st.integers(1, 40))
    first_token = data.draw(st.integers(0, num_tokens - 1))
    table_length = data.draw(st.integers(-(-num_tokens // TOKENS), 12))
    local = make_side(data, groups, table_length, seed=1)
    remote = make_side(data, groups, table_length, seed=2)
    before = [array.copy() for array in remote.memory]
    for array in local.memory:
        array[:] = SENTINEL
    expected = [array.copy() for array in local.memory]
    naive = Side(expected, [], local.tables)
    layer = 0
    for index, group in enumerate(groups):
        last = num_tokens - 1
        earliest = 0 if group.window is None else last - group.window + 1
        wanted = {t // TOKENS for t in range(max(first_token, earliest), num_tokens)}
        for _ in group.layers:
            offset = local.regions[layer].base - local.memory[layer].ctypes.data
            stride = local.regions[layer].stride_bytes
            for position in wanted:
                start = offset + local.tables[index][position] * stride
                source = remote.block(layer, remote.tables[index][position])
                naive.memory[layer][start : start + BYTES] = source
            layer += 1

    plan = plan_reads(
        groups,
        (local.tables, local.regions),
        (remote.tables, remote.regions),
        whole(groups, first_token, num_tokens),
    )
    execute(plan)

    for ours, wanted_bytes in zip(local.memory, expected, strict=True):
        np.testing.assert_array_equal(ours, wanted_bytes)
    for theirs, untouched in zip(remote.memory, before, strict=True):
        np.testing.assert_array_equal(theirs, untouched)
