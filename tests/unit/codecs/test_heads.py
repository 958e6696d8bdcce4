"""Heads that are gathered and scattered lie where the model of a handoff says, in any pages."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.fakes.native import without_native_ops
from tests.mapping.handoff import Handover, Pair, pack
from tests.mapping.memory import NOTHING, Engine, Numbers, heads_on
from tests.mapping.pairs import pairs
from tests.tools import needs
from tests.unit.mapping.examples import request
from vllm_pd_plugin.codecs import heads, ops
from vllm_pd_plugin.mapping.kv_cache import FP8, ITEM_BYTES
from vllm_pd_plugin.mapping.match import Share, Slab, match

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    needs(ops.HAS_NATIVE, "the native extension"),
]

Bytes = NDArray[np.uint8]

TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    FP8: torch.float8_e4m3fn,
}


@contextmanager
def served_by(who: str) -> Iterator[None]:
    """Let the ops be those of the extension ("native"), or their references."""
    with pytest.MonkeyPatch.context() as patch:
        if who == "reference":
            without_native_ops(patch)
        yield


# --- what is in the model's memory ------------------------------------------------------------


def values_of(numbers: Numbers, dtype: str) -> torch.Tensor:
    """Return what the elements of some numbers are at the source: of any magnitude."""
    hashed = (numbers // 8).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = torch.from_numpy((hashed >> np.uint64(33)).astype(np.int64))
    exponents = (bits & 0xFFFF) % 60 - 30
    signs = 1 - 2 * (bits >> 16 & 1)
    mantissas = 1 + (bits >> 17 & 0x3FFF).double() / 2**14
    return (signs * mantissas * 2.0**exponents).to(TYPES[dtype])


def scale_of(layer: int, part: int) -> float:
    """Return by what a part of a layer is divided where it becomes fp8."""
    return 0.37 + layer + 10 * part


def scales_of(numbers: Numbers) -> torch.Tensor:
    """Return the same for elements, by their numbers."""
    parts = numbers // (8 * 64 * 4096 * 64)
    return torch.from_numpy(0.37 + parts // 4 + 10 * (parts % 4)).float()


def converted(values: torch.Tensor, dtype: str, scales: torch.Tensor) -> torch.Tensor:
    if values.dtype == TYPES[dtype]:
        return values
    if dtype == FP8:
        values = (values.float() / scales).clamp(-448, 448)
    return values.to(TYPES[dtype])


def in_bytes(numbers: Numbers, values: torch.Tensor) -> Bytes:
    """Return bytes, of which each knows its element and which of its bytes it is."""
    size = values.element_size()
    all_bytes = values.view(torch.uint8).view(-1, size).numpy()
    chosen: Bytes = all_bytes[np.arange(len(numbers)), numbers % 8]
    return chosen


def source_memory(numbers: Numbers, dtype: str) -> torch.Tensor:
    """Return a rank's memory; where nothing was written it has anything."""
    memory = anything(len(numbers))
    there = numbers != NOTHING
    memory[torch.from_numpy(there)] = torch.from_numpy(
        in_bytes(numbers[there], values_of(numbers[there], dtype))
    )
    return memory


def on_wire(numbers: Numbers, source: str, slab: str) -> Bytes:
    """Return a slab whose bytes are of some elements."""
    return in_bytes(numbers, converted(values_of(numbers, source), slab, scales_of(numbers)))


def anything(num_bytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_bytes)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


# --- the ops on that memory -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """One rank of an engine in the model, with memory of real bytes.

    has_bytes: its fp8 is uint8 to PyTorch.
    """

    engine: Engine
    rank: int
    memory: torch.Tensor
    has_bytes: bool

    def layers(self, group: int, regions: tuple[int, ...]) -> list[heads.LayerParts]:
        told, layout = self.engine.told, self.engine.told.groups[group].layout
        num_heads = len(heads_on(told.groups[group].spec.num_heads, told.tensor_parallel_size, 0))
        dtype = torch.uint8 if self.has_bytes and layout.dtype == FP8 else TYPES[layout.dtype]
        found: list[heads.LayerParts] = []
        for index in regions:
            region = self.engine.ranks[self.rank].regions[index]
            pages = heads.Pages(
                region.num_blocks,
                region.stride_bytes,
                layout.block_tokens,
                num_heads,
                layout.head_stride,
                layout.parts,
            )
            end = region.base + region.num_blocks * region.stride_bytes
            found.append(pages.of(self.memory[region.base : end].view(dtype)))
        return found

    def blocks(self, group: int) -> torch.Tensor:
        return torch.tensor(self.engine.tables[group], dtype=torch.int64)


def scales(pair: Pair, share: Share) -> list[list[float]]:
    parts = len(pair.local.told.groups[share.group].layout.parts)
    numbers = [pair.local.layers.index(layer) for layer in share.layers]
    return [[scale_of(layer, part) for part in range(parts)] for layer in numbers]


def check(pair: Pair, has_bytes: bool, who: str) -> int:
    """Hand every share of every rank over in slabs; returns how many slabs there were."""
    source, local = pair.source, pair.local
    written = [source.written(rank) for rank in range(source.told.num_ranks)]
    read = [np.zeros(len(numbers), np.int64) for numbers in written]
    slabs = 0
    for rank, shares in enumerate(match(source.told, local.told, allow_fp8=True)):
        model = Handover(pair, rank, written)
        here = Side(local, rank, anything(len(model.memory)), has_bytes)
        before = here.memory.clone()
        for share in shares:
            if share.slab is None:
                continue
            tokens = local.told.groups[share.group].needed_tokens(pair.first_token, pair.num_tokens)
            wire = pack(source, share, share.slab, tokens, written, read)
            model.unpack(share, share.slab, tokens, wire)
            theirs = source.told.groups[share.source_group].layout.dtype
            memory = source_memory(written[share.source_rank], theirs)
            there = Side(source, share.source_rank, memory, not has_bytes)
            with served_by(who):
                move(pair, share, share.slab, tokens, there, here, wire)
            slabs += 1
        compare(pair, model, here, before)
    return slabs


def move(
    pair: Pair, share: Share, slab: Slab, tokens: range, there: Side, here: Side, wire: Numbers
) -> None:
    """Gather and scatter one share, and look at the slab between."""
    theirs = pair.source.told.groups[share.source_group].layout.dtype
    memory = torch.zeros(slab.num_bytes(len(share.layers), len(tokens)), dtype=torch.uint8)
    kept = there.memory.clone()
    count = len(share.heads)
    heads.gather_heads(
        there.layers(share.source_group, share.source_regions),
        range(share.source_head, share.source_head + count),
        there.blocks(share.source_group),
        tokens,
        slab.dtype,
        memory,
        scales(pair, share),
    )
    assert torch.equal(there.memory, kept), "gathering wrote to the pages"
    assert np.array_equal(memory.numpy(), on_wire(wire, theirs, slab.dtype)), "another slab"
    heads.scatter_heads(
        memory,
        slab.dtype,
        here.blocks(share.group),
        tokens,
        range(share.head, share.head + count),
        here.layers(share.group, share.regions),
        scales(pair, share),
    )
    assert np.array_equal(memory.numpy(), on_wire(wire, theirs, slab.dtype)), "the slab changed"


def compare(pair: Pair, model: Handover, here: Side, before: torch.Tensor) -> None:
    """Where the model has an element is that, converted to the slab's type and to ours; all other
    bytes are as they were."""
    theirs, ours = (side.told.groups[0].layout.dtype for side in (pair.source, pair.local))
    narrow = min(ours, theirs, key=ITEM_BYTES.__getitem__)
    there = model.memory != NOTHING
    numbers = model.memory[there]
    values = converted(values_of(numbers, theirs), narrow, scales_of(numbers))
    expected = before.clone()
    expected[torch.from_numpy(there)] = torch.from_numpy(
        in_bytes(numbers, converted(values, ours, scales_of(numbers)))
    )
    assert torch.equal(here.memory, expected)


@settings(max_examples=60, deadline=None)
@given(pairs(), st.booleans())
def test_any_two_engines_hand_over_what_the_model_says(pair: Pair, has_bytes: bool) -> None:
    check(pair, has_bytes, "native")


@settings(max_examples=30, deadline=None)
@given(pairs(), st.booleans())
def test_the_reference_hands_over_what_the_model_says_too(pair: Pair, has_bytes: bool) -> None:
    check(pair, has_bytes, "reference")


@pytest.mark.parametrize("who", ["native", "reference"])
@pytest.mark.parametrize("forms", [("tiles", "columns"), ("kernel blocks", "token major")], ids=str)
@pytest.mark.parametrize(
    "dtypes",
    [
        pair
        for pair in itertools.product(TYPES, TYPES)
        if FP8 not in pair or pair in ((FP8, FP8), ("bfloat16", FP8))
    ],
    ids=str,
)
def test_each_pair_of_types_is_handed_over_between_blocks_of_other_sizes(
    who: str, forms: tuple[str, str], dtypes: tuple[str, str]
) -> None:
    """Blocks of 128 and 48 tokens, 2 ranks and 4, a prefix of which the consumer has a part."""
    pair = request((128, 48), forms, (2, 4), dtypes=dtypes, num_tokens=391, first_token=96)
    assert check(pair, False, who)


@pytest.mark.parametrize("who", ["native", "reference"])
def test_a_latent_without_heads_is_handed_over(who: str) -> None:
    of = {"kind": "mla", "channels": (("latent", 8), ("rope", 4)), "heads": 1}
    assert check(request((16, 64), sizes=(1, 2), **of), False, who)  # type: ignore[arg-type]
