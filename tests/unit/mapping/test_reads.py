"""From a share and two block tables to descriptors."""

from __future__ import annotations

import pytest

from tests.unit.mapping.examples import kv_cache
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.mapping.kv_cache import EngineKvCache
from vllm_pd_plugin.mapping.match import match
from vllm_pd_plugin.mapping.reads import plan_reads
from vllm_pd_plugin.memory.layout import Region

PAGE = 16 * 4 * 8 * 2
"""Bytes: 16 tokens, 4 heads, 8 channels, bfloat16."""
THEIRS = [Region(base, 10, PAGE, PAGE) for base in (1_000_000, 2_000_000)]
OURS = [Region(base, 10, PAGE, PAGE) for base in (5_000_000, 6_000_000)]

Rows = list[tuple[int, int, int]]


def planned(
    theirs: EngineKvCache,
    ours: EngineKvCache,
    tokens: list[range],
    remote: list[int],
    local: list[int],
) -> Rows:
    """Return the descriptors: local, remote, bytes."""
    ((share,),) = match(theirs, ours)
    plan = plan_reads(share, tokens, ([remote], THEIRS), ([local], OURS))
    columns = (plan.local.tolist(), plan.remote.tolist(), plan.num_bytes.tolist())
    return list(zip(*columns, strict=True))


def test_blocks_that_are_neighbours_on_both_sides_are_one_descriptor() -> None:
    rows = planned(kv_cache(), kv_cache(), [range(48), range(0)], [4, 5, 6], [7, 8, 9])
    assert rows == [(5_000_000 + 7 * PAGE, 1_000_000 + 4 * PAGE, 3 * PAGE)]


def test_blocks_that_were_given_out_backwards_are_one_descriptor_too() -> None:
    rows = planned(kv_cache(), kv_cache(), [range(0), range(48)], [6, 5, 4], [9, 8, 7])
    assert rows == [(6_000_000 + 7 * PAGE, 2_000_000 + 4 * PAGE, 3 * PAGE)]


def test_blocks_that_are_neighbours_on_one_side_only_are_not() -> None:
    rows = planned(kv_cache(), kv_cache(), [range(32), range(0)], [4, 5], [8, 7])
    assert len(rows) == 2


def test_whole_chunks_are_read() -> None:
    rows = planned(kv_cache(), kv_cache(), [range(20, 33), range(0)], [1, 3, 5], [1, 3, 5])
    assert [row[2] for row in rows] == [PAGE, PAGE]


def test_layers_may_want_different_tokens() -> None:
    rows = planned(kv_cache(), kv_cache(), [range(16), range(16, 32)], [1, 3], [2, 4])
    assert rows == [
        (5_000_000 + 2 * PAGE, 1_000_000 + PAGE, PAGE),
        (6_000_000 + 4 * PAGE, 2_000_000 + 3 * PAGE, PAGE),
    ]


def test_nothing_is_planned_where_nothing_is_wanted() -> None:
    assert planned(kv_cache(), kv_cache(), [range(0), range(0)], [], []) == []


@pytest.mark.parametrize(
    ("remote", "local", "said"),
    [
        ([1], [1, 2], "the peer's block table has 1 blocks, 2 are needed"),
        ([1, 2], [1], "our block table has 1 blocks, 2 are needed"),
        ([0, 2], [1, 2], "the peer's block table no longer holds"),
        ([1, 2], [1, 0], "our block table no longer holds"),
        ([1, 10], [1, 2], "block 10 lies outside a region of 10 blocks"),
        ([1, -2], [1, 2], "the peer's block table names no block"),
        ([1, 2**64], [1, 2], "the peer's block table names no block"),
    ],
)
def test_a_block_that_is_not_there_fails_the_handoff(
    remote: list[int], local: list[int], said: str
) -> None:
    with pytest.raises(HandoffError, match=said) as failure:
        planned(kv_cache(), kv_cache(), [range(32), range(32)], remote, local)
    assert failure.value.reason is Reason.MISSING_BLOCKS
