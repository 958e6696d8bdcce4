"""Which bytes of two pages lie alike."""

from __future__ import annotations

from vllm_pd_plugin.codecs.codec import Part
from vllm_pd_plugin.mapping.direct import Direct, Heads, Run, find_direct
from vllm_pd_plugin.mapping.kv_cache import KvCacheLayout

KEY = Part.of_rows("key", 4, 0, 8)
VALUE = Part.of_rows("value", 4, 4, 8)


def layout(*parts: Part, block: int = 2, head_stride: int = 16) -> KvCacheLayout:
    return KvCacheLayout("float16", block, 4096, (("a",),), "", parts, head_stride)


def found(theirs: KvCacheLayout, ours: KvCacheLayout, heads: int = 1) -> Direct | None:
    return find_direct(Heads(theirs, 0, heads), Heads(ours, 0, heads))


def test_a_key_beside_its_value_is_one_row() -> None:
    page = layout(KEY, VALUE)
    assert found(page, page) == Direct(2, 2, 2, (Run(0, 0, 0, 0, 32),))


def test_parts_that_begin_beside_each_other_and_go_apart_are_not() -> None:
    """Value 1 begins at element 16, key 1 at element 8."""
    page = layout(KEY, Part.of_rows("value", 4, 4, 12))
    assert found(page, page) is None


def test_channels_that_lie_apart_are_no_row() -> None:
    page = layout(KEY, Part("value", 4, 4, 1, 2, (8, 0, 100, 1)), block=1)
    assert found(page, page) is None


def test_the_chunks_of_a_block_are_found_at_equal_distances() -> None:
    """A block of 4 tokens against two of 2, heads 32 and 16 elements apart."""
    theirs, ours = layout(KEY, VALUE, block=4, head_stride=32), layout(KEY, VALUE)
    assert found(theirs, ours, heads=2) == Direct(
        2, 4, 2, (Run(0, 32, 0, 0, 32), Run(64, 32, 32, 0, 32))
    )


def test_chunks_of_a_block_that_do_not_lie_at_equal_distances_are_not_read() -> None:
    """Two tiles of 4 tokens each, 100 elements apart, in chunks of 2 tokens."""
    tiles = [Part(part.kind, 4, part.start, 4, 4, (100, 8, 0, 1)) for part in (KEY, VALUE)]
    assert found(layout(*tiles, block=8), layout(KEY, VALUE)) is None
    assert found(layout(*tiles, block=4), layout(KEY, VALUE)) is not None
