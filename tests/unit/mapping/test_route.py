"""How one of our ranks reads from an engine: from which ranks, when, and whether one is like it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.mapping.examples import changed, kv_cache, mla, opaque
from vllm_pd_plugin.errors import PeerError
from vllm_pd_plugin.mapping.kv_cache import FP8, EngineKvCache
from vllm_pd_plugin.mapping.route import Turn, find_route

A, B, C, D = (f"layers.{number}" for number in range(4))


def counterparts(theirs: EngineKvCache, ours: EngineKvCache) -> list[int | None]:
    """For each of our ranks."""
    return [find_route(theirs, ours, rank).counterpart for rank in range(ours.num_ranks)]


def two_groups(first: str = A, second: str = B, **of_second: Any) -> EngineKvCache:
    """An engine with a layer in each of two groups."""
    groups = kv_cache(stages=((first,),)).groups + kv_cache(stages=((second,),), **of_second).groups
    return EngineKvCache(1, groups)


# --- who has exactly our pages ---------------------------------------------------------------


def test_the_counterpart_of_a_rank_of_equal_engines_is_the_same_rank() -> None:
    engine = kv_cache(tp=2, stages=((A,), (B,)))
    assert counterparts(engine, engine) == [0, 1, 2, 3]


def test_a_rank_that_holds_the_same_latent_is_a_counterpart_whatever_the_sizes() -> None:
    assert counterparts(mla(tp=1), mla(tp=2)) == [0, 0]
    assert counterparts(mla(tp=2), mla(tp=1)) == [0]


def test_of_several_that_hold_the_same_latent_each_is_somebody_s_counterpart() -> None:
    assert counterparts(mla(tp=4), mla(tp=4)) == [0, 1, 2, 3]
    assert counterparts(mla(tp=4), mla(tp=1, rank=3)) == [3]


def test_a_rank_that_holds_the_same_head_is_a_counterpart_whatever_the_sizes() -> None:
    assert counterparts(kv_cache(tp=2, heads=2), kv_cache(tp=4, heads=2)) == [0, 0, 1, 1]


def test_a_stage_with_the_same_layers_is_a_counterpart_whichever_stage_it_is() -> None:
    theirs, ours = kv_cache(stages=((A,), (B,))), kv_cache(stages=((B,), (A,)))
    assert counterparts(theirs, ours) == [1, 0]


def test_pages_that_nobody_can_look_into_may_have_a_counterpart() -> None:
    assert counterparts(opaque(), opaque()) == [0]


@pytest.mark.parametrize(
    "ours",
    [
        kv_cache(tp=2), kv_cache(block=32), kv_cache(dtype="float32"), kv_cache(form="swapped"),
        kv_cache(form="token major"), changed(kv_cache(), layout={"page_bytes": 4096}),
        kv_cache(stages=((A,), (B,))), kv_cache(stages=((B, A),)),
    ],
    ids=["heads", "block size", "dtype", "parts", "head stride", "padding", "layers", "order"],
)  # fmt: skip
def test_pages_that_differ_in_anything_have_no_counterpart(ours: EngineKvCache) -> None:
    """Blocks of 4096 bytes have some of them behind the last element."""
    assert counterparts(kv_cache(), ours) == [None] * ours.num_ranks
    if ours.num_ranks == 1:
        assert counterparts(ours, kv_cache()) == [None]


def test_a_rank_with_a_part_of_a_stage_s_layers_has_no_counterpart() -> None:
    """Its regions are all there at the same places, and the stage has another one behind them."""
    assert counterparts(kv_cache(stages=((A, B, C),)), kv_cache(stages=((A, B), (C,)))) == [
        None, None,
    ]  # fmt: skip


def test_pages_of_other_heads_have_no_counterpart_though_they_are_padded_to_one_size() -> None:
    one = kv_cache(tp=1)
    padded = changed(kv_cache(tp=2), layout={"page_bytes": one.groups[0].layout.page_bytes})
    assert padded.groups[0].layout.is_like(one.groups[0].layout)
    assert counterparts(one, padded) == [None, None]


def test_layers_in_other_groups_have_no_counterpart() -> None:
    one = kv_cache(stages=((A, B),))
    assert counterparts(one, two_groups()) == counterparts(two_groups(), one) == [None]
    assert counterparts(two_groups(), two_groups()) == [0]
    groups = [kv_cache(stages=stages).groups for stages in (((A, B), ()), ((), (C,)))]
    divided = [kv_cache(stages=stages).groups for stages in (((A,), ()), ((B,), (C,)))]
    theirs, ours = (EngineKvCache(1, of[0] + of[1]) for of in (groups, divided))
    assert counterparts(theirs, theirs) == [0, 1]
    assert counterparts(theirs, ours) == [None, 1]


def test_engines_with_another_number_of_block_tables_have_no_counterpart() -> None:
    groups = kv_cache(stages=((A, B), ())).groups + kv_cache(stages=((), (C,))).groups
    assert counterparts(EngineKvCache(1, groups), kv_cache(stages=((A, B),))) == [None]


def test_a_rank_without_layers_reads_from_nobody() -> None:
    route = find_route(kv_cache(), kv_cache(stages=((), (A, B))), 0)
    assert (route.shares, route.turns, route.counterpart) == ((), (), None)


def test_groups_in_another_order_have_no_counterpart() -> None:
    assert counterparts(two_groups(A, B), two_groups(B, A)) == [None]


def test_a_group_that_differs_is_enough() -> None:
    assert counterparts(two_groups(), two_groups(block=32)) == [None]


def test_where_several_ranks_have_our_heads_none_is_the_counterpart() -> None:
    route = find_route(kv_cache(tp=2), kv_cache(tp=1), 0)
    assert route.counterpart is None
    assert route.source_ranks == (0, 1)


# --- what is read from whom ------------------------------------------------------------------


def test_only_ranks_that_have_something_for_ours_are_read_from() -> None:
    theirs, ours = kv_cache(tp=4, stages=((A,), (B,))), kv_cache(tp=2, stages=((A,), (B,)))
    found = [find_route(theirs, ours, rank).source_ranks for rank in range(4)]
    assert found == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_a_rank_is_read_from_once_however_many_shares_it_has() -> None:
    theirs = kv_cache(stages=((A, B),))
    assert find_route(theirs, two_groups(), 0).source_ranks == (0,)


def test_what_our_other_stages_have_need_not_be_known() -> None:
    theirs = kv_cache(tp=2, stages=((A, B), (C, D)))
    known = kv_cache(stages=((), (B, C, D)))
    route = find_route(theirs, known, 1)
    assert [share.layers for share in route.shares] == [(B,), (B,), (C, D), (C, D)]
    with pytest.raises(PeerError, match="theirs has no layers.9"):
        find_route(theirs, kv_cache(stages=((), ("layers.9",))), 1)


def test_lossy_types_have_to_be_allowed() -> None:
    with pytest.raises(PeerError, match="has to be allowed"):
        find_route(kv_cache(), kv_cache(dtype=FP8), 0)
    assert find_route(kv_cache(), kv_cache(dtype=FP8), 0, allow_fp8=True).shares


# --- when it is written there ----------------------------------------------------------------


def test_a_region_s_turn_is_that_of_its_layer_there() -> None:
    theirs = kv_cache(stages=((A, B), (C, D)))
    ours = kv_cache(stages=((A, B, C, D),))
    turns = (Turn(0, 0), Turn(0, 1), Turn(1, 0), Turn(1, 1))
    assert find_route(theirs, ours, 0).turns == turns
    assert find_route(theirs, ours, 0).num_stages == 2
    assert find_route(ours, theirs, 1).turns == (Turn(0, 2), Turn(0, 3))
    assert find_route(ours, theirs, 1).num_stages == 1


def test_turns_follow_the_forward_pass_and_not_the_regions() -> None:
    """Groups have layers from all over the model; regions come group by group."""
    groups = kv_cache(stages=((B, D),)).groups + kv_cache(stages=((A, C),)).groups
    theirs = EngineKvCache(1, groups)
    route = find_route(theirs, kv_cache(stages=((A, B, C, D),)), 0)
    assert route.turns == tuple(Turn(0, number) for number in range(4))
    assert route.num_groups == 2
    assert find_route(theirs, theirs, 0).turns == tuple(Turn(0, n) for n in (1, 3, 0, 2))


def test_turns_of_a_stage_count_its_own_layers_only() -> None:
    groups = kv_cache(stages=((A,), (D,))).groups + kv_cache(stages=((B,), (C,))).groups
    theirs = EngineKvCache(1, groups)
    assert find_route(theirs, kv_cache(stages=((D, C, B, A),)), 0).turns == (
        Turn(1, 1), Turn(1, 0), Turn(0, 1), Turn(0, 0),
    )  # fmt: skip
