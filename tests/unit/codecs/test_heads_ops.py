"""Gathering and scattering heads: every type, and the layouts of attention kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.planes import NUM_BLOCKS, PART_LAYOUTS, Laid, make_parts
from tests.fakes.planes import Slab as Guarded
from tests.tools import needs
from tests.unit.codecs.test_heads import TYPES, served_by
from vllm_pd_plugin.codecs import heads, ops
from vllm_pd_plugin.codecs.codec import Part
from vllm_pd_plugin.mapping.kv_cache import FP8, ITEM_BYTES

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    needs(ops.HAS_NATIVE, "the native extension"),
]

FLOATS = [name for name in TYPES if name != FP8]
CONVERSIONS = [(a, b) for a in FLOATS for b in TYPES] + [(FP8, FP8)]


def test_the_types_are_those_of_slabs() -> None:
    assert heads._DTYPES == TYPES
    assert {name: dtype.itemsize for name, dtype in TYPES.items()} == ITEM_BYTES


# --- types -----------------------------------------------------------------------------------


def every_value(dtype: str) -> torch.Tensor:
    """Return all values of a type; of float32 those next to where another type rounds, and many
    others."""
    if dtype == "float32":
        high = torch.arange(-(2**15), 2**15)[:, None] << 16
        low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xEFFF, 0xF000, 0xF001, 0xFFFF])
        return (high | low).flatten().to(torch.int32).view(torch.float32)
    if dtype == FP8:
        return torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(TYPES[dtype])


def as_pages(values: torch.Tensor) -> tuple[list[heads.LayerParts], int]:
    """Return one layer of one head that has some values, and how many tokens these are."""
    width = 64
    tokens = len(values) // width
    part = Part.of_rows("key", width, 0, width)
    pages = heads.Pages(1, len(values) * values.element_size(), tokens, 1, 0, (part,))
    return [pages.of(values)], tokens


def gathered(values: torch.Tensor, dtype: str, scale: float) -> torch.Tensor:
    layers, tokens = as_pages(values)
    slab = torch.zeros(len(values) * ITEM_BYTES[dtype], dtype=torch.uint8)
    heads.gather_heads(layers, range(1), torch.tensor([0]), range(tokens), dtype, slab, [[scale]])
    return slab.view(TYPES[dtype])


def scattered(values: torch.Tensor, source: str, dtype: str, scale: float) -> torch.Tensor:
    result = torch.zeros(len(values), dtype=TYPES[dtype])
    layers, tokens = as_pages(result)
    slab = values.view(torch.uint8)
    heads.scatter_heads(slab, source, torch.tensor([0]), range(tokens), range(1), layers, [[scale]])
    return result


def same_bits(values: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether they are, but for NaNs: these have to be NaNs."""
    nans = expected.float().isnan()
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()]
    return torch.equal(values.float().isnan(), nans) and torch.equal(
        values.view(size)[~nans], expected.view(size)[~nans]
    )


@pytest.mark.parametrize("who", ["native", "reference"])
@pytest.mark.parametrize("scale", [1.0, 0.0371, 300.0])
@pytest.mark.parametrize(("source", "target"), CONVERSIONS)
def test_every_value_becomes_what_pytorch_makes_of_it(
    source: str, target: str, scale: float, who: str
) -> None:
    values = every_value(source)
    expected = values
    if source != target:
        wide = values.float()
        expected = (wide / scale).clamp(-448, 448) if target == FP8 else wide
        expected = expected.to(TYPES[target])
    with served_by(who):
        assert same_bits(gathered(values, target, scale), expected)
        assert same_bits(scattered(values, source, target, scale), expected)


@pytest.mark.parametrize("who", ["native", "reference"])
@pytest.mark.parametrize("dtype", TYPES)
def test_an_equal_type_keeps_every_bit_even_of_nans(dtype: str, who: str) -> None:
    values = every_value(dtype)
    with served_by(who):
        assert torch.equal(gathered(values, dtype, 3.0).view(torch.uint8), values.view(torch.uint8))
        back = scattered(values, dtype, dtype, 3.0)
        assert torch.equal(back.view(torch.uint8), values.view(torch.uint8))


def test_infinities_become_the_largest_fp8_and_no_other_type_loses_them() -> None:
    infinities = torch.tensor([torch.inf, -torch.inf]).repeat(32)
    assert gathered(infinities, FP8, 1.0).float().unique().tolist() == [-448, 448]
    for dtype in FLOATS:
        assert gathered(infinities, dtype, 1.0).float().unique().tolist() == [-torch.inf, torch.inf]


# --- layouts ---------------------------------------------------------------------------------


def any_bytes(dtype: torch.dtype, seed: int) -> Callable[[int], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def fill(count: int) -> torch.Tensor:
        return torch.randint(
            0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator
        ).view(dtype)

    return fill


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_the_layout_the_native_ops_write_what_the_references_write(
    data: st.DataObject,
) -> None:
    """Some blocks and widths are such that columns and tiles are moved in whole vectors."""
    draw = data.draw
    source, target = draw(st.sampled_from(CONVERSIONS))
    back = draw(st.sampled_from([to for of, to in CONVERSIONS if of == target]))
    shape = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 5, 8, 16, 24, 32, 80])),
        draw(st.sampled_from([1, 7, 8, 20, 64, 128, 132])),
    )
    layout, seed = draw(st.sampled_from(PART_LAYOUTS)), draw(st.integers(0, 9))
    blocks = draw(
        st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=1, max_size=NUM_BLOCKS, unique=True)
    )
    start = draw(st.integers(0, len(blocks) * shape[1]))
    tokens = range(start, draw(st.integers(start, len(blocks) * shape[1])))
    first_head = draw(st.integers(0, shape[0] - 1))
    chosen = range(first_head, draw(st.integers(first_head, shape[0])))
    num_layers, num_parts = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    pages, others = (
        [make_parts(shape, fill, layout, num_parts) for _ in range(num_layers)]
        for fill in (any_bytes(TYPES[source], seed), any_bytes(TYPES[back], seed))
    )
    scales = [[0.5 + layer + part for part in range(num_parts)] for layer in range(num_layers)]
    table = torch.tensor(blocks)
    elements = num_layers * len(tokens) * len(chosen) * num_parts * shape[2]
    there, results = [], []
    for who in ("native", "reference"):
        slab, result = Guarded(elements * ITEM_BYTES[target]), [laid.copy() for laid in others]
        before = [laid.copy() for laid in pages]
        with served_by(who):
            layers = [laid.views for laid in pages]
            heads.gather_heads(layers, chosen, table, tokens, target, slab.bytes, scales)
            there.append(slab.bytes.view(TYPES[target]))
            layers = [laid.views for laid in result]
            heads.scatter_heads(slab.bytes, target, table, tokens, chosen, layers, scales)
        assert slab.is_intact
        assert all(a.is_equal(b) for a, b in zip(before, pages, strict=True))
        results.append(result)
    assert same_bits(*there)
    assert all(same_memory(a, b) for a, b in zip(*results, strict=True))


def same_memory(laid: Laid, other: Laid) -> bool:
    pairs = zip(laid.memory, other.memory, strict=True)
    return all(same_bits(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", PART_LAYOUTS)
def test_a_run_may_begin_and_end_anywhere_in_a_block(layout: str, dtype: str) -> None:
    """Columns and tiles are moved several tokens at once, which must not be of two blocks."""
    pages = make_parts((1, 24, 16), any_bytes(TYPES[dtype], 1), layout)
    table = torch.tensor([3, 1])
    rows = torch.cat([part[table].flatten(0, 2) for part in as_integers(pages)], 1)
    for start, length in itertools.product(range(24), (9, 24)):
        stop = start + length
        slab = torch.zeros(length * 2 * 16 * ITEM_BYTES[dtype], dtype=torch.uint8)
        heads.gather_heads([pages.views], range(1), table, range(start, stop), dtype, slab)
        assert torch.equal(slab, rows[start:stop].contiguous().view(torch.uint8).flatten())
        target = pages.inverted()
        expected = as_integers(target)
        heads.scatter_heads(slab, dtype, table, range(start, stop), range(1), [target.views])
        tokens = torch.arange(start, stop)
        blocks, slots = table[tokens // 24], tokens % 24
        for part, other in zip(as_integers(pages), expected, strict=True):
            other[blocks, 0, slots] = part[blocks, 0, slots]
        assert all(map(torch.equal, as_integers(target), expected))


def as_integers(laid: Laid) -> list[torch.Tensor]:
    """Copies as ``[NUM_BLOCKS, heads, tokens, width]``, of integers of the elements' size."""
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return [rows.view(size[rows.element_size()]) for rows in laid.rows]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_any_number_of_threads_does_it(num_threads: int) -> None:
    """48 MiB: a thread gets 16 at the least."""
    shape = 16, 512, 128
    pages = [make_parts(shape, any_bytes(torch.bfloat16, 1), "tokens before heads") for _ in "ab"]
    target = [laid.inverted() for laid in pages]
    table, tokens = torch.tensor([4, 0, 3]), range(1536)
    slab = torch.zeros(2 * 2 * 16 * 1536 * 128 * 2, dtype=torch.uint8)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        heads.gather_heads(
            [laid.views for laid in pages], range(16), table, tokens, "bfloat16", slab
        )
        heads.scatter_heads(
            slab, "bfloat16", table, tokens, range(16), [laid.views for laid in target]
        )
    finally:
        torch.set_num_threads(before)
    for laid, other in zip(pages, target, strict=True):
        for rows, others in zip(laid.rows, other.rows, strict=True):
            same = (rows.view(torch.int16) == others.view(torch.int16)).flatten(1).all(1)
            assert same.tolist() == [True, False, False, True, True, False]


# --- pages -----------------------------------------------------------------------------------


def test_a_block_of_two_kernel_blocks_is_two_tiles_of_tokens() -> None:
    """Kernel blocks of 64 tokens, the heads of each token beside each other."""
    cache = torch.arange(3.0 * 2 * 64 * 2 * 4).view(6, 64, 2, 4)
    part = Part("key", 4, 0, 64, 4, (64 * 8, 8, 0, 1))
    (view,) = heads.Pages(3, 128 * 8 * 4, 128, 2, 4, (part,)).of(cache)
    rows = view.flatten(4, 5).flatten(2, 3)
    assert torch.equal(rows, cache.view(3, 128, 2, 4).transpose(1, 2))
    assert view.data_ptr() == cache.data_ptr()


def test_pages_begin_where_the_cache_does() -> None:
    memory = torch.arange(64.0)
    part = Part.of_rows("key", 2, 0, 2)
    (view,) = heads.Pages(2, 16 * 4, 4, 1, 8, (part,)).of(memory[8:])
    assert view.flatten(1)[:, 0].tolist() == [8.0, 24.0]


@pytest.mark.parametrize(
    ("num_blocks", "stride_bytes", "message"),
    [(2, 34, "34 bytes apart, elements have 4"), (5, 64, "out of bounds"), (2**40, 64, "bounds")],
)
def test_pages_that_do_not_lie_in_the_cache_are_refused(
    num_blocks: int, stride_bytes: int, message: str
) -> None:
    pages = heads.Pages(num_blocks, stride_bytes, 4, 1, 8, (Part.of_rows("key", 2, 0, 2),))
    with pytest.raises(RuntimeError, match=message):
        pages.of(torch.zeros(64))
