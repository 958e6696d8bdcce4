"""What engines have in their prefix caches, as they say it."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_plugin.engine_port.messages import Blocks, Cleared, Removed, Stored

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.routing.prefixes import PrefixIndex

PROMPT = list(range(10, 22))
SIZE = 4


@pytest.fixture
def index() -> PrefixIndex:
    return PrefixIndex()


def stored(
    parent: bytes | None, hashes: list[bytes], tokens: list[int], size: int = SIZE
) -> Stored:
    return Stored(parent, tuple(hashes), tuple(tokens), size)


def tell(index: PrefixIndex, *changes: Stored | Removed | Cleared, engine: str = "e") -> None:
    index.change(engine, Blocks(changes))


def test_of_an_engine_that_has_said_nothing_nothing_is_known(index: PrefixIndex) -> None:
    assert index.cached(PROMPT) == {}


def test_whole_blocks_from_the_beginning_count(index: PrefixIndex) -> None:
    tell(index, stored(None, [b"a", b"b"], PROMPT[:8]))
    assert index.cached(PROMPT) == {"e": 8}
    assert index.cached(PROMPT[:7]) == {"e": 4}
    assert index.cached(PROMPT[:3]) == {}
    assert index.cached([1, *PROMPT]) == {}


def test_a_block_follows_the_one_that_it_names(index: PrefixIndex) -> None:
    tell(index, stored(None, [b"a"], PROMPT[:4]))
    tell(index, stored(b"a", [b"b"], PROMPT[4:8]), stored(b"b", [b"c"], PROMPT[8:]))
    assert index.cached(PROMPT) == {"e": 12}
    assert index.cached(PROMPT[4:]) == {}  # the same tokens, elsewhere


def test_what_follows_a_block_that_is_not_known_is_of_no_use(index: PrefixIndex) -> None:
    tell(index, stored(b"never heard of", [b"b"], PROMPT[:4]))
    assert index.cached(PROMPT) == {}


def test_a_block_that_is_gone_ends_the_prefix(index: PrefixIndex) -> None:
    tell(index, stored(None, [b"a", b"b", b"c"], PROMPT))
    tell(index, Removed((b"b", b"unknown")))
    assert index.cached(PROMPT) == {"e": 4}
    tell(index, stored(b"a", [b"b"], PROMPT[4:8]))
    assert index.cached(PROMPT) == {"e": 12}


def test_a_block_that_is_there_twice_is_there_until_both_are_gone(index: PrefixIndex) -> None:
    tell(index, stored(None, [b"a"], PROMPT[:4]), stored(None, [b"another"], PROMPT[:4]))
    tell(index, Removed((b"a",)))
    assert index.cached(PROMPT) == {"e": 4}
    tell(index, Removed((b"another",)))
    assert index.cached(PROMPT) == {}


def test_a_block_that_is_told_of_twice_is_there_once(index: PrefixIndex) -> None:
    tell(index, stored(None, [b"a"], PROMPT[:4]), stored(None, [b"a"], PROMPT[:4]))
    tell(index, Removed((b"a",)))
    assert index.cached(PROMPT) == {}


def test_a_cleared_cache_is_empty_and_fills_again(index: PrefixIndex) -> None:
    tell(index, stored(None, [b"a"], PROMPT[:4]), Cleared())
    assert index.cached(PROMPT) == {}
    tell(index, Cleared(), stored(None, [b"a"], PROMPT[:4]))
    assert index.cached(PROMPT) == {"e": 4}


def test_engines_are_told_apart_and_forgotten_alone(index: PrefixIndex) -> None:
    tell(index, stored(None, [b"a", b"b"], PROMPT[:8]), engine="e")
    tell(index, stored(None, [b"x"], PROMPT[:6], size=6), engine="f")
    assert index.cached(PROMPT) == {"e": 8, "f": 6}
    index.forget("e")
    index.forget("never there")
    assert index.cached(PROMPT) == {"f": 6}


@given(
    texts=st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=8), max_size=6),
    removed=st.lists(st.integers(0, 30)),
    prompt=st.lists(st.integers(0, 1), max_size=10),
)
def test_an_index_knows_what_a_plain_search_finds(
    texts: list[list[int]], removed: list[int], prompt: list[int]
) -> None:
    """Blocks of two tokens; a hash names a block by everything up to its end, as vLLM's do."""
    index, there = PrefixIndex(), set()
    for text in texts:
        prefixes = [bytes(text[:end]) for end in range(2, len(text) + 1, 2)]
        tell(index, stored(None, prefixes, text[: 2 * len(prefixes)], size=2))
        there |= set(prefixes)
    for number in removed:
        if there:
            gone = sorted(there)[number % len(there)]
            there.remove(gone)
            tell(index, Removed((gone,)))
    expected = 0
    while expected + 2 <= len(prompt) and bytes(prompt[: expected + 2]) in there:
        expected += 2
    assert index.cached(prompt) == ({"e": expected} if expected else {})
