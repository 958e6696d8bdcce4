"""What a description says of itself."""

from __future__ import annotations

import msgspec
import pytest

from tests.mapping.memory import heads_on
from tests.unit.mapping.examples import kv_cache
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.mapping.kv_cache import EngineKvCache, Place, heads_of


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
