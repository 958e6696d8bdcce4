"""Which arguments gathering and scattering heads refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.fakes.planes import NUM_BLOCKS, make_parts
from tests.tools import needs
from tests.unit.codecs.test_heads import served_by
from tests.unit.codecs.test_heads_ops import any_bytes
from vllm_pd_plugin.codecs import heads, ops
from vllm_pd_plugin.codecs.codec import MAX_WIDTH
from vllm_pd_plugin.mapping.kv_cache import FP8

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    needs(ops.HAS_NATIVE, "the native extension"),
]

Arguments = dict[str, Any]
SLAB_BYTES = 2 * 20 * 2 * (8 + 8) * 2


def arguments() -> Arguments:
    """Two layers of two parts of three heads, 16 tokens a block and 8 channels; 20 tokens from the
    second block on."""
    fill = any_bytes(torch.bfloat16, 1)
    return {
        "layers": [make_parts((3, 16, 8), fill).views for _ in range(2)],
        "heads": range(1, 3),
        "blocks": torch.tensor([1, 2, 0]),
        "tokens": range(20, 40),
        "dtype": "bfloat16",
        "slab": torch.zeros(SLAB_BYTES, dtype=torch.uint8),
        "scales": (),
    }


def layers_with(change: Callable[[list[Any]], list[Any]]) -> Arguments:
    return {"layers": change(arguments()["layers"])}


def to_fp8(scales: list[list[float]]) -> Arguments:
    slab = torch.zeros(SLAB_BYTES // 2, dtype=torch.uint8)
    return {"dtype": FP8, "slab": slab, "scales": scales}


def every(change: Callable[[torch.Tensor], torch.Tensor]) -> Arguments:
    return layers_with(lambda layers: [[change(part) for part in parts] for parts in layers])


REFUSED: list[tuple[Arguments, str]] = [
    ({"layers": []}, "layers have"),
    ({"layers": [[], []]}, "layers have"),
    (layers_with(lambda layers: [layers[0], layers[1][:1]]), "layers have"),
    ({"blocks": torch.tensor([1, NUM_BLOCKS, 0])}, "lies outside a plane of 6 blocks"),
    ({"blocks": torch.tensor([1, 2, -1])}, "lies outside a plane of 6 blocks"),
    (layers_with(lambda layers: [layers[0], [p[:2] for p in layers[1]]]), "a plane of 2 blocks"),
    ({"blocks": torch.tensor([1, 2])}, "20 tokens from 20 are not in 2 blocks of 16"),
    ({"tokens": range(-1, 19)}, "20 tokens from -1 are not in 3 blocks of 16"),
    ({"tokens": range(2**62, 2**62 + 20)}, "are not in 3 blocks of 16"),
    ({"tokens": range(20, 60, 2)}, "tokens are neighbours"),
    ({"tokens": range(20, 41)}, "are needed"),
    ({"heads": range(2, 4)}, "2 heads from 2 are not among 3"),
    ({"heads": range(-1, 1)}, "2 heads from -1 are not among 3"),
    ({"heads": range(2**62, 2**62 + 2)}, "are not among 3"),
    ({"heads": range(2, 0, -1)}, "heads are neighbours"),
    ({"heads": range(1, 2)}, "are needed"),
    ({"dtype": "float64"}, "float64 are not known, but float32, bfloat16, float16, fp8_e4m3"),
    ({"dtype": "uint8"}, "uint8 are not known"),
    ({"dtype": "float32"}, f"the slab has {SLAB_BYTES // 4} elements, {SLAB_BYTES // 2} are"),
    ({"slab": torch.zeros(SLAB_BYTES - 2).byte()}, f"{SLAB_BYTES // 2} are needed"),
    ({"slab": torch.zeros(SLAB_BYTES + 2).byte()}, f"{SLAB_BYTES // 2} are needed"),
    ({"slab": torch.zeros(SLAB_BYTES - 1).byte()}, "divisible"),
    ({"slab": torch.zeros(SLAB_BYTES + 1).byte()[1:]}, "divisible"),
    ({"slab": torch.zeros(1, SLAB_BYTES).byte()}, "one contiguous dimension of uint8"),
    ({"slab": torch.zeros(SLAB_BYTES // 2).bfloat16()}, "one contiguous dimension of uint8"),
    (every(lambda part: part.double()), "only float32, bfloat16 and float16"),
    (every(lambda part: part.view(torch.int16)), "only float32, bfloat16 and float16"),
    (every(lambda part: part.flatten(4, 5)), "a part has 6 dimensions, not 5"),
    (every(lambda part: part[:, :, :, :0]), "a part has nothing in dimension 3"),
    (layers_with(lambda layers: [layers[0], [p[:, :2] for p in layers[1]]]), "parts differ"),
    (layers_with(lambda layers: [layers[0], [p[:, :, ::2] for p in layers[1]]]), "parts differ"),
    (layers_with(lambda layers: [[p[0], p[1][:, :2]] for p in layers]), "a layer differ in heads"),
    (layers_with(lambda layers: [[p[0], p[1][:, :, :8]] for p in layers]), "a layer differ in"),
    (layers_with(lambda layers: [[p[0], p[1].half()] for p in layers]), "a layer differ in"),
]  # fmt: skip
TO_FP8: list[tuple[list[list[float]], str]] = [
    ([], "0 scales were given, 4 are needed"),
    ([[1.0, 1.0]], "2 scales were given, 4 are needed"),
    ([[1.0], [1.0]], "not as many scales as parts"),
    ([[1.0, 1.0], [1.0, 0.0]], "a scale of 0"),
    ([[1.0, 1.0], [1.0, -2.0]], "a scale of -2"),
    ([[1.0, 1.0], [1.0, float("nan")]], "a scale of nan"),
    ([[1.0, 1.0], [1.0, float("inf")]], "a scale of inf"),
    ([[1.0, 1.0], [1.0, 1e-60]], "a scale of 0"),
]


def gather(given: Arguments) -> None:
    heads.gather_heads(**given)


def scatter(given: Arguments) -> None:
    heads.scatter_heads(**given)


def refuse(op: Callable[[Arguments], None], change: Arguments, message: str) -> None:
    """It says so, and writes nothing."""
    given = arguments() | change
    slab, parts = given["slab"], [part for parts in given["layers"] for part in parts]
    before = [part.clone() for part in parts]
    with pytest.raises(RuntimeError, match=message):
        op(given)
    assert not slab.any()
    for part, was in zip(parts, before, strict=True):
        assert torch.equal(part.nan_to_num(), was.nan_to_num())


@pytest.mark.parametrize("who", ["native", "reference"])
@pytest.mark.parametrize("op", [gather, scatter])
@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_arguments_that_do_not_fit_are_refused(
    op: Callable[[Arguments], None], change: Arguments, message: str, who: str
) -> None:
    with served_by(who):
        refuse(op, change, message)


@pytest.mark.parametrize("who", ["native", "reference"])
@pytest.mark.parametrize(("scales", "message"), TO_FP8)
def test_scales_that_divide_nothing_are_refused_where_fp8_is_made(
    scales: list[list[float]], message: str, who: str
) -> None:
    with served_by(who):
        refuse(gather, to_fp8(scales), message)


@pytest.mark.parametrize("who", ["native", "reference"])
def test_fp8_becomes_nothing_else(who: str) -> None:
    fp8 = every(lambda part: part.view(torch.uint8)[..., :8].view(torch.float8_e4m3fn))
    fp8_slab = {"dtype": FP8, "slab": torch.zeros(SLAB_BYTES // 2, dtype=torch.uint8)}
    for op, change in ((gather, fp8), (scatter, fp8_slab)):
        given = arguments() | change
        with served_by(who), pytest.raises(RuntimeError, match="fp8_e4m3 cannot become another"):
            op(given)
        assert not given["slab"].any()


@pytest.mark.parametrize("changed", [{"blocks": torch.tensor([1, 2, 0]).int()},
                                     {"blocks": torch.tensor([[1, 2, 0]])},
                                     {"blocks": torch.tensor([1, 0, 2, 0, 0])[::2]}])  # fmt: skip
@pytest.mark.parametrize("op", [gather, scatter])
def test_blocks_of_another_form_are_refused(
    op: Callable[[Arguments], None], changed: Arguments
) -> None:
    refuse(op, changed, "one contiguous dimension of int64")


def test_a_slab_that_no_word_begins_with_is_refused() -> None:
    """Its offset is even; what it lies in begins at an odd address."""
    odd = torch.frombuffer(bytearray(SLAB_BYTES + 1), dtype=torch.uint8, offset=1)
    refuse(gather, {"slab": odd}, "multiple of its elements' 2 bytes")


@pytest.mark.parametrize("who", ["native", "reference"])
def test_rows_of_more_channels_than_are_allowed_are_refused(who: str) -> None:
    wide = MAX_WIDTH + 8
    parts = [make_parts((1, 2, wide), any_bytes(torch.float16, 1)).views]
    slab = torch.zeros(2 * 2 * wide * 2, dtype=torch.uint8)
    change = {
        "layers": parts, "heads": range(1), "blocks": torch.tensor([1]), "tokens": range(2),
        "dtype": "float16", "slab": slab,
    }  # fmt: skip
    for op in (gather, scatter):
        with served_by(who):
            refuse(op, change, "1032 channels are too wide; 1024 are allowed")


@pytest.mark.parametrize("who", ["native", "reference"])
@pytest.mark.parametrize("op", [gather, scatter])
def test_blocks_that_no_token_is_in_may_be_any(op: Callable[[Arguments], None], who: str) -> None:
    """A window's block table has null blocks, and one may reach further than the tokens do."""
    with served_by(who):
        op(arguments() | {"blocks": torch.tensor([-7, 2, 0, 10**9])})


@pytest.mark.parametrize("who", ["native", "reference"])
@pytest.mark.parametrize("op", [gather, scatter])
@pytest.mark.parametrize(
    "nothing",
    [
        {"tokens": range(20, 20)},
        {"tokens": range(48, 48)},
        {"heads": range(3, 3)},
        {"tokens": range(0), "blocks": torch.tensor([], dtype=torch.int64)},
    ],
)
def test_nothing_takes_no_bytes(
    op: Callable[[Arguments], None], nothing: Arguments, who: str
) -> None:
    given = arguments() | nothing | {"slab": torch.zeros(0, dtype=torch.uint8)}
    parts = [part for parts in given["layers"] for part in parts]
    before = [part.clone() for part in parts]
    with served_by(who):
        op(given)
    for part, was in zip(parts, before, strict=True):
        assert torch.equal(part.view(torch.int16), was.view(torch.int16))


@pytest.mark.parametrize("op", ["gather_heads", "scatter_heads"])
def test_the_ops_are_registered_as_pytorch_wants_them(op: str) -> None:
    given = arguments()
    parts = [part for parts in given["layers"] for part in parts]
    slab = given["slab"].view(torch.bfloat16)
    how = (given["blocks"], 20, 20, 1, 2, [1.0] * 4)
    ordered = {"gather_heads": (parts, 2, *how, slab), "scatter_heads": (slab, *how, 2, parts)}[op]
    results = torch.library.opcheck(getattr(torch.ops.vllm_pd_plugin, op).default, ordered)
    assert set(results.values()) == {"SUCCESS"}
