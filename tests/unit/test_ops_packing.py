"""Packing and unpacking: natively what the reference says, and nothing beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.planes import LAYOUTS, NUM_BLOCKS, Planes, Shape, Slab, make_planes
from vllm_pd_plugin import ops, ops_reference

DTYPES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 40))
BLOCK = st.integers(0, NUM_BLOCKS - 1)

native = pytest.mark.skipif(not ops.HAS_NATIVE, reason="installed without the native extension")


def packed_bytes(planes: Planes, tokens: int) -> int:
    heads, _, width = planes.shape
    element = planes.memory[0].element_size()
    return len(planes.memory) * heads * tokens * width * element


def spelt_out(planes: Planes, blocks: Sequence[int], tokens: int) -> torch.Tensor:
    """What a slab must be, row by row."""
    rows = []
    block_tokens = planes.shape[1]
    for plane in planes.views:
        for index, block in enumerate(blocks):
            counted = min(block_tokens, tokens - index * block_tokens)
            for head in range(planes.shape[0]):
                for token in range(counted):
                    rows.append(plane[block, head, token].contiguous().view(torch.uint8))
    return torch.cat(rows)


@st.composite
def runs(draw: st.DrawFn, repeated: bool) -> tuple[Planes, list[int], int]:
    """Planes in any layout, a run of their blocks, and how many tokens of those count."""
    shape = draw(SHAPES)
    planes = make_planes(
        shape,
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([0, 3])),
    )
    blocks = draw(st.lists(BLOCK, min_size=1, max_size=NUM_BLOCKS, unique=not repeated))
    left_out = draw(st.integers(0, shape[1] - 1))
    return planes, blocks, len(blocks) * shape[1] - left_out


@native
@settings(max_examples=200, deadline=None)
@given(runs(repeated=True))
def test_a_slab_has_the_blocks_one_after_the_other(run: tuple[Planes, list[int], int]) -> None:
    planes, blocks, tokens = run
    expected, before, chosen = spelt_out(planes, blocks, tokens), planes.copy(), torch.tensor(blocks)
    for pack in (ops.pack_blocks, ops_reference.pack_blocks):
        slab = Slab(packed_bytes(planes, tokens))
        pack(planes.views, chosen, tokens, slab.bytes)
        assert torch.equal(slab.bytes, expected)
        assert slab.is_intact
    assert planes.is_equal(before)


@native
@settings(max_examples=200, deadline=None)
@given(runs(repeated=False))
def test_unpacking_writes_the_tokens_that_count_and_nothing_else(
    run: tuple[Planes, list[int], int],
) -> None:
    planes, blocks, tokens = run
    chosen, target = torch.tensor(blocks), planes.copy()
    for memory in target.memory:
        memory.view(torch.uint8).bitwise_xor_(0xFF)
    expected = target.copy()
    for here, there in zip(expected.views, planes.views, strict=True):
        for token in range(tokens):
            place = blocks[token // planes.shape[1]], slice(None), token % planes.shape[1]
            here[place] = there[place]
    slab = Slab(packed_bytes(planes, tokens))
    ops.pack_blocks(planes.views, chosen, tokens, slab.bytes)
    packed = slab.bytes.clone()
    for unpack in (ops.unpack_blocks, ops_reference.unpack_blocks):
        result = target.copy()
        unpack(slab.bytes, chosen, tokens, result.views)
        assert result.is_equal(expected)
    assert slab.is_intact
    assert torch.equal(slab.bytes, packed)


@pytest.fixture(params=[1, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_any_number_of_threads_does_it(num_threads: int) -> None:
    planes = make_planes((4, 16, 64), torch.uint8, "keys beside values", num_planes=5)
    blocks, tokens = [5, 0, 3, 1], 50
    slab = Slab(packed_bytes(planes, tokens))
    ops.pack_blocks(planes.views, torch.tensor(blocks), tokens, slab.bytes)
    assert torch.equal(slab.bytes, spelt_out(planes, blocks, tokens))
    target = planes.copy()
    for view in target.views:
        view[blocks] = 0
    ops.unpack_blocks(slab.bytes, torch.tensor(blocks), tokens, target.views)
    for here, there in zip(target.views, planes.views, strict=True):
        assert torch.equal(here[[5, 0, 3]], there[[5, 0, 3]])
        assert torch.equal(here[1, :, :2], there[1, :, :2])
        assert not here[1, :, 2:].any()


def test_kv_without_heads_is_a_plane_too() -> None:
    """MLA's rows have no dimension of heads."""
    cache = torch.arange(NUM_BLOCKS * 4 * 3, dtype=torch.float32).view(NUM_BLOCKS, 4, 3)
    plane = ops.as_plane(cache)
    assert plane.shape == (NUM_BLOCKS, 1, 4, 3)
    assert plane.data_ptr() == cache.data_ptr()
    slab = torch.zeros(6 * 12, dtype=torch.uint8)
    ops.pack_blocks([plane], torch.tensor([2, 1]), 6, slab)
    assert torch.equal(slab.view(torch.float32), torch.cat([cache[2], cache[1, :2]]).flatten())
    with_heads = cache[:, None]
    assert ops.as_plane(with_heads) is with_heads


# --- arguments -------------------------------------------------------------------------------

Arguments = tuple[list[torch.Tensor], torch.Tensor, int, torch.Tensor]
Change = Callable[[Arguments], tuple[object, ...]]
SHAPE: Shape = (2, 3, 8)


def arguments() -> Arguments:
    planes = make_planes(SHAPE, torch.float32)
    return planes.views, torch.tensor([1, 2]), 5, torch.zeros(packed_bytes(planes, 5)).byte()


REFUSED: list[tuple[Change, str]] = [
    (lambda a: ([], *a[1:]), "no planes"),
    (lambda a: ([a[0][0][0]], *a[1:]), "4 dimensions"),
    (lambda a: ([a[0][0], a[0][1].double()], *a[1:]), "differ in shape, dtype"),
    (lambda a: ([a[0][0], a[0][1][..., :4]], *a[1:]), "differ in shape, dtype"),
    (lambda a: ([a[0][0].transpose(2, 3)], *a[1:]), "must touch"),
    (lambda a: (a[0], a[1].int(), *a[2:]), "int64"),
    (lambda a: (a[0], a[1][None], *a[2:]), "one contiguous dimension"),
    (lambda a: (a[0], torch.tensor([1, 0, 2, 0])[::2], *a[2:]), "one contiguous dimension"),
    (lambda a: (a[0], torch.tensor([1, NUM_BLOCKS]), *a[2:]), f"block {NUM_BLOCKS} lies outside"),
    (lambda a: (a[0], torch.tensor([-1, 1]), *a[2:]), "block -1 lies outside"),
    (lambda a: (*a[:2], 3, a[3]), "3 tokens are not those of 2 blocks of 3"),
    (lambda a: (*a[:2], 7, a[3]), "7 tokens are not those of 2 blocks of 3"),
    (lambda a: (*a[:2], 0, a[3]), "0 tokens are not those of 2 blocks"),
    (lambda a: (*a[:2], -1, a[3]), "-1 tokens are not those of 2 blocks"),
    (lambda a: (*a[:3], a[3][:-1]), "the slab has 639 bytes, 640 are needed"),
    (lambda a: (*a[:3], torch.zeros(641).byte()), "the slab has 641 bytes, 640 are needed"),
    (lambda a: (*a[:3], a[3].view(torch.float32)), "contiguous dimension of uint8"),
    (lambda a: (*a[:3], a[3].view(2, -1)), "contiguous dimension of uint8"),
    (lambda a: (*a[:3], torch.zeros(1280).byte()[::2]), "contiguous dimension of uint8"),
]  # fmt: skip


@native
@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[text for _, text in REFUSED])
def test_arguments_that_do_not_fit_are_refused(change: Change, message: str) -> None:
    planes, blocks, tokens, slab = change(arguments())
    with pytest.raises(RuntimeError, match=message):
        ops.pack_blocks(planes, blocks, tokens, slab)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=message):
        ops.unpack_blocks(slab, blocks, tokens, planes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: ([], *a[1:]), "no planes"),
        (lambda a: (a[0], torch.tensor([1, NUM_BLOCKS]), *a[2:]), "lies outside"),
        (lambda a: (a[0], torch.tensor([-1, 1]), *a[2:]), "lies outside"),
        (lambda a: (*a[:2], 3, a[3]), "3 tokens are not those of 2 blocks of 3"),
        (lambda a: (*a[:2], 7, a[3]), "7 tokens are not those of 2 blocks of 3"),
        (lambda a: (*a[:3], a[3][:-1]), "the slab has 639 bytes, 640 are needed"),
        (lambda a: (*a[:3], torch.zeros(641).byte()), "the slab has 641 bytes, 640 are needed"),
    ],
)
def test_the_reference_refuses_what_would_harm_memory_too(change: Change, message: str) -> None:
    planes, blocks, tokens, slab = change(arguments())
    with pytest.raises(RuntimeError, match=message):
        ops_reference.pack_blocks(planes, blocks, tokens, slab)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=message):
        ops_reference.unpack_blocks(slab, blocks, tokens, planes)  # type: ignore[arg-type]


def test_no_blocks_have_no_tokens() -> None:
    planes, _, _, slab = arguments()
    no_blocks = torch.tensor([], dtype=torch.int64)
    ops.pack_blocks(planes, no_blocks, 0, slab[:0])
    ops.unpack_blocks(slab[:0], no_blocks, 0, planes)


# --- as PyTorch's ops ------------------------------------------------------------------------


@native
@pytest.mark.parametrize("op", ["pack_blocks", "unpack_blocks"])
def test_the_ops_are_registered_as_pytorch_wants_them(op: str) -> None:
    planes, blocks, tokens, slab = arguments()
    given = {
        "pack_blocks": (planes, blocks, tokens, slab),
        "unpack_blocks": (slab, blocks, tokens, planes),
    }[op]
    results = torch.library.opcheck(getattr(torch.ops.vllm_pd_plugin, op).default, given)
    assert set(results.values()) == {"SUCCESS"}


@native
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_may_call_the_op(backend: str) -> None:
    def pack(
        planes: list[torch.Tensor], blocks: torch.Tensor, tokens: int, slab: torch.Tensor
    ) -> torch.Tensor:
        torch.ops.vllm_pd_plugin.pack_blocks(planes, blocks, tokens, slab)
        return slab.int().sum()

    torch._dynamo.reset()
    planes, blocks, tokens, slab = arguments()
    expected = torch.zeros_like(slab)
    ops_reference.pack_blocks(planes, blocks, tokens, expected)
    total = torch.compile(pack, fullgraph=True, backend=backend)(planes, blocks, tokens, slab)
    assert torch.equal(slab, expected)
    assert total == expected.int().sum()


def test_without_the_extension_the_references_are_used_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    planes, blocks, tokens, slab = arguments()
    expected = torch.zeros_like(slab)
    ops.pack_blocks(planes, blocks, tokens, expected)
    before = [plane.clone() for plane in planes]
    monkeypatch.setattr(ops, "HAS_NATIVE", False)
    ops._say_that_the_reference_is_used.cache_clear()
    ops.pack_blocks(planes, blocks, tokens, slab)
    assert torch.equal(slab, expected)
    for plane in planes:
        plane[1] = 0
    ops.unpack_blocks(slab, blocks, tokens, planes)
    assert all(
        torch.equal(plane[1].view(torch.uint8), was[1].view(torch.uint8))
        for plane, was in zip(planes, before, strict=True)
    )
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "vllm-pd-plugin runs without its native extension"
    ]
