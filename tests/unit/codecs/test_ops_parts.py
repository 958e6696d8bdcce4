"""Where a head's keys and values lie in a block, and which arguments the coding ops refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.fakes.planes import NUM_BLOCKS, make_parts
from tests.tools import needs
from vllm_pd_plugin.codecs import ops, ops_reference
from vllm_pd_plugin.codecs.codec import MAX_WIDTH, Encoding, Part

pytestmark = pytest.mark.usefixtures("one_thread")
native = needs(ops.HAS_NATIVE, "the native extension")


# --- parts of a cache ------------------------------------------------------------------------

HEADS, TOKENS, WIDTH = 3, 8, 4
CACHE = torch.arange(NUM_BLOCKS * HEADS * TOKENS * 2 * WIDTH, dtype=torch.float32)
ROWS = CACHE.view(NUM_BLOCKS, HEADS, TOKENS, 2 * WIDTH)
OFFSET = TOKENS * WIDTH


def flat(part: torch.Tensor) -> torch.Tensor:
    """Without its tiles: ``[NUM_BLOCKS, heads, tokens, width]``."""
    return part.flatten(4, 5).flatten(2, 3)


def test_a_part_of_rows_is_some_channels_of_each_token() -> None:
    key = ops.part_of(ROWS, Part.of_rows("key", WIDTH, 0, 2 * WIDTH))
    value = ops.part_of(ROWS, Part.of_rows("value", WIDTH, WIDTH, 2 * WIDTH))
    assert key.shape == (NUM_BLOCKS, HEADS, TOKENS, 1, 1, WIDTH)
    assert torch.equal(flat(key), ROWS[..., :WIDTH])
    assert torch.equal(flat(value), ROWS[..., WIDTH:])


def test_a_part_of_columns_has_all_tokens_of_a_channel_side_by_side() -> None:
    part = ops.part_of(ROWS, Part.of_columns("key", WIDTH, OFFSET, TOKENS))
    halves = CACHE.view(NUM_BLOCKS, HEADS, 2, WIDTH, TOKENS)
    assert torch.equal(flat(part), halves[:, :, 1].transpose(2, 3))


def test_a_part_in_tiles_has_some_tokens_by_some_channels_side_by_side() -> None:
    """Two token tiles of four, within each two channel tiles of two."""
    part = ops.part_of(ROWS, Part("key", WIDTH, OFFSET, 4, 2, (16, 2, 8, 1)))
    tiles = CACHE.view(NUM_BLOCKS, HEADS, 2, 2, 2, 4, 2)[:, :, 1]
    for token in range(TOKENS):
        for channel in range(WIDTH):
            expected = tiles[:, :, token // 4, channel // 2, token % 4, channel % 2]
            assert torch.equal(flat(part)[:, :, token, channel], expected)


def test_a_part_of_a_cache_that_begins_in_the_middle_of_memory_does_too() -> None:
    """Blocks of which this layer has the second half."""
    whole = torch.arange(NUM_BLOCKS * 2 * 64.0).view(NUM_BLOCKS, 2, 1, 8, 8)
    cache = whole[:, 1]
    part = ops.part_of(cache, Part.of_rows("value", 4, 4, 8))
    assert torch.equal(flat(part), cache[..., 4:])


def test_tokens_before_heads_are_told_by_the_stride_of_the_tokens() -> None:
    cache = CACHE.view(NUM_BLOCKS, TOKENS, HEADS, 2 * WIDTH).transpose(1, 2)
    part = ops.part_of(cache, Part.of_rows("value", WIDTH, WIDTH, HEADS * 2 * WIDTH))
    assert torch.equal(flat(part), cache[..., WIDTH:])


def test_a_cache_without_heads_has_parts_too() -> None:
    cache = torch.arange(NUM_BLOCKS * TOKENS * 9.0).view(NUM_BLOCKS, TOKENS, 9)
    part = ops.part_of(cache, Part.of_rows("rope", 3, 6, 9))
    assert torch.equal(flat(part), cache[:, None, :, 6:])


def test_a_part_is_a_view() -> None:
    cache = ROWS.clone()
    ops.part_of(cache, Part.of_rows("key", WIDTH, 0, 2 * WIDTH)).zero_()
    assert not cache[..., :WIDTH].any()
    assert torch.equal(cache[..., WIDTH:], ROWS[..., WIDTH:])


# --- arguments -------------------------------------------------------------------------------

Arguments = dict[str, object]
INT4 = Encoding(4, by_channel=True, group=8)
SLAB_BYTES = 2 * 2 * INT4.stripe_bytes(33, 8, 4)


def arguments() -> Arguments:
    """Two parts of two heads, 16 tokens a block and 8 channels; 33 tokens of three blocks."""
    parts = make_parts((2, 16, 8), lambda count: torch.linspace(-1, 1, count))
    return {
        "parts": parts.views,
        "blocks": torch.tensor([1, 2, 0]),
        "tokens": 33,
        "encoding": INT4,
        "sinks": 4,
        "slab": torch.zeros(SLAB_BYTES, dtype=torch.uint8),
    }


def parts_with(change: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> Arguments:
    return {"parts": change(arguments()["parts"])}  # type: ignore[arg-type]


HARMFUL: list[tuple[Arguments, str]] = [
    ({"parts": []}, "parts were given"),
    ({"blocks": torch.tensor([1, 2, NUM_BLOCKS])}, "lies outside a plane of 6 blocks"),
    ({"blocks": torch.tensor([1, -1, 2])}, "lies outside a plane of 6 blocks"),
    (parts_with(lambda p: [p[0], p[1][:2]]), "lies outside a plane of 2 blocks"),
    ({"tokens": 32}, "32 tokens are not those of 3 blocks of 16"),
    ({"tokens": 49}, "49 tokens are not those of 3 blocks of 16"),
    ({"tokens": 0}, "0 tokens are not those of 3 blocks of 16"),
    ({"tokens": -1}, "-1 tokens are not those of 3 blocks of 16"),
    (parts_with(lambda p: [part.double() for part in p]), "only float32, bfloat16 and float16"),
    (parts_with(lambda p: [part.int() for part in p]), "only float32, bfloat16 and float16"),
    ({"slab": torch.zeros(SLAB_BYTES - 1).byte()}, f"{SLAB_BYTES} are needed"),
    ({"slab": torch.zeros(SLAB_BYTES + 16).byte()}, f"{SLAB_BYTES} are needed"),
]
REFUSED: list[tuple[Arguments, str]] = [
    *HARMFUL,
    (parts_with(lambda p: [p[0].flatten(4, 5)]), "a part has 6 dimensions, not 5"),
    (parts_with(lambda p: [p[0], p[1].half()]), "parts differ in shape, strides, dtype"),
    (parts_with(lambda p: [p[0], p[1][:, :1]]), "parts differ in shape, strides, dtype"),
    (parts_with(lambda p: [p[0], p[1][..., :4]]), "parts differ in shape, strides, dtype"),
    (parts_with(lambda p: [p[0], p[1][:, :, ::2]]), "parts differ in shape, strides, dtype"),
    ({"blocks": torch.tensor([1, 2, 0]).int()}, "int64"),
    ({"blocks": torch.tensor([[1, 2, 0]])}, "one contiguous dimension"),
    ({"blocks": torch.tensor([1, 0, 2, 0, 0])[::2]}, "one contiguous dimension"),
    ({"encoding": Encoding(3, True, 8)}, "bits must be 2, 4 or 8, not 3"),
    ({"encoding": Encoding(0, True, 8)}, "bits must be 2, 4 or 8, not 0"),
    ({"encoding": Encoding(16, True, 8)}, "bits must be 2, 4 or 8, not 16"),
    ({"encoding": Encoding(4, False, 3)}, "groups of 3 channels do not divide 8"),
    ({"encoding": Encoding(4, False, 0)}, "groups of 0 channels do not divide 8"),
    ({"encoding": Encoding(4, False, -2)}, "groups of -2 channels do not divide 8"),
    ({"sinks": -1}, "sinks must not be negative"),
    ({"slab": torch.zeros(SLAB_BYTES).half()}, "contiguous dimension of uint8"),
    ({"slab": torch.zeros(2 * SLAB_BYTES).byte()[::2]}, "contiguous dimension of uint8"),
    ({"slab": torch.zeros(1, SLAB_BYTES).byte()}, "contiguous dimension of uint8"),
]


def encode(given: Arguments) -> None:
    ops.encode_blocks(**given)  # type: ignore[arg-type]


def decode(given: Arguments) -> None:
    ops.decode_blocks(**given)  # type: ignore[arg-type]


def of_reference(op: str, given: Arguments) -> None:
    encoding = given["encoding"]
    assert isinstance(encoding, Encoding)
    rest = {key: value for key, value in given.items() if key != "encoding"}
    kinds = {"bits": encoding.bits, "group": encoding.group, "by_channel": encoding.by_channel}
    getattr(ops_reference, op)(**rest, **kinds)


def encode_by_reference(given: Arguments) -> None:
    of_reference("encode_blocks", given)


def decode_by_reference(given: Arguments) -> None:
    of_reference("decode_blocks", given)


def refuse(op: Callable[[Arguments], None], change: Arguments, message: str) -> None:
    """It says so, and writes nothing."""
    given = arguments() | change
    parts, slab = given["parts"], given["slab"]
    before = [part.clone() for part in parts]  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=message):
        op(given)
    assert not slab.any()  # type: ignore[attr-defined]
    for part, was in zip(parts, before, strict=True):  # type: ignore[call-overload]
        assert torch.equal(part, was)


@native
@pytest.mark.parametrize("op", [encode, decode])
@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_arguments_that_do_not_fit_are_refused(
    op: Callable[[Arguments], None], change: Arguments, message: str
) -> None:
    refuse(op, change, message)


@pytest.mark.parametrize("op", [encode_by_reference, decode_by_reference])
@pytest.mark.parametrize(("change", "message"), HARMFUL)
def test_the_reference_refuses_what_would_do_harm_too(
    op: Callable[[Arguments], None], change: Arguments, message: str
) -> None:
    refuse(op, change, message)


@pytest.mark.parametrize("op", [encode, decode, encode_by_reference, decode_by_reference])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_tokens_take_no_bytes(op: Callable[[Arguments], None], bits: int) -> None:
    nothing = torch.tensor([], dtype=torch.int64)
    slab = torch.zeros(0, dtype=torch.uint8)
    changes = {"blocks": nothing, "tokens": 0, "encoding": Encoding(bits, True, 8), "slab": slab}
    given = arguments() | changes
    before = [part.clone() for part in given["parts"]]  # type: ignore[attr-defined]
    op(given)
    for part, was in zip(given["parts"], before, strict=True):  # type: ignore[call-overload]
        assert torch.equal(part, was)


@native
@pytest.mark.parametrize(
    ("width", "bits", "message"),
    [
        (MAX_WIDTH + 4, 4, "channels are too wide; 1024 are allowed"),
        (2 * MAX_WIDTH, 8, "channels are too wide; 1024 are allowed"),
        (6, 2, "6 channels of 2 bits do not fill whole bytes"),
        (5, 4, "5 channels of 4 bits do not fill whole bytes"),
    ],
)
@pytest.mark.parametrize("op", [encode, decode])
def test_rows_that_cannot_be_written_down_are_refused(
    op: Callable[[Arguments], None], width: int, bits: int, message: str
) -> None:
    parts = make_parts((1, 4, width), torch.zeros).views
    encoding = Encoding(bits, True, width)
    change = {"parts": parts, "blocks": torch.tensor([1]), "tokens": 4, "encoding": encoding}
    refuse(op, change, message)


@native
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_widest_rows_are_written_down_as_the_reference_writes_them(bits: int) -> None:
    parts = make_parts((1, 32, MAX_WIDTH), lambda count: torch.linspace(-3, 2, count)).views
    encoding = Encoding(bits, by_channel=True, group=MAX_WIDTH)
    change = {"parts": parts, "blocks": torch.tensor([1]), "tokens": 32, "encoding": encoding}
    slabs = []
    for op in (encode, encode_by_reference):
        slab = torch.zeros(2 * encoding.stripe_bytes(32, MAX_WIDTH, 4), dtype=torch.uint8)
        op(arguments() | change | {"slab": slab})
        slabs.append(slab)
    assert torch.equal(*slabs)


@native
@pytest.mark.parametrize("op", ["encode_blocks", "decode_blocks"])
def test_the_ops_are_registered_as_pytorch_wants_them(op: str) -> None:
    parts, blocks, tokens, _, sinks, slab = arguments().values()
    how = (blocks, tokens, INT4.bits, INT4.group, INT4.by_channel, sinks)
    given = {"encode_blocks": (parts, *how, slab), "decode_blocks": (slab, *how, parts)}[op]
    results = torch.library.opcheck(getattr(torch.ops.vllm_pd_plugin, op).default, given)
    assert set(results.values()) == {"SUCCESS"}
