"""Packing and unpacking: natively what the reference says, and nothing beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.native import without_native_ops
from tests.fakes.planes import LAYOUTS, NUM_BLOCKS, Laid, Shape, Slab, make_planes
from tests.tools import needs
from vllm_pd_plugin.codecs import ops, ops_reference

DTYPES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 40))
Run = tuple[Laid, list[int]]

pytestmark = pytest.mark.usefixtures("one_thread")
native = needs(ops.HAS_NATIVE, "the native extension")


def spelt_out(planes: Laid, blocks: Sequence[int]) -> torch.Tensor:
    """What a slab must be, block by block."""
    contents = [plane[block].contiguous().flatten() for plane in planes.views for block in blocks]
    return torch.cat(contents).view(torch.uint8)


@st.composite
def runs(draw: st.DrawFn, repeated: bool) -> Run:
    """Planes in any layout, and some of their blocks."""
    planes = make_planes(
        draw(SHAPES),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([0, 3])),
    )
    block = st.integers(0, NUM_BLOCKS - 1)
    return planes, draw(st.lists(block, min_size=1, max_size=NUM_BLOCKS, unique=not repeated))


@native
@settings(max_examples=200, deadline=None)
@given(runs(repeated=True))
def test_a_slab_has_the_blocks_one_after_the_other(run: Run) -> None:
    planes, blocks = run
    expected, before, chosen = spelt_out(planes, blocks), planes.copy(), torch.tensor(blocks)
    for pack in (ops.pack_blocks, ops_reference.pack_blocks):
        slab = Slab(len(expected))
        pack(planes.views, chosen, slab.bytes)
        assert torch.equal(slab.bytes, expected)
        assert slab.is_intact
    assert planes.is_equal(before)


@native
@settings(max_examples=200, deadline=None)
@given(runs(repeated=False))
def test_unpacking_writes_to_the_blocks_and_to_nothing_else(run: Run) -> None:
    planes, blocks = run
    packed, target = spelt_out(planes, blocks), planes.inverted()
    expected = target.copy()
    for here, there in zip(expected.views, planes.views, strict=True):
        for block in blocks:
            here[block] = there[block]
    for unpack in (ops.unpack_blocks, ops_reference.unpack_blocks):
        result, slab = target.copy(), Slab(len(packed))
        slab.bytes.copy_(packed)
        unpack(slab.bytes, torch.tensor(blocks), result.views)
        assert result.is_equal(expected)
        assert slab.is_intact
        assert torch.equal(slab.bytes, packed)


@pytest.fixture(params=[1, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["dense", "tokens before heads"])
def test_any_number_of_threads_does_it(num_threads: int, layout: str) -> None:
    planes, blocks = make_planes((4, 16, 128), torch.uint8, layout, num_planes=5), [5, 0, 3, 1]
    slab = Slab(5 * 4 * 4 * 16 * 128)
    ops.pack_blocks(planes.views, torch.tensor(blocks), slab.bytes)
    assert torch.equal(slab.bytes, spelt_out(planes, blocks))
    target = planes.copy()
    for view in target.views:
        view[blocks] = 0
    ops.unpack_blocks(slab.bytes, torch.tensor(blocks), target.views)
    assert target.is_equal(planes)


def test_kv_without_heads_is_a_plane_too() -> None:
    """MLA's rows have no dimension of heads."""
    cache = torch.arange(NUM_BLOCKS * 4 * 3, dtype=torch.float32).view(NUM_BLOCKS, 4, 3)
    plane = ops.as_plane(cache)
    assert plane.shape == (NUM_BLOCKS, 1, 4, 3)
    assert plane.data_ptr() == cache.data_ptr()
    slab = torch.zeros(2 * 4 * 3 * 4, dtype=torch.uint8)
    ops.pack_blocks([plane], torch.tensor([2, 1]), slab)
    assert torch.equal(slab.view(torch.float32), cache[[2, 1]].flatten())
    with_heads = cache[:, None]
    assert ops.as_plane(with_heads) is with_heads


# --- arguments -------------------------------------------------------------------------------

Arguments = tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]
Change = Callable[[Arguments], tuple[object, ...]]
SHAPE: Shape = (2, 3, 8)


def arguments() -> Arguments:
    planes = make_planes(SHAPE, torch.float32)
    return planes.views, torch.tensor([1, 2]), torch.zeros(768, dtype=torch.uint8)


HARMFUL: list[tuple[Change, str]] = [
    (lambda a: ([], *a[1:]), "no planes"),
    (lambda a: (a[0], torch.tensor([1, NUM_BLOCKS]), a[2]), "lies outside a plane of 6 blocks"),
    (lambda a: (a[0], torch.tensor([-1, 1]), a[2]), "lies outside a plane of 6 blocks"),
    (lambda a: ([a[0][0], a[0][1][:2]], *a[1:]), "lies outside a plane of 2 blocks"),
    (lambda a: (*a[:2], a[2][:-1]), "the slab has 767 bytes, 768 are needed"),
    (lambda a: (*a[:2], torch.zeros(769).byte()), "the slab has 769 bytes, 768 are needed"),
]
REFUSED: list[tuple[Change, str]] = [
    *HARMFUL,
    (lambda a: ([a[0][0][0]], *a[1:]), "4 dimensions"),
    (lambda a: ([a[0][0], a[0][1].double()], *a[1:]), "differ in shape, dtype"),
    (lambda a: ([a[0][0], a[0][1][..., :4]], *a[1:]), "differ in shape, dtype"),
    (lambda a: ([a[0][0], a[0][1][:, :, :2]], *a[1:]), "differ in shape, dtype"),
    (lambda a: ([a[0][0], a[0][1][:, :1]], *a[1:]), "differ in shape, dtype"),
    (lambda a: ([a[0][0].transpose(2, 3)], *a[1:]), "must touch"),
    (lambda a: (a[0], a[1].int(), a[2]), "int64"),
    (lambda a: (a[0], a[1][None], a[2]), "one contiguous dimension"),
    (lambda a: (a[0], torch.tensor([1, 0, 2, 0])[::2], a[2]), "one contiguous dimension"),
    (lambda a: (*a[:2], a[2].view(torch.float32)), "contiguous dimension of uint8"),
    (lambda a: (*a[:2], a[2].view(2, -1)), "contiguous dimension of uint8"),
    (lambda a: (*a[:2], torch.zeros(1536).byte()[::2]), "contiguous dimension of uint8"),
]


def as_bytes(plane: torch.Tensor) -> torch.Tensor:
    return plane.clone().flatten().view(torch.uint8)


def refuse(module: object, changed: tuple[object, ...], message: str) -> None:
    """Both ops refuse, and write nothing."""
    planes, blocks, slab = changed
    before = [as_bytes(plane) for plane in planes]  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=message):
        module.pack_blocks(planes, blocks, slab)  # type: ignore[attr-defined]
    assert not slab.any()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=message):
        module.unpack_blocks(slab, blocks, planes)  # type: ignore[attr-defined]
    for plane, was in zip(planes, before, strict=True):  # type: ignore[call-overload]
        assert torch.equal(as_bytes(plane), was)


@native
@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_arguments_that_do_not_fit_are_refused(change: Change, message: str) -> None:
    refuse(ops, change(arguments()), message)


@pytest.mark.parametrize(("change", "message"), HARMFUL)
def test_the_reference_refuses_what_would_do_harm_too(change: Change, message: str) -> None:
    refuse(ops_reference, change(arguments()), message)


@pytest.mark.parametrize("module", [ops, ops_reference])
def test_no_blocks_take_no_bytes(module: object) -> None:
    planes, _, slab = arguments()
    no_blocks = torch.tensor([], dtype=torch.int64)
    module.pack_blocks(planes, no_blocks, slab[:0])  # type: ignore[attr-defined]
    module.unpack_blocks(slab[:0], no_blocks, planes)  # type: ignore[attr-defined]


# --- as PyTorch's ops ------------------------------------------------------------------------


@native
@pytest.mark.parametrize("op", ["pack_blocks", "unpack_blocks"])
def test_the_ops_are_registered_as_pytorch_wants_them(op: str) -> None:
    planes, blocks, slab = arguments()
    given = {"pack_blocks": (planes, blocks, slab), "unpack_blocks": (slab, blocks, planes)}[op]
    results = torch.library.opcheck(getattr(torch.ops.vllm_pd_plugin, op).default, given)
    assert set(results.values()) == {"SUCCESS"}


@native
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_may_call_the_op(backend: str) -> None:
    def pack(planes: list[torch.Tensor], blocks: torch.Tensor, slab: torch.Tensor) -> torch.Tensor:
        torch.ops.vllm_pd_plugin.pack_blocks(planes, blocks, slab)
        return slab.int().sum()

    torch._dynamo.reset()
    planes, blocks, slab = arguments()
    expected = torch.zeros_like(slab)
    ops_reference.pack_blocks(planes, blocks, expected)
    total = torch.compile(pack, fullgraph=True, backend=backend)(planes, blocks, slab)
    assert torch.equal(slab, expected)
    assert total == expected.int().sum()


def test_without_the_extension_the_references_are_used_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    planes, blocks = make_planes(SHAPE, torch.float32, "keys beside values"), torch.tensor([1, 2])
    expected, slab = spelt_out(planes, [1, 2]), torch.zeros(768, dtype=torch.uint8)
    without_native_ops(monkeypatch)
    ops.pack_blocks(planes.views, blocks, slab)
    assert torch.equal(slab, expected)
    target = planes.copy()
    for view in target.views:
        view[[1, 2]] = 0
    ops.unpack_blocks(slab, blocks, target.views)
    assert target.is_equal(planes)
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "vllm-pd-plugin runs without its native ops"
    ]
