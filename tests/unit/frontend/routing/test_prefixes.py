"""What engines have in their prefix caches, as they say it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_plugin.engine_port.messages import Blocks, Cleared, Removed, Stored

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.routing.prefixes import NamedPrompt, PrefixIndex

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
    assert index.cached(NamedPrompt(PROMPT)) == {}


def test_whole_blocks_from_the_beginning_count(index: PrefixIndex) -> None:
    tell(index, stored(None, [b"a", b"b"], PROMPT[:8]))
    assert index.cached(NamedPrompt(PROMPT)) == {"e": 8}
    assert index.cached(NamedPrompt(PROMPT[:7])) == {"e": 4}
    assert index.cached(NamedPrompt(PROMPT[:3])) == {}
    assert index.cached(NamedPrompt([1, *PROMPT])) == {}


def test_a_block_follows_the_one_that_it_names(index: PrefixIndex) -> None:
    tell(index, stored(None, [b"a"], PROMPT[:4]))
    tell(index, stored(b"a", [b"b"], PROMPT[4:8]), stored(b"b", [b"c"], PROMPT[8:]))
    assert index.cached(NamedPrompt(PROMPT)) == {"e": 12}
    assert index.cached(NamedPrompt(PROMPT[4:])) == {}  # the same tokens, elsewhere


def test_what_follows_a_block_that_is_not_known_is_of_no_use(index: PrefixIndex) -> None:
    tell(index, stored(b"never heard of", [b"b"], PROMPT[:4]))
    assert index.cached(NamedPrompt(PROMPT)) == {}


def test_a_block_that_is_gone_ends_the_prefix(index: PrefixIndex) -> None:
    tell(index, stored(None, [b"a", b"b", b"c"], PROMPT))
    tell(index, Removed((b"b", b"unknown")))
    assert index.cached(NamedPrompt(PROMPT)) == {"e": 4}
    tell(index, stored(b"a", [b"b"], PROMPT[4:8]))
    assert index.cached(NamedPrompt(PROMPT)) == {"e": 12}


def test_a_block_that_is_there_twice_is_there_until_both_are_gone(index: PrefixIndex) -> None:
    tell(index, stored(None, [b"a"], PROMPT[:4]), stored(None, [b"another"], PROMPT[:4]))
    tell(index, Removed((b"a",)))
    assert index.cached(NamedPrompt(PROMPT)) == {"e": 4}
    tell(index, Removed((b"another",)))
    assert index.cached(NamedPrompt(PROMPT)) == {}


def test_a_block_that_is_told_of_twice_is_there_once(index: PrefixIndex) -> None:
    tell(index, stored(None, [b"a"], PROMPT[:4]), stored(None, [b"a"], PROMPT[:4]))
    tell(index, Removed((b"a",)))
    assert index.cached(NamedPrompt(PROMPT)) == {}


def test_a_cleared_cache_is_empty_and_fills_again(index: PrefixIndex) -> None:
    tell(index, stored(None, [b"a"], PROMPT[:4]), Cleared())
    assert index.cached(NamedPrompt(PROMPT)) == {}
    tell(index, Cleared(), stored(None, [b"a"], PROMPT[:4]))
    assert index.cached(NamedPrompt(PROMPT)) == {"e": 4}


def test_engines_are_told_apart_and_forgotten_alone(index: PrefixIndex) -> None:
    tell(index, stored(None, [b"a", b"b"], PROMPT[:8]), engine="e")
    tell(index, stored(None, [b"x"], PROMPT[:6], size=6), engine="f")
    assert index.cached(NamedPrompt(PROMPT)) == {"e": 8, "f": 6}
    index.forget("e")
    index.forget("never there")
    assert index.cached(NamedPrompt(PROMPT)) == {"f": 6}


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
    assert index.cached(NamedPrompt(prompt)) == ({"e": expected} if expected else {})


def test_of_many_engines_those_that_have_most_of_a_prompt_are_named_first(
    index: PrefixIndex,
) -> None:
    for number, length in enumerate([4, 12, 4, 8, 4]):
        hashes = [b"%d" % place for place in range(length // SIZE)]
        tell(index, stored(None, hashes, PROMPT[:length]), engine=f"e{number}")
    prompt = NamedPrompt(PROMPT)
    assert index.holders(prompt, 2) == ["e1", "e3"]
    assert set(index.holders(prompt, 9)) == {"e0", "e1", "e2", "e3", "e4"}
    assert index.holders(NamedPrompt([1, *PROMPT]), 2) == []
    assert index.cached(prompt, ["e0", "e3", "never there"]) == {"e0": 4, "e3": 8}


def test_what_was_used_longest_ago_is_forgotten_first() -> None:
    index = PrefixIndex(most=3)
    for number in range(3):
        tell(index, stored(None, [b"%d" % number], [number] * SIZE), engine=f"e{number}")
    assert index.cached(NamedPrompt([0] * SIZE)) == {"e0": SIZE}  # used
    tell(index, stored(None, [b"3"], [3] * SIZE), engine="e3")
    assert index.cached(NamedPrompt([1] * SIZE)) == {}
    assert [index.cached(NamedPrompt([n] * SIZE)) for n in (0, 2, 3)] == [
        {"e0": SIZE}, {"e2": SIZE}, {"e3": SIZE},
    ]  # fmt: skip
    tell(index, Removed((b"1",)), engine="e1")  # it is forgotten already
    assert len(index) == 3


@given(
    changes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans()), max_size=60)
)
def test_no_more_is_remembered_than_is_allowed(changes: list[tuple[int, int, bool]]) -> None:
    index = PrefixIndex(most=5)
    for engine, number, is_stored in changes:
        hashes = [b"%d-%d" % (number, place) for place in range(2)]
        if is_stored:
            tell(index, stored(None, hashes, [number] * 2 * SIZE), engine=str(engine))
        else:
            tell(index, Removed(tuple(hashes[1:])), engine=str(engine))
        assert len(index) <= 5
    for engine in range(4):
        index.forget(str(engine))
    assert len(index) == 0
    assert index.holders(NamedPrompt([1] * SIZE), 5) == []


class Everything:
    """Contains it."""

    def __contains__(self, name: object) -> bool:
        return True


def test_a_name_is_as_short_whatever_is_in_the_block() -> None:
    prompt = NamedPrompt([2**40 + number for number in range(64)])
    names = prompt.leading(SIZE, Everything())
    assert len(set(names)) == 16
    assert all(-(2**63) <= name < 2**63 for name in names)
    assert NamedPrompt([2**70] * SIZE).leading(SIZE, Everything()) == []


class Read(list[int]):
    """Counts how many of its tokens are read."""

    num_read = 0

    def __getitem__(self, what: Any) -> Any:
        tokens = super().__getitem__(what)
        self.num_read += len(tokens)
        return tokens


def test_a_prompt_s_blocks_are_named_once_and_only_as_far_as_anybody_has_them(
    index: PrefixIndex,
) -> None:
    tell(index, stored(None, [b"a"], PROMPT[:4]))
    read = Read(PROMPT)
    prompt = NamedPrompt(read)
    assert index.cached(prompt) == {"e": 4}
    assert read.num_read == 8
    assert index.holders(prompt, 1) == ["e"]
    assert read.num_read == 8
    tell(index, stored(b"a", [b"b"], PROMPT[4:8]))
    assert index.cached(prompt) == {"e": 8}
    assert read.num_read == 12
