"""How KV is written down: the kernels' sizes, and which codec writes what how."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.planes import make_parts
from tests.tools import needs
from vllm_pd_plugin.codecs import ops
from vllm_pd_plugin.codecs.codec import (
    SINK_TOKENS,
    TOKEN_GROUP,
    WIDE,
    Codec,
    Encoding,
    Part,
    encoding_of,
    row_bytes,
)

pytestmark = pytest.mark.usefixtures("one_thread")
LOSSY = [codec for codec in Codec if codec is not Codec.RAW]


def key(width: int = 64) -> Part:
    return Part.of_rows("key", width, 0, 2 * width)


def value(width: int = 64) -> Part:
    return Part.of_rows("value", width, width, 2 * width)


LATENT = Part.of_rows("latent", 512, 0, 576)
ROPE = Part.of_rows("rope", 64, 512, 576)


# --- sizes -----------------------------------------------------------------------------------


@needs(ops.HAS_NATIVE, "the native extension")
@settings(max_examples=100, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]),
    by_channel=st.booleans(),
    tokens=st.integers(1, 200),
    width_in_fours=st.integers(1, 256),
    heads=st.integers(1, 3),
    sinks=st.integers(0, 40),
    data=st.data(),
)
def test_the_kernels_want_exactly_so_many_bytes(
    bits: int,
    by_channel: bool,
    tokens: int,
    width_in_fours: int,
    heads: int,
    sinks: int,
    data: st.DataObject,
) -> None:
    width = 4 * width_in_fours
    group = data.draw(st.sampled_from([size for size in (1, 2, 4, 32, width) if width % size == 0]))
    encoding = Encoding(bits, by_channel, group)
    parts = make_parts((heads, tokens, width), torch.zeros, num_parts=1).views
    size = heads * encoding.stripe_bytes(tokens, width, sinks)
    first = torch.tensor([0])
    ops.encode_blocks(parts, first, tokens, encoding, sinks, torch.zeros(size).byte())
    for other in (size - 1, size + 1, 0):
        with pytest.raises(RuntimeError, match=f"has {other} bytes, {size} are needed"):
            ops.encode_blocks(parts, first, tokens, encoding, sinks, torch.zeros(other).byte())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("by_channel", [True, False])
def test_a_tile_and_a_row_begin_at_multiples_of_16_bytes(bits: int, by_channel: bool) -> None:
    encoding = Encoding(bits, by_channel, 4)
    for tokens in range(1, 100):
        for width in (4, 12, 20, 100):
            assert encoding.stripe_bytes(tokens, width, SINK_TOKENS) % 16 == 0


@pytest.mark.parametrize(
    ("codec", "at_most"), [(Codec.INT8, 0.54), (Codec.INT4, 0.31), (Codec.INT2, 0.22)]
)
def test_a_prompt_of_512_tokens_shrinks_to(codec: Codec, at_most: float) -> None:
    """In relation to bfloat16, with heads of 64 channels."""
    raw = 512 * (64 + 64) * 2
    size = row_bytes(codec, (key(), value()), 512, SINK_TOKENS)
    assert at_most - 0.05 < size / raw <= at_most


@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("tokens", [32, 33, 512, 2000])
def test_each_codec_is_smaller_than_the_one_before_it(width: int, tokens: int) -> None:
    sizes = [row_bytes(codec, (key(width), value(width)), tokens, SINK_TOKENS) for codec in LOSSY]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    assert sizes[0] < tokens * 2 * width * 2


def test_the_parts_of_a_row_add_up() -> None:
    sizes = [row_bytes(Codec.INT4, [part], 100, 4) for part in (key(), value(32))]
    assert row_bytes(Codec.INT4, [key(), value(32)], 100, 4) == sum(sizes)


def test_only_the_first_tokens_of_a_sequence_take_more() -> None:
    encoding = encoding_of(Codec.INT4, key())
    with_sinks, without = (encoding.stripe_bytes(64, 64, sinks) for sinks in (SINK_TOKENS, 0))
    assert with_sinks - without == SINK_TOKENS * (64 + 2) + 8  # up to a multiple of 16
    tail = TOKEN_GROUP - 1
    assert encoding.stripe_bytes(tail, 64, 4) == encoding.stripe_bytes(tail, 64, 0)
    assert WIDE.stripe_bytes(64, 64, 4) == WIDE.stripe_bytes(64, 64, 0)


# --- choices ---------------------------------------------------------------------------------


def test_codecs_get_narrower_in_this_order() -> None:
    order = sorted(Codec, key=lambda codec: codec.rank)
    assert order == [Codec.RAW, Codec.INT8, Codec.INT4, Codec.INT2]
    assert Codec.RAW.rank == 0


@pytest.mark.parametrize("part", [key(), value(), LATENT, ROPE], ids=lambda part: part.kind)
def test_int8_has_a_scale_for_each_token_whatever_it_is(part: Part) -> None:
    assert encoding_of(Codec.INT8, part) == WIDE


@pytest.mark.parametrize(("codec", "bits"), [(Codec.INT4, 4), (Codec.INT2, 2)])
def test_keys_have_ranges_by_channel_and_values_by_token(codec: Codec, bits: int) -> None:
    """The axes of KIVI."""
    keys, values = encoding_of(codec, key()), encoding_of(codec, value())
    assert (keys.bits, keys.by_channel) == (bits, True)
    assert (values.bits, values.by_channel) == (bits, False)


def test_the_narrower_codec_shares_ranges_among_fewer_values() -> None:
    assert encoding_of(Codec.INT4, value(128)).group == 64
    assert encoding_of(Codec.INT2, value(128)).group == 32


def test_mla_s_latent_is_never_in_2_bits_and_its_rotary_key_always_in_8() -> None:
    for codec in (Codec.INT4, Codec.INT2):
        latent = encoding_of(codec, LATENT)
        assert (latent.bits, latent.by_channel) == (4, False)
        assert encoding_of(codec, ROPE) == WIDE
    assert encoding_of(Codec.INT4, LATENT).group > encoding_of(Codec.INT2, LATENT).group


@given(
    codec=st.sampled_from(LOSSY),
    kind=st.sampled_from(["key", "value", "latent", "rope"]),
    width=st.integers(1, 256).map(lambda n: 4 * n),
)
def test_groups_divide_the_row(codec: Codec, kind: str, width: int) -> None:
    encoding = encoding_of(codec, Part.of_rows(kind, width, 0, width))  # type: ignore[arg-type]
    assert encoding.bits == 8 or encoding.by_channel or width % encoding.group == 0
    assert width * encoding.bits % 8 == 0


# --- what is promised ------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [WIDE, Encoding(4, True, 8), Encoding(2, False, 8)], ids=str)
def test_the_error_grows_with_the_range(encoding: Encoding) -> None:
    bounds = [encoding.error_bound(-size, size) for size in (0.0, 1.0, 2.0, 100.0)]
    assert bounds[0] == 0
    assert bounds == sorted(bounds)
    assert bounds[2] == pytest.approx(2 * bounds[1])


def test_the_error_of_a_narrow_range_far_from_zero_is_small() -> None:
    """Half a step of the range, and what rounding the zero point to bfloat16 adds."""
    assert Encoding(4, True, 8).error_bound(100, 101) < (1 + 100 / 128) / 15 / 2 * 1.01
    assert WIDE.error_bound(100, 101) > 101 / 127 / 2
