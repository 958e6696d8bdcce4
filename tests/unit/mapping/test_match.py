"""Which rank takes what from which."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.unit.mapping.examples import changed, kv_cache, mla, opaque
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.mapping.direct import Direct
from vllm_pd_plugin.mapping.kv_cache import FP8, EngineKvCache
from vllm_pd_plugin.mapping.match import match


def taken(theirs: EngineKvCache, ours: EngineKvCache) -> list[list[tuple[int, list[int]]]]:
    """For each rank of ours: from which of theirs which heads."""
    return [
        [(share.source_rank, list(share.heads)) for share in shares]
        for shares in match(theirs, ours)
    ]


def test_rank_i_of_equal_engines_takes_whole_pages_from_rank_i() -> None:
    engine = kv_cache(tp=2)
    assert taken(engine, engine) == [[(0, [0, 1])], [(1, [2, 3])]]
    for (share,) in match(engine, engine):
        assert share.direct is not None
        assert [run.num_bytes for run in share.direct.runs] == [engine.groups[0].layout.page_bytes]


def test_pages_that_are_alike_are_read_whole_whatever_lies_between_what_is_in_them() -> None:
    """Here a value before its key, so that neither is a run of bytes."""
    engine = kv_cache(tp=2, form="swapped")
    for (share,) in match(engine, engine):
        assert share.direct == Direct.of_whole_pages(engine.groups[0].layout)
    for ours in (kv_cache(form="swapped"), kv_cache(tp=2, block=32, form="swapped")):
        assert all(share.direct is None for of in match(engine, ours) for share in of)
    one = kv_cache(tp=1, form="swapped")
    page_bytes = one.groups[0].layout.page_bytes
    padded = changed(engine, layout={"page_bytes": page_bytes})
    for (share,) in match(one, padded):
        assert share.direct is None, "half of a page is not ours"


def test_more_ranks_take_their_heads_from_fewer() -> None:
    assert taken(kv_cache(tp=1), kv_cache(tp=4)) == [[(0, [n])] for n in range(4)]


def test_fewer_ranks_take_their_heads_from_several() -> None:
    assert taken(kv_cache(tp=4), kv_cache(tp=2)) == [
        [(0, [0]), (1, [1])],
        [(2, [2]), (3, [3])],
    ]


def test_sizes_that_do_not_divide_each_other_do_where_they_divide_the_heads() -> None:
    assert taken(kv_cache(tp=2, heads=6), kv_cache(tp=3, heads=6)) == [
        [(0, [0, 1])],
        [(0, [2]), (1, [3])],
        [(1, [4, 5])],
    ]


def test_ranks_that_hold_the_same_head_serve_in_turn() -> None:
    """Four of theirs hold each head, two of ours."""
    assert taken(kv_cache(tp=8, heads=2), kv_cache(tp=4, heads=2)) == [
        [(0, [0])], [(1, [0])], [(4, [1])], [(5, [1])],
    ]  # fmt: skip


def test_engines_of_other_data_parallel_ranks_take_from_other_sources() -> None:
    served = Counter(match(mla(tp=4), mla(tp=1, rank=rank))[0][0].source_rank for rank in range(8))
    assert served == {0: 2, 1: 2, 2: 2, 3: 2}


def test_who_shares_a_latent_is_named() -> None:
    for shares in match(mla(tp=1), mla(tp=4)):
        assert [share.shared_by for share in shares] == [(0, 1, 2, 3)]


def test_who_holds_a_head_alone_shares_it_with_nobody() -> None:
    assert [s[0].shared_by for s in match(kv_cache(tp=1), kv_cache(tp=2))] == [(0,), (1,)]


def test_any_split_of_layers_becomes_any_other() -> None:
    a, b, c = "layers.0", "layers.1", "layers.2"
    theirs, ours = kv_cache(tp=2, stages=((a,), (b, c))), kv_cache(stages=((a, b), (c,)))
    found = [
        [(s.source_rank, s.layers, s.source_regions, s.regions, list(s.heads)) for s in shares]
        for shares in match(theirs, ours)
    ]
    assert found == [
        [
            (0, (a,), (0,), (0,), [0, 1]),
            (1, (a,), (0,), (0,), [2, 3]),
            (2, (b,), (0,), (1,), [0, 1]),
            (3, (b,), (0,), (1,), [2, 3]),
        ],
        [(2, (c,), (1,), (0,), [0, 1]), (3, (c,), (1,), (0,), [2, 3])],
    ]


@pytest.mark.parametrize(
    ("theirs", "ours", "on_the_wire"),
    [
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "bfloat16"),
        ("float16", "bfloat16", "bfloat16"),
        ("bfloat16", "float16", "float16"),
        ("float32", "float16", "float16"),
        ("bfloat16", FP8, FP8),
    ],
)
def test_what_is_converted_crosses_the_wire_in_the_narrower_type(
    theirs: str, ours: str, on_the_wire: str
) -> None:
    ((share,),) = match(kv_cache(dtype=theirs), kv_cache(dtype=ours), allow_fp8=True)
    assert share.direct is None
    assert share.slab is not None
    assert share.slab.dtype == on_the_wire


def test_nothing_becomes_fp8_unless_that_is_allowed() -> None:
    with pytest.raises(PeerError, match="bfloat16 there, fp8_e4m3 here.*has to be allowed"):
        match(kv_cache(), kv_cache(dtype=FP8))


@pytest.mark.parametrize(
    ("theirs", "ours"), [(FP8, "bfloat16"), ("float32", FP8), ("float16", FP8)], ids=str
)
def test_other_types_do_not_become_each_other(theirs: str, ours: str) -> None:
    with pytest.raises(PeerError, match=f"{theirs} there and cannot become {ours}"):
        match(kv_cache(dtype=theirs), kv_cache(dtype=ours), allow_fp8=True)


def test_pages_of_which_nobody_knows_the_inside_go_between_equal_ones() -> None:
    ((share,), _) = match(opaque(tp=2), opaque(tp=2))
    assert share.direct is not None
    assert share.slab is None
    ((of_latent,), _) = match(opaque(heads=1), opaque(heads=1, tp=2))
    assert of_latent.direct is not None


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (opaque(tp=1), "heads 0 to 3 there.*heads 0 to 1 here"),
        (opaque(tp=2, block=32), "32 tokens.*there.*16 tokens.*here"),
        (opaque("other", tp=2), "format other.*there.*format packed.*here"),
        (kv_cache(tp=2), "format known.*there.*format packed.*here"),
    ],
)
def test_pages_of_which_nobody_knows_the_inside_have_to_be_alike(
    theirs: EngineKvCache, said: str
) -> None:
    with pytest.raises(PeerError, match=said):
        match(theirs, opaque(tp=2))


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (kv_cache(heads=8), "num_heads is 8 there, 4 here"),
        (kv_cache(channels=(("key", 4), ("value", 2))), r"'value', 2.*there.*'value', 4.*here"),
        (mla(tp=1), "kind is mla there, full here"),
        (
            kv_cache(kind="sliding_window", window=8),
            "kind is sliding_window there, full here",
        ),
        (kv_cache(stages=(("layers.0",),)), "theirs has 1 layers, ours 2.*no layers.1"),
        (
            kv_cache(stages=(("layers.0", "layers.1", "layers.2"),)),
            "theirs has 3 layers, ours 2.*ours has no layers.2",
        ),
    ],
)
def test_another_model_is_refused_and_both_values_are_named(
    theirs: EngineKvCache, said: str
) -> None:
    with pytest.raises(PeerError, match=said) as refusal:
        match(theirs, kv_cache())
    assert refusal.value.reason is Reason.PEER_INCOMPATIBLE


def test_another_window_is_refused() -> None:
    ours = kv_cache(kind="sliding_window", window=8)
    with pytest.raises(PeerError, match="window is 9 there, 8 here"):
        match(changed(ours, spec={"window": 9}), ours)
