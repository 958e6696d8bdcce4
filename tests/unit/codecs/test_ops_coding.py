"""Encoding and decoding: natively what the reference says, and as exact as is promised."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.native import without_native_ops
from tests.fakes.planes import NUM_BLOCKS, PART_LAYOUTS, Laid, Shape, Slab, make_parts
from tests.fakes.values import VALUES, Values, fill, normal, with_outliers
from tests.tools import needs
from vllm_pd_plugin.codecs import ops, ops_reference
from vllm_pd_plugin.codecs.codec import TOKEN_GROUP, WIDE, WIDE_CHANNELS, Encoding

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT_ROUNDOFF = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half of the distance to the next value, in relation to the value; of float32 all of it, for the
arithmetic."""

pytestmark = pytest.mark.usefixtures("one_thread")
native = needs(ops.HAS_NATIVE, "the native extension")


# --- what is encoded -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """Parts of some layers, a run of their blocks, and how its tokens are written down."""

    parts: Laid
    shape: Shape
    blocks: list[int]
    tokens: int
    encoding: Encoding
    sinks: int

    @property
    def num_bytes(self) -> int:
        stripe = self.encoding.stripe_bytes(self.tokens, self.shape[2], self.sinks)
        return len(self.parts.memory) * self.shape[0] * stripe

    @property
    def chosen(self) -> torch.Tensor:
        return torch.tensor(self.blocks)

    @property
    def native(self) -> tuple[object, ...]:
        """What the op takes of an encoding."""
        encoding = self.encoding
        return encoding.bits, encoding.group, encoding.by_channel, self.sinks

    def encoded(self) -> torch.Tensor:
        slab = Slab(self.num_bytes)
        ops.encode_blocks(
            self.parts.views, self.chosen, self.tokens, self.encoding, self.sinks, slab.bytes
        )
        assert slab.is_intact
        return slab.bytes

    def decoded(self, slab: torch.Tensor, target: Laid | None = None) -> Laid:
        """Parts with what the slab says in the blocks, and anything else elsewhere."""
        result = (target or self.parts).copy()
        ops.decode_blocks(slab, self.chosen, self.tokens, self.encoding, self.sinks, result.views)
        return result

    def stripes(self, parts: Laid) -> list[torch.Tensor]:
        """The run's tokens in some parts, ``[tokens, width]`` for each layer and head."""
        return [
            head[: self.tokens].float()
            for rows in parts.rows
            for head in rows[self.blocks].transpose(0, 1).flatten(1, 2)
        ]


def divisors(width: int) -> list[int]:
    return [size for size in range(1, width + 1) if width % size == 0]


@st.composite
def runs(draw: st.DrawFn, values: st.SearchStrategy[Values] = st.sampled_from(VALUES)) -> Run:  # noqa: B008
    bits = draw(st.sampled_from([2, 4, 8]))
    widths = [4, 8, 12, 20, 64, 128, 132, 260] + [1, 7, 65] * (bits == 8)
    block_tokens = draw(st.sampled_from([1, 3, 4, 8, 16, 24, 32, 80]))
    shape = draw(st.integers(1, 2)), block_tokens, draw(st.sampled_from(widths))
    group = draw(st.sampled_from(divisors(shape[2])))
    encoding = Encoding(bits, draw(st.booleans()) if bits < 8 else False, group)
    blocks = draw(
        st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=1, max_size=NUM_BLOCKS, unique=True)
    )
    tokens = len(blocks) * block_tokens - draw(st.integers(0, block_tokens - 1))
    dtype = draw(st.sampled_from(DTYPES))
    parts = make_parts(
        shape,
        fill(draw(values), dtype, seed=draw(st.integers(0, 5))),
        draw(st.sampled_from(PART_LAYOUTS)),
        draw(st.integers(1, 2)),
        draw(st.sampled_from([0, 3])),
    )
    return Run(parts, shape, blocks, tokens, encoding, draw(st.sampled_from([0, 1, 4, 31, 32, 40])))


# --- natively as the reference ---------------------------------------------------------------


@native
@settings(max_examples=300, deadline=None)
@given(runs())
def test_what_is_written_down_is_what_the_reference_writes(run: Run) -> None:
    before, expected = run.parts.copy(), torch.zeros(run.num_bytes, dtype=torch.uint8)
    ops_reference.encode_blocks(run.parts.views, run.chosen, run.tokens, *run.native, expected)
    assert torch.equal(run.encoded(), expected)
    assert run.parts.is_equal(before)


@native
@settings(max_examples=300, deadline=None)
@given(runs())
def test_what_is_read_back_is_what_the_reference_reads_and_nothing_else_changes(run: Run) -> None:
    slab, target = run.encoded(), run.parts.inverted()
    native, reference = run.decoded(slab, target), target.copy()
    written = slab.clone()
    ops_reference.decode_blocks(slab, run.chosen, run.tokens, *run.native, reference.views)
    assert native.is_equal(reference)
    assert torch.equal(slab, written)
    for here, there in zip(native.views, target.views, strict=True):  # outside of the run
        untouched = [block for block in range(NUM_BLOCKS) if block not in run.blocks]
        assert torch.equal(as_bytes(here[untouched]), as_bytes(there[untouched]))
    last, counted = run.blocks[-1], (run.tokens - 1) % run.shape[1] + 1
    for here, there in zip(native.rows, target.rows, strict=True):
        assert torch.equal(as_bytes(here[last, :, counted:]), as_bytes(there[last, :, counted:]))


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().flatten().view(torch.uint8)


@native
@pytest.mark.parametrize("value", [0.0, -0.0])
@pytest.mark.parametrize("by_channel", [True, False])
def test_zeros_of_both_signs_are_written_down_as_the_reference_writes_them(
    value: float, by_channel: bool
) -> None:
    values = torch.full((4096,), value)
    values[::3] = -value
    parts = make_parts((1, 32, 8), lambda count: values[:count].clone())
    run = Run(parts, (1, 32, 8), [1], 32, Encoding(4, by_channel, 8), 0)
    expected = torch.zeros(run.num_bytes, dtype=torch.uint8)
    ops_reference.encode_blocks(parts.views, run.chosen, 32, *run.native, expected)
    assert torch.equal(run.encoded(), expected)


@pytest.mark.parametrize("by_channel", [True, False])
def test_zeros_are_written_down_alike_whatever_their_sign(by_channel: bool) -> None:
    slabs = []
    for value in (0.0, -0.0):
        parts = make_parts((1, 32, 8), lambda count, value=value: torch.full((count,), value))
        run = Run(parts, (1, 32, 8), [1], 32, Encoding(4, by_channel, 8), 0)
        slabs.append(run.encoded())
    assert torch.equal(*slabs)
    assert not slabs[0].any()


@native
@pytest.mark.parametrize("num_threads", [1, 3])
def test_any_number_of_threads_writes_the_same(num_threads: int) -> None:
    parts = make_parts((3, 16, 64), fill(with_outliers, torch.bfloat16, 1), num_parts=4)
    run = Run(parts, (3, 16, 64), [5, 1, 2, 4], 60, Encoding(4, True, 64), 4)
    expected = torch.zeros(run.num_bytes, dtype=torch.uint8)
    ops_reference.encode_blocks(parts.views, run.chosen, 60, *run.native, expected)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(run.encoded(), expected)
        decoded = run.decoded(expected)
    finally:
        torch.set_num_threads(before)
    reference = parts.copy()
    ops_reference.decode_blocks(expected, run.chosen, 60, *run.native, reference.views)
    assert decoded.is_equal(reference)


@native
def test_a_slab_does_not_depend_on_the_layout() -> None:
    """Two engines need not lay their blocks out alike."""
    shape = (2, 16, 64)
    values = torch.randn((NUM_BLOCKS, *shape), generator=torch.Generator().manual_seed(2))
    slabs = []
    for layout in PART_LAYOUTS:
        parts = make_parts(shape, torch.zeros, layout, num_parts=1)
        (view,) = parts.views
        view.copy_(values.view(view.shape))
        slabs.append(Run(parts, shape, [3, 0, 2], 45, Encoding(4, True, 64), 4).encoded())
    assert all(torch.equal(slab, slabs[0]) for slab in slabs)


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    without_native_ops(monkeypatch)


def test_without_the_extension_the_references_write_the_same(
    without_native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts((2, 16, 64), fill(normal, torch.bfloat16, 3), "tiles of rows")
    run = Run(parts, (2, 16, 64), [1, 2, 4], 40, Encoding(2, False, 32), 4)
    slab, decoded = run.encoded(), run.decoded(run.encoded())
    monkeypatch.undo()
    assert torch.equal(run.encoded(), slab)
    assert run.decoded(slab).is_equal(decoded)


# --- how exact it is -------------------------------------------------------------------------


def bounds(run: Run, rows: torch.Tensor) -> torch.Tensor:
    """How far each of ``[tokens, width]`` may be off, range by range."""
    result, encoding = torch.zeros_like(rows), run.encoding
    groups = 0 if encoding.bits == 8 else run.tokens // TOKEN_GROUP
    sinks = min(run.sinks, TOKEN_GROUP) if groups else 0

    def cover(where: tuple[slice, slice], counted: torch.Tensor, how: Encoding) -> None:
        result[where] = how.error_bound(float(counted.min()), float(counted.max()))

    for first in range(0, groups * TOKEN_GROUP, TOKEN_GROUP):
        tokens = slice(first, first + TOKEN_GROUP)
        if encoding.by_channel:
            skipped = sinks if first == 0 and sinks < TOKEN_GROUP else 0
            for channel in range(rows.shape[1]):
                where = tokens, slice(channel, channel + 1)
                cover(where, rows[where][skipped:], encoding)
            continue
        for token in range(first, first + TOKEN_GROUP):
            for channel in range(0, rows.shape[1], encoding.group):
                where = slice(token, token + 1), slice(channel, channel + encoding.group)
                cover(where, rows[where], encoding)
    for token in [*range(sinks), *range(groups * TOKEN_GROUP, run.tokens)]:
        for channel in range(0, rows.shape[1], WIDE_CHANNELS):
            where = slice(token, token + 1), slice(channel, channel + WIDE_CHANNELS)
            cover(where, rows[where], WIDE)
    return result


@settings(max_examples=100, deadline=None)
@given(runs())
def test_what_comes_back_is_as_exact_as_is_promised(run: Run) -> None:
    dtype = run.parts.memory[0].dtype
    decoded = run.decoded(run.encoded())
    pairs = zip(run.stripes(run.parts), run.stripes(decoded), strict=True)
    for values, back in pairs:
        rounding = UNIT_ROUNDOFF[dtype] * torch.maximum(back.abs(), values.abs())
        rounding += torch.finfo(dtype).smallest_normal * UNIT_ROUNDOFF[dtype]
        allowed = bounds(run, values) * (1 + 1e-5) + rounding
        assert ((back - values).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sinks", [1, 4, 32])
@pytest.mark.parametrize("encoding", [Encoding(2, True, 64), Encoding(4, False, 32)], ids=str)
def test_sinks_come_back_as_exact_as_int8_rows(
    dtype: torch.dtype, sinks: int, encoding: Encoding
) -> None:
    parts = make_parts((2, 16, 64), fill(with_outliers, dtype, 4))
    narrow = Run(parts, (2, 16, 64), [1, 3, 0], 40, encoding, sinks)
    wide = dataclasses.replace(narrow, encoding=WIDE)
    both = [run.stripes(run.decoded(run.encoded())) for run in (narrow, wide)]
    for ours, theirs in zip(*both, strict=True):
        assert torch.equal(ours[:sinks], theirs[:sinks])
        assert torch.equal(ours[TOKEN_GROUP:], theirs[TOKEN_GROUP:])  # as the tail does
        assert not torch.equal(ours[:TOKEN_GROUP], theirs[:TOKEN_GROUP]) or sinks == TOKEN_GROUP


def test_sinks_do_not_widen_the_ranges_of_their_channels() -> None:
    shape = (1, 32, 64)
    values = torch.randn((1, *shape[1:]), generator=torch.Generator().manual_seed(5))
    values[:, :4] *= 1000
    parts = make_parts(shape, torch.zeros, num_parts=1)
    parts.views[0][2] = values.view(parts.views[0].shape[1:])
    errors = []
    for sinks in (4, 0):
        run = Run(parts, shape, [2], 32, Encoding(4, True, 64), sinks)
        (back,) = run.stripes(run.decoded(run.encoded()))
        errors.append(float((back - values[0])[4:].abs().max()))
    assert errors[0] < 0.3
    assert errors[1] > 30


# A range of float16 that reaches its largest value may come back as infinity otherwise.
@native
@pytest.mark.parametrize("encoding", [WIDE, Encoding(4, True, 64), Encoding(2, False, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_largest_value_stays_finite(dtype: torch.dtype, encoding: Encoding) -> None:
    largest = torch.finfo(dtype).max
    parts = make_parts((1, 32, 64), lambda count: torch.zeros(count, dtype=dtype), num_parts=1)
    parts.views[0][1] = torch.linspace(0, 1, 2048).view(32, 1, 1, 64).to(dtype) * largest
    run = Run(parts, (1, 32, 64), [1], 32, encoding, 0)
    (back,) = run.stripes(run.decoded(run.encoded()))
    assert back.isfinite().all()


@native
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("encoding", "harmed"),
    [
        (Encoding(4, True, 256), (slice(32, 64), slice(70, 71))),
        (Encoding(2, True, 256), (slice(32, 64), slice(70, 71))),
        (Encoding(4, False, 64), (slice(40, 41), slice(64, 128))),
        (Encoding(2, False, 32), (slice(40, 41), slice(64, 96))),
        (WIDE, (slice(40, 41), slice(0, 128))),
    ],
)
def test_a_value_that_is_none_harms_only_those_that_share_its_range(
    poison: float, dtype: torch.dtype, encoding: Encoding, harmed: tuple[slice, slice]
) -> None:
    parts = make_parts((1, 32, 256), fill(normal, dtype, 6), num_parts=1)
    run = Run(parts, (1, 32, 256), [4, 1, 2], 96, encoding, 4)
    (expected,) = run.stripes(run.decoded(run.encoded()))
    parts.views[0][1, 0, 8, 0, 0, 70] = poison
    (back,) = run.stripes(run.decoded(run.encoded()))
    back[harmed] = expected[harmed]
    assert torch.equal(back, expected)
