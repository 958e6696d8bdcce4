"""What a description says of itself."""

from __future__ import annotations

import msgspec
import pytest

from tests.mapping.memory import heads_on
from tests.mapping.pages import page
from tests.unit.mapping.examples import WIDTHS, kv_cache
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.mapping.checks import check_description, check_memory
from vllm_pd_plugin.mapping.kv_cache import EngineKvCache, Place, RankPlace, heads_of
from vllm_pd_plugin.mapping.route import find_route
from vllm_pd_plugin.memory.layout import Group, RankLayout, RankMemory, Region


def test_a_consumer_needs_what_it_has_not() -> None:
    assert kv_cache().groups[0].needed_tokens(32, 100) == range(32, 100)


def test_a_window_reaches_back_from_the_last_token() -> None:
    group = kv_cache(kind="sliding_window", window=10).groups[0]
    assert group.needed_tokens(0, 100) == range(90, 100)
    assert group.needed_tokens(96, 100) == range(96, 100)
    assert group.needed_tokens(0, 5) == range(5)


def test_a_state_is_that_of_the_last_block() -> None:
    group = kv_cache(kind="mamba").groups[0]
    assert group.needed_tokens(0, 48) == range(32, 48)
    with pytest.raises(HandoffError, match="after 50 tokens.*after every 16") as failure:
        group.needed_tokens(0, 50)
    assert failure.value.reason is Reason.MISSING_BLOCKS


def test_a_consumer_that_has_all_needs_nothing() -> None:
    assert not kv_cache().groups[0].needed_tokens(100, 100)


@pytest.mark.parametrize(("heads", "size"), [(8, 1), (8, 2), (6, 3), (2, 8), (1, 4), (4, 4)])
def test_heads_are_divided_as_vllm_does_it(heads: int, size: int) -> None:
    for rank in range(size):
        assert heads_of(heads, size, rank) == heads_on(heads, size, rank)


def test_regions_come_group_by_group_on_each_stage() -> None:
    first = kv_cache(stages=(("a",), ("c", "d"))).groups
    second = kv_cache(stages=(("b",), ("e",))).groups
    engine = EngineKvCache(2, first + second)
    assert engine.num_ranks == 4
    assert engine.places() == {
        "a": Place(0, 0, 0), "b": Place(0, 1, 1),
        "c": Place(1, 0, 0), "d": Place(1, 0, 1), "e": Place(1, 1, 2),
    }  # fmt: skip


def test_a_description_travels() -> None:
    engine = kv_cache(tp=2, stages=(("a",), ("b",)))
    encoded = msgspec.msgpack.encode(engine)
    assert msgspec.msgpack.decode(encoded, type=EngineKvCache) == engine


# --- what ranks say, and what that comes to --------------------------------------------------


def rank_layout(*layers: tuple[str, ...], heads: int = 2) -> RankLayout:
    """A rank's, of a model of four heads; one group for each of ``layers``, which may be empty."""
    full = page("rows", WIDTHS, heads, 16)
    return RankLayout(
        tuple(
            Group(
                kind="full",
                block_tokens=16,
                window=None,
                layers=of_group,
                block_shape=(heads, 16, 8),
                dtype="bfloat16",
                block_strides=(full.head_stride, 8, 1),
                parts=full.parts,
                model_heads=4,
                channels=WIDTHS,
            )
            if of_group
            else Group("full", 16, None, (), (1,), "")
            for of_group in layers
        )
    )


def said(layout: RankLayout, place: RankPlace, data_parallel_rank: int = 0) -> EngineKvCache:
    regions = (Region(0, 9, 2 * 16 * 8 * 2, 4096),) * len(layout.layers)
    return EngineKvCache.seen_by_rank(layout, RankMemory(regions, b""), place, data_parallel_rank)


def test_ranks_are_counted_stage_by_stage() -> None:
    places = [RankPlace(stage, rank, 2, 3) for stage in range(2) for rank in range(3)]
    assert [place.rank for place in places] == list(range(6))
    assert {place.num_ranks for place in places} == {6}


def test_a_rank_says_what_the_model_has_and_which_layers_its_stage_has() -> None:
    seen = said(rank_layout(("a", "b")), RankPlace(1, 0, 3, 2), data_parallel_rank=5)
    (group,) = seen.groups
    assert seen.tensor_parallel_size == 2
    assert seen.pipeline_parallel_size == 3
    assert seen.data_parallel_rank == 5
    assert group.spec.num_heads == 4
    assert group.spec.channels == WIDTHS
    assert group.layout.layers == ((), ("a", "b"), ())
    assert group.layout.page_bytes == 512
    assert group.layout.head_stride == 16 * 8
    check_description(seen, "our")


def test_the_pages_of_a_group_are_as_large_as_its_own_regions_say() -> None:
    layout = rank_layout((), ("a", "b"), ("c",))
    regions = [Region(0, 9, size, 4096) for size in (600, 600, 700)]
    memory = RankMemory(tuple(regions), b"")
    seen = EngineKvCache.seen_by_rank(layout, memory, RankPlace(0, 0, 2, 2))
    assert [group.layout.page_bytes for group in seen.groups] == [1, 600, 700]


def test_what_ranks_of_all_stages_say_is_what_an_engine_says() -> None:
    stages = [said(rank_layout((name,)), RankPlace(n, 0, 2, 2)) for n, name in enumerate("ab")]
    assert EngineKvCache.merged(stages) == kv_cache(tp=2, stages=(("a",), ("b",)))


def test_every_rank_of_a_stage_says_the_same() -> None:
    assert len({str(said(rank_layout(("a",)), RankPlace(0, rank, 1, 2))) for rank in (0, 1)}) == 1


def test_of_a_group_without_layers_on_a_stage_others_say_what_it_is() -> None:
    layouts = [rank_layout((), ("b",)), rank_layout(("c",), ("d",)), rank_layout(("e",), ())]
    stages = [said(layout, RankPlace(n, 0, 3, 2)) for n, layout in enumerate(layouts)]
    for stage in stages:
        check_description(stage, "our")
    whole = EngineKvCache.merged(stages)
    one = kv_cache(tp=2, stages=((), ("c",), ("e",))).groups
    other = kv_cache(tp=2, stages=(("b",), ("d",), ())).groups
    assert whole.groups == one + other
    check_description(whole, "our")
    check_memory(
        whole, [RankMemory((Region(0, 9, 512, 512),) * n, b"") for n in (1, 1, 2, 2, 1, 1)], "our"
    )


def test_the_layers_of_a_stage_come_group_by_group() -> None:
    layouts = [rank_layout(("c",), ("a", "b")), rank_layout((), ("d",))]
    whole = EngineKvCache.merged(
        [said(layout, RankPlace(n, 0, 2, 2)) for n, layout in enumerate(layouts)]
    )
    assert [whole.layers_of(stage) for stage in (0, 1)] == [["c", "a", "b"], ["d"]]
    assert [layout.layers for layout in layouts] == [["c", "a", "b"], ["d"]]


def test_a_rank_finds_its_way_by_what_it_knows_as_it_would_by_all() -> None:
    layouts = [rank_layout((), ("b",)), rank_layout(("c",), ("a",))]
    stages = [said(layout, RankPlace(n, 0, 2, 2)) for n, layout in enumerate(layouts)]
    whole, theirs = EngineKvCache.merged(stages), kv_cache(tp=4, stages=(("a", "b", "c"),))
    for rank in range(4):
        assert find_route(theirs, stages[rank // 2], rank) == find_route(theirs, whole, rank)
