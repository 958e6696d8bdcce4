"""Descriptions that cannot be true."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import msgspec
import pytest

from tests.unit.mapping.examples import changed, kv_cache
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.mapping.checks import check_memory
from vllm_pd_plugin.mapping.kv_cache import EngineKvCache
from vllm_pd_plugin.mapping.match import match
from vllm_pd_plugin.memory.layout import RankMemory, Region

OURS = kv_cache()
PART = OURS.groups[0].layout.parts[0]
HUGE = 2**48


def with_part(**fields: Any) -> dict[str, Any]:
    first, *others = OURS.groups[0].layout.parts
    values = {name: getattr(first, name) for name in first.__dataclass_fields__} | fields
    return {"parts": (type(first)(**values), *others)}


FORGED = [
    (changed(OURS, groups=()), "has no groups"),
    (changed(OURS, layout={"layers": ()}), "into 0 pipeline stages"),
    (changed(OURS, layout={"layers": ((),)}), "has no layers"),
    (changed(OURS, layout={"layers": (("a", "a"),)}), "has layer a a second time"),
    (changed(OURS, groups=OURS.groups * 2), "group 1 has layer layers.0 a second time"),
    (
        changed(OURS, groups=(*OURS.groups, *kv_cache(stages=(("a",), ("b",))).groups)),
        "group 1 is divided into 2 pipeline stages, their KV cache group 0 into 1",
    ),
    (changed(OURS, tensor_parallel_size=0), "tensor parallel size is 0"),
    (changed(OURS, tensor_parallel_size=-4), "tensor parallel size is -4"),
    (changed(OURS, tensor_parallel_size=2**64), f"tensor parallel size is {2**64}"),
    (changed(OURS, tensor_parallel_size=3), "4 KV heads, which their tensor parallel size 3"),
    (changed(OURS, tensor_parallel_size=6), "4 KV heads, which their tensor parallel size 6"),
    (changed(OURS, data_parallel_rank=-1), "data parallel rank is -1"),
    (changed(OURS, spec={"num_heads": 0}), "number of KV heads is 0"),
    (changed(OURS, spec={"num_heads": 5}, tensor_parallel_size=2), "5 KV heads"),
    (changed(OURS, spec={"num_heads": HUGE}), "too few|reaches to byte"),
    (changed(OURS, spec={"window": 8}), "kind full and has a window of 8"),
    (changed(OURS, spec={"kind": "sliding_window"}), "has a window of None"),
    (changed(OURS, spec={"kind": "sliding_window", "window": 0}), "window is 0"),
    (changed(OURS, spec={"channels": (("key", 0), ("value", 4))}), "width of a key is 0"),
    (changed(OURS, spec={"channels": (("key", 4),)}), "pages have .*value.*, its heads "),
    (changed(OURS, layout={"dtype": "int3"}), "elements of int3, known are float32"),
    (changed(OURS, layout={"block_tokens": 0}), "block size is 0"),
    (changed(OURS, layout={"block_tokens": HUGE}), "reaches to byte|too few"),
    (changed(OURS, layout={"page_bytes": 0}), "page is 0"),
    (changed(OURS, layout={"page_bytes": 1023}), "reaches to byte 1024 of pages of 1023"),
    (changed(OURS, layout={"head_stride": HUGE}), "reaches to byte"),
    (changed(OURS, layout={"head_stride": -1}), "start and strides"),
    (changed(OURS, layout=with_part(start=-1)), "start and strides"),
    (changed(OURS, layout=with_part(start=HUGE)), "reaches to byte"),
    (changed(OURS, layout=with_part(strides=(2**70, 0, 0, 1))), "start and strides"),
    (changed(OURS, layout=with_part(strides=(8, 0, 1))), "start and strides"),
    (changed(OURS, layout=with_part(token_tile=0)), "tiles of 0 tokens"),
    (changed(OURS, layout=with_part(token_tile=3)), "tiles of 3 tokens by 4 channels, in blocks"),
    (changed(OURS, layout=with_part(channel_tile=3)), "tiles of 1 tokens by 3 channels"),
    (changed(OURS, layout={"block_tokens": 17} | with_part(strides=(0, 0, 0, 1))), "reaches|too"),
]


@pytest.mark.parametrize(("theirs", "said"), FORGED, ids=[said for _, said in FORGED])
def test_a_description_that_contradicts_itself_is_refused(theirs: EngineKvCache, said: str) -> None:
    with pytest.raises(PeerError, match=said) as refusal:
        match(theirs, OURS)
    assert refusal.value.reason is Reason.PEER_INCOMPATIBLE
    assert "their" in str(refusal.value)


def test_a_head_count_that_does_not_divide_is_named_on_our_side_too() -> None:
    with pytest.raises(PeerError, match="our KV cache group 0 has 4 KV heads"):
        match(OURS, changed(OURS, tensor_parallel_size=3))


@pytest.mark.parametrize("tp", [2**40, 4])
@pytest.mark.parametrize("block", [2**40, 16])
@pytest.mark.parametrize("page_bytes", [2**47, 1024])
def test_large_numbers_take_neither_time_nor_memory(tp: int, block: int, page_bytes: int) -> None:
    theirs = changed(
        OURS,
        layout={"block_tokens": block, "page_bytes": page_bytes},
        tensor_parallel_size=tp,
        data_parallel_rank=2**40,
    )
    tracemalloc.start()
    began_at = time.monotonic()
    try:
        shares = match(theirs, OURS)
    except PeerError:
        shares = ()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - began_at < 1
    assert peak < 2**20
    assert all(share.source_rank < theirs.num_ranks for of_rank in shares for share in of_rank)


# --- memory ----------------------------------------------------------------------------------

REGION = Region(4096, 10, 1024, 1024)
MEMORY = RankMemory((REGION, REGION), b"")


def region(**fields: int) -> RankMemory:
    return RankMemory((REGION, msgspec.structs.replace(REGION, **fields)), b"")


def test_memory_as_described_is_taken() -> None:
    check_memory(OURS, [MEMORY], "their")
    stages = kv_cache(tp=2, heads=8, stages=(("a",), ("b",)))
    check_memory(stages, [RankMemory((REGION,), b"")] * 4, "their")


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([MEMORY, MEMORY], "that of 2 ranks, tensor parallel size 1 and 1 pipeline stages make 1"),
        ([RankMemory((REGION,), b"")], "their rank 0 has 1 regions for 2 layers"),
        ([region(block_bytes=512)], "blocks of 512 bytes, pages have 1024"),
        ([region(num_blocks=0)], "a region that cannot be"),
        ([region(num_blocks=-1)], "a region that cannot be"),
        ([region(stride_bytes=1023)], "a region that cannot be"),
        ([region(base=-1)], "a region that cannot be"),
        ([region(base=2**64 - 1024)], "a region that cannot be"),
        ([region(stride_bytes=2**70)], "a region that cannot be"),
    ],
)
def test_memory_that_is_not_as_described_is_refused(ranks: list[RankMemory], said: str) -> None:
    with pytest.raises(PeerError, match=said):
        check_memory(OURS, ranks, "their")
