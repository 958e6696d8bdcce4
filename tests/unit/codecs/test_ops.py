"""The native ops say what their references say, whatever the layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.native import without_native_ops
from tests.fakes.planes import LAYOUTS, NUM_BLOCKS, make_planes
from tests.tools import needs
from vllm_pd_plugin.codecs import ops, ops_reference

DTYPES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]

native = needs(ops.HAS_NATIVE, "the native extension")


def test_the_extension_is_there_where_tests_run() -> None:
    assert ops.HAS_NATIVE, "run `make setup` with a C++ compiler installed"


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 40))


@native
@settings(max_examples=300, deadline=None)
@given(
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    blocks=st.lists(st.integers(0, NUM_BLOCKS - 1), max_size=8),
)
def test_a_digest_is_that_of_the_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, layout: str, blocks: list[int]
) -> None:
    planes = make_planes(shape, dtype, layout).views
    chosen = torch.tensor(blocks, dtype=torch.int64)
    expected = ops_reference.digest_blocks(planes, chosen)
    assert torch.equal(ops.digest_blocks(planes, chosen), expected)
    dense = [plane.contiguous() for plane in planes]
    assert torch.equal(ops.digest_blocks(dense, chosen), expected)


def test_a_digest_of_known_bytes_is_known() -> None:
    """Engines of two releases compare digests: a change needs a new protocol version."""
    plane = torch.arange(2 * 2 * 3 * 16, dtype=torch.uint8).view(2, 2, 3, 16)
    assert ops.digest_blocks([plane], torch.tensor([1, 0])).item() == 6716140276178703354


@pytest.mark.parametrize("digest", [ops.digest_blocks, ops_reference.digest_blocks])
def test_a_digest_sees_every_single_bit_and_every_swap(digest: object) -> None:
    (plane,) = make_planes((2, 3, 16), torch.uint8, "dense", 1).views
    blocks = torch.tensor([4, 1])
    seen = {int(digest([plane], blocks))}  # type: ignore[operator]
    flat = plane[4].view(-1)
    for byte in range(len(flat)):
        for bit in range(8):
            flat[byte] ^= 1 << bit
            seen.add(int(digest([plane], blocks)))  # type: ignore[operator]
            flat[byte] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(flat)
    assert int(digest([plane], torch.tensor([1, 4]))) not in seen  # type: ignore[operator]
    words = plane[4].view(torch.int64).view(-1)
    words[[0, 1]] = words[[1, 0]].clone()
    assert int(digest([plane], blocks)) not in seen  # type: ignore[operator]


@native
def test_the_op_is_registered_as_pytorch_wants_it() -> None:
    planes = make_planes((2, 3, 8), torch.float32, "keys beside values").views
    arguments = (planes, torch.tensor([1, 2]))
    results = torch.library.opcheck(torch.ops.vllm_pd_plugin.digest_blocks.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, b: ([], b), "no planes"),
        (lambda p, b: ([p[0][0]], b), "4 dimensions"),
        (lambda p, b: ([p[0], p[1].double()], b), "differ in shape, dtype"),
        (lambda p, b: ([p[0], p[1][:, :1]], b), "differ in shape, dtype"),
        (lambda p, b: ([p[0].transpose(2, 3)], b), "must touch"),
        (lambda p, b: (p, b.float()), "int64"),
        (lambda p, b: (p, b[None]), "one contiguous dimension"),
        (lambda p, b: (p, torch.arange(4)[::2]), "one contiguous dimension"),
        (lambda p, b: (p, torch.tensor([NUM_BLOCKS])), f"block {NUM_BLOCKS} lies outside"),
        (lambda p, b: (p, torch.tensor([-1])), "block -1 lies outside"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(change: object, message: str) -> None:
    planes, blocks = make_planes((2, 3, 8), torch.float32).views, torch.tensor([1, 2])
    with pytest.raises(RuntimeError, match=message):
        ops.digest_blocks(*change(planes, blocks))  # type: ignore[operator]


def test_without_the_extension_the_reference_is_used_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    planes, blocks = make_planes((2, 3, 8), torch.float32).views, torch.tensor([1, 2])
    expected = ops.digest_blocks(planes, blocks)
    without_native_ops(monkeypatch)
    for _ in range(2):
        assert torch.equal(ops.digest_blocks(planes, blocks), expected)
    assert len(caplog.records) == 1
    assert "without its native ops" in caplog.text
