"""Which memory is made readable, and which layouts a block may have."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from vllm_pd_plugin.errors import UnsupportedError
from vllm_pd_plugin.memory.layout import Region, Span
from vllm_pd_plugin.memory.regions import region_of, register

SHAPE = (6, 2, 4, 8)
"""Blocks, heads, tokens, channels."""


class Recorder:
    """A transport that notes what it is given."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []

    def register(self, spans: Sequence[tuple[int, int]]) -> bytes:
        self.spans = list(spans)
        return b"metadata"


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2), (0, 3, 2, 1)], ids=str)
def test_a_block_may_have_its_dimensions_in_any_order(order: tuple[int, ...]) -> None:
    memory = torch.zeros([SHAPE[i] for i in order], dtype=torch.bfloat16)
    cache = memory.permute(*[order.index(i) for i in range(4)])
    assert cache.shape == SHAPE
    assert region_of("layer", cache) == Region(memory.data_ptr(), 6, 128, 128)


def test_a_block_without_heads_is_one_stretch_too() -> None:
    cache = torch.zeros((6, 4, 9))
    assert region_of("layer", cache) == Region(cache.data_ptr(), 6, 144, 144)


def test_blocks_may_be_apart() -> None:
    whole = torch.zeros((6, 3, 2, 4, 8), dtype=torch.float16)
    cache = whole[:, 1]
    assert region_of("layer", cache) == Region(cache.data_ptr(), 6, 128, 3 * 128)


@pytest.mark.parametrize("shape", [(1, 4, 8), (2, 1, 8), (2, 4, 1), (1, 1, 1)], ids=str)
def test_dimensions_of_one_do_not_matter(shape: tuple[int, ...]) -> None:
    cache = torch.zeros((6, *shape)).transpose(1, 2).contiguous().transpose(1, 2)
    num_bytes = torch.Size(shape).numel() * 4
    assert region_of("layer", cache) == Region(cache.data_ptr(), 6, num_bytes, num_bytes)


@pytest.mark.parametrize(
    "cache",
    [
        torch.zeros((2, *SHAPE)).transpose(0, 1),  # all keys before all values
        torch.zeros((6, 3, 4, 8))[:, :2].transpose(1, 2)[:, ::2],
        torch.zeros((6, 2, 4, 16))[..., :8],
        torch.zeros((6, 1, 4, 8)).expand(6, 2, 4, 8),
    ],
    ids=["in two halves", "every second token", "half of the channels", "one head for two"],
)
def test_a_block_with_gaps_is_refused(cache: torch.Tensor) -> None:
    with pytest.raises(UnsupportedError, match="KV cache of layer keeps a block in several pieces"):
        region_of("layer", cache)


def test_the_storage_of_every_cache_is_registered_once() -> None:
    whole = torch.zeros((6, 2, *SHAPE[1:]))
    other = torch.zeros(SHAPE)
    caches = {"a": whole[:, 0], "b": whole[:, 1], "c": other}
    transport = Recorder()
    memory = register(transport, caches, ["c", "a"])  # type: ignore[arg-type]
    expected = [(t.data_ptr(), t.numel() * 4) for t in (whole, other)]
    assert transport.spans == sorted(expected)
    assert memory.regions == (region_of("c", other), region_of("a", caches["a"]))
    assert memory.transport_metadata == b"metadata"
    assert memory.staging is None


def test_staging_memory_is_registered_too_and_peers_read_its_first_half() -> None:
    cache, outgoing, incoming = torch.zeros(SHAPE), torch.zeros(100).byte(), torch.zeros(50).byte()
    halves = [Span(half.data_ptr(), half.numel()) for half in (outgoing, incoming)]
    transport = Recorder()
    memory = register(transport, {"a": cache}, ["a"], halves)  # type: ignore[arg-type]
    assert memory.staging == halves[0]
    assert sorted(transport.spans) == transport.spans
    assert set(transport.spans) == {
        (cache.data_ptr(), cache.numel() * 4),
        *((half.address, half.num_bytes) for half in halves),
    }
