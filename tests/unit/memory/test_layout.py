from __future__ import annotations

import msgspec
import pytest

from vllm_pd_plugin.codecs.codec import Part
from vllm_pd_plugin.memory.layout import Group, RankLayout, Region

FULL = Group("full", 16, None, ("a",), (2, 16, 8), "float16")
SLIDING = Group("sliding_window", 16, 64, ("b",), (2, 16, 8), "float16")


def test_a_block_lies_a_stride_after_the_one_before() -> None:
    region = Region(base=1000, num_blocks=4, block_bytes=32, stride_bytes=48)
    assert [region.address(block) for block in range(4)] == [1000, 1048, 1096, 1144]


def test_a_region_is_dense_only_when_its_blocks_touch() -> None:
    assert Region(0, 4, 32, 32).is_dense
    assert not Region(0, 4, 32, 48).is_dense


@pytest.mark.parametrize(
    ("first_token", "num_tokens", "expected"),
    [
        (0, 1, range(0, 1)),
        (0, 16, range(0, 1)),
        (0, 17, range(0, 2)),
        (16, 33, range(1, 3)),
        (15, 33, range(0, 3)),
        (32, 32, range(2, 2)),
    ],
)
def test_full_attention_needs_every_block_of_the_missing_suffix(
    first_token: int, num_tokens: int, expected: range
) -> None:
    assert FULL.needed_blocks(first_token, num_tokens) == expected


@pytest.mark.parametrize(
    ("first_token", "num_tokens", "expected"),
    [
        (0, 64, range(0, 4)),
        (0, 79, range(0, 5)),  # token 78 looks back on 15, the last of block 0
        (0, 80, range(1, 5)),  # token 79 looks back on 16
        (0, 81, range(1, 6)),
        (48, 80, range(3, 5)),
        (0, 10, range(0, 1)),
    ],
)
def test_a_sliding_window_reaches_back_from_the_recomputed_last_token(
    first_token: int, num_tokens: int, expected: range
) -> None:
    assert SLIDING.needed_blocks(first_token, num_tokens) == expected


@pytest.mark.parametrize(
    ("shape", "heads"), [((2, 16, 8), 2), ((16, 576), 1), ((1, 16, 8), 1), ((128,), 1)]
)
def test_heads_are_the_first_of_three_dimensions(shape: tuple[int, ...], heads: int) -> None:
    assert msgspec.structs.replace(FULL, block_shape=shape).heads == heads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_floats_whose_channels_are_known_can_be_encoded(dtype: str) -> None:
    parts = (Part.of_rows("key", 4, 0, 8), Part.of_rows("value", 4, 4, 8))
    assert msgspec.structs.replace(FULL, dtype=dtype, parts=parts).is_encodable
    assert not msgspec.structs.replace(FULL, dtype=dtype, parts=()).is_encodable


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn", "float64"])
def test_other_types_cannot_be_encoded(dtype: str) -> None:
    assert not msgspec.structs.replace(
        FULL, dtype=dtype, parts=(Part.of_rows("key", 8, 0, 8),)
    ).is_encodable


def layout_of(*groups: tuple[str, ...]) -> RankLayout:
    return RankLayout(tuple(Group("full", 16, None, g, (1,), "int8") for g in groups))


def test_layers_come_in_the_order_of_their_regions() -> None:
    layout = layout_of(("layers.1", "layers.3"), ("layers.0", "layers.2"))
    assert layout.layers == ["layers.1", "layers.3", "layers.0", "layers.2"]


def test_a_forward_pass_fills_the_regions_by_the_layers_place_in_the_model() -> None:
    names = [f"model.layers.{i}.self_attn.attn" for i in range(12)]
    layout = layout_of(tuple(names[1::2]), tuple(names[0::2]))
    order = layout.forward_order()
    assert [layout.layers[region] for region in order] == names


def test_layers_of_the_same_place_or_of_none_keep_their_order() -> None:
    layout = layout_of(("layers.1.b", "layers.1.a"), ("head", "layers.0.attn"))
    order = [layout.layers[region] for region in layout.forward_order()]
    assert order == ["head", "layers.0.attn", "layers.1.b", "layers.1.a"]


@pytest.mark.parametrize(
    ("positions", "tokens"),
    [(range(1, 3), range(16, 48)), (range(2, 4), range(32, 50)), (range(3, 3), range(0))],
)
def test_positions_of_a_table_have_the_tokens_of_their_blocks_up_to_the_prompt_s_last(
    positions: range, tokens: range
) -> None:
    assert FULL.tokens_at(positions, 50) == tokens
