"""A plan in several reads moves the same bytes between the same places."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_plugin.net.transport import ReadPlan

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=30)


def plan_of(sizes: list[int]) -> ReadPlan:
    """Descriptors one behind the other here, in the opposite order and with gaps there."""
    starts = np.cumsum([0, *sizes[:-1]], dtype=np.uint64)
    there = np.array([10_000 - 100 * i for i in range(len(sizes))], dtype=np.uint64)
    return ReadPlan(starts, there, np.array(sizes, dtype=np.uint64))


def moves(plan: ReadPlan) -> dict[int, int]:
    """Where each byte comes from, by where it goes."""
    columns = zip(plan.local, plan.remote, plan.num_bytes, strict=True)
    return {
        int(here) + i: int(there) + i for here, there, size in columns for i in range(int(size))
    }


@given(SIZES, st.integers(1, 8), st.integers(1, 120))
def test_parts_move_what_the_whole_would(
    sizes: list[int], max_descriptors: int, max_bytes: int
) -> None:
    plan = plan_of(sizes)
    parts = plan.split(max_descriptors, max_bytes)
    together: dict[int, int] = {}
    for part in parts:
        assert 1 <= part.num_descriptors <= max_descriptors
        assert part.total_bytes <= max_bytes
        moved = moves(part)
        assert together.keys().isdisjoint(moved), "a byte is moved twice"
        together |= moved
    assert together == moves(plan)


def test_a_plan_that_is_small_enough_stays_as_it_is() -> None:
    plan = plan_of([3, 4])
    assert plan.split(2, 7) == [plan]


def test_a_plan_without_a_limit_on_bytes_is_cut_by_descriptors_only() -> None:
    parts = plan_of([2**20] * 5).split(2, 2**63 - 1)
    assert [part.num_descriptors for part in parts] == [2, 2, 1]
