"""In which pieces a share of an engine of another shape is asked for."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.shapes import Shape
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.ids import HandoffId
from vllm_pd_plugin.mapping.kv_cache import EngineKvCache
from vllm_pd_plugin.mapping.match import Share, match
from vllm_pd_plugin.memory.layout import RankMemory, Region
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.transfer.asked import AskedHeads, Question, heads_asked

TOKEN_BYTES = 2 * 4 * 2
"""Two heads of four channels in bfloat16."""


def said(shape: Shape) -> EngineKvCache:
    stages = []
    for place in shape.places[:: shape.tp]:
        layout = shape.layout(place.stage)
        region = Region(0, 64, shape.page_bytes, shape.page_bytes)
        memory = RankMemory((region,) * len(layout.layers), b"")
        stages.append(EngineKvCache.seen_by_rank(layout, memory, place))
    return EngineKvCache.merged(stages)


def shares(theirs: Shape, ours: Shape, rank: int = 0) -> tuple[Share, ...]:
    return match(said(theirs), said(ours))[rank]


def asked(
    share: Share, ours: Shape, tokens: list[range], max_bytes: int = 2**20
) -> list[AskedHeads]:
    assert share.slab is not None
    return list(heads_asked(ours.layout(0), share, share.slab, tokens, max_bytes))


ONE, TWO = Shape(), Shape(tp=2)
(SHARE,) = shares(ONE, TWO, rank=1)
"""Heads 2 and 3 of a page of four."""


def test_layers_of_which_the_same_tokens_are_wanted_share_a_piece() -> None:
    (one,) = asked(SHARE, TWO, [range(5, 21)] * 3)
    assert one.piece.regions == (0, 1, 2)
    assert one.piece.tokens == range(5, 21)
    assert one.piece.num_bytes == one.piece.kv_bytes == 3 * 16 * TOKEN_BYTES


def test_layers_of_which_other_tokens_are_wanted_have_pieces_of_their_own() -> None:
    pieces = asked(SHARE, TWO, [range(8), range(4), range(8)])
    assert [(one.piece.regions, one.piece.tokens) for one in pieces] == [
        ((0, 2), range(8)), ((1,), range(4)),
    ]  # fmt: skip


def test_layers_of_which_nothing_is_wanted_are_not_asked_for() -> None:
    (one,) = asked(SHARE, TWO, [range(0), range(4), range(4, 4)])
    assert one.piece.regions == (1,)


def test_what_is_too_large_for_one_piece_is_asked_for_by_layers_and_then_by_tokens() -> None:
    by_layers = asked(SHARE, TWO, [range(8)] * 3, 16 * TOKEN_BYTES)
    assert [one.piece.regions for one in by_layers] == [(0, 1), (2,)]
    by_tokens = asked(SHARE, TWO, [range(8)] * 3, 5 * TOKEN_BYTES)
    assert [(one.piece.regions, one.piece.tokens) for one in by_tokens] == [
        ((0,), range(5)), ((1,), range(5)), ((2,), range(5)), ((0,), range(5, 8)),
        ((1,), range(5, 8)), ((2,), range(5, 8)),
    ]  # fmt: skip


def test_a_token_that_does_not_fit_is_refused_and_what_helps_is_named() -> None:
    assert asked(SHARE, TWO, [range(2)] * 3, TOKEN_BYTES)
    with pytest.raises(HandoffError, match="15 bytes; raise staging_bytes") as failure:
        asked(SHARE, TWO, [range(2)] * 3, TOKEN_BYTES - 1)
    assert failure.value.reason is Reason.INTERNAL


def test_a_piece_is_asked_for_as_it_is_called_there_and_taken_in_as_it_is_called_here() -> None:
    theirs, ours = Shape(stages=((2,), (0, 1)), dtype="float32"), Shape(tp=2)
    first, second = shares(theirs, ours, rank=1)
    assert (first.source_rank, second.source_rank) == (1, 0)
    (one,) = asked(first, ours, [range(4, 8)] * 2)
    assert one.piece.heads == range(2)
    assert one.message(Question(HandoffId("h"), 3, 1, True), 7) == wire.Gather(
        HandoffId("h"), 3, 1, 1, 7, 0, (0, 1), 2, 2, 4, 8, "bfloat16", True
    )
    elsewhere = dataclasses.replace(second, source_group=3)
    (other,) = asked(elsewhere, ours, [range(4, 8)])
    assert (other.piece.group, other.piece.regions) == (0, (2,))
    message = other.message(Question(HandoffId("h"), 3, 1, True), 8)
    assert (message.group, message.regions, message.source_rank) == (3, (0,), 0)


def test_regions_count_over_all_groups() -> None:
    of_window = shares(Shape(windowed=(1,)), Shape(tp=2, windowed=(1,)), rank=0)[1]
    (one,) = asked(of_window, Shape(tp=2, windowed=(1,)), [range(4)])
    message = one.message(Question(HandoffId("h"), 0, 0, False), 1)
    assert (message.group, message.regions) == (1, (2,))
    assert (one.piece.group, one.piece.regions) == (1, (2,))


RANGE = st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda ends: range(*ends))


@settings(max_examples=300)
@given(
    tokens=st.lists(RANGE, min_size=3, max_size=3),
    max_bytes=st.integers(TOKEN_BYTES, 40 * TOKEN_BYTES),
)
def test_every_token_of_every_layer_is_asked_for_once_and_no_piece_is_too_large(
    tokens: list[range], max_bytes: int
) -> None:
    pieces = asked(SHARE, TWO, tokens, max_bytes)
    assert all(0 < one.piece.num_bytes <= max_bytes for one in pieces)
    assert all(one.source_regions == one.piece.regions for one in pieces)
    found = Counter(
        place for one in pieces for place in itertools.product(one.piece.regions, one.piece.tokens)
    )
    wanted = Counter((layer, token) for layer in range(3) for token in tokens[layer])
    assert found == wanted
