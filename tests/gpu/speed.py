"""Stage: how fast the ops are, beside a copy of the same bytes on the device.

Rates are bytes of KV a second: those of the cache, however few are written down. Op and copy take
turns; each measurement is of some launches in a row, between two events.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.gpu.build import library_in
from tests.gpu.kernels import Call, Kernels
from tests.gpu.notes import Notes
from vllm_pd_plugin.codecs.codec import Codec, Part, encoding_of
from vllm_pd_plugin.codecs.ops import as_plane, part_of

REPETITIONS, LAUNCHES = 9, 4
KV_BYTES = {"cuda": 512 * 2**20, "cpu": 2 * 2**20}
"""In each measurement: several times what a GPU's cache holds."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A layer's KV cache: keys beside values, or MLA without heads."""

    name: str
    heads: int
    block_tokens: int
    parts: tuple[Part, ...]

    @property
    def channels(self) -> int:
        return sum(part.width for part in self.parts)


def _keys_beside_values(block_tokens: int) -> Shape:
    parts = Part.of_rows("key", 128, 0, 256), Part.of_rows("value", 128, 128, 256)
    return Shape(f"KV, 8 heads, {block_tokens} tokens", 8, block_tokens, parts)


SHAPES = (
    _keys_beside_values(16),
    _keys_beside_values(128),
    Shape(
        "MLA, 64 tokens", 1, 64,
        (Part.of_rows("latent", 512, 0, 576), Part.of_rows("rope", 64, 512, 576)),
    ),
)  # fmt: skip


class Memory:
    """One layer's KV cache, its blocks in a scattered order, and slabs."""

    def __init__(self, shape: Shape, dtype: torch.dtype, kv_bytes: int, device: str) -> None:
        row = shape.channels * dtype.itemsize
        self.shape = shape
        self.block_bytes = shape.heads * shape.block_tokens * row
        self.num_blocks = max(2, kv_bytes // self.block_bytes)
        size = (self.num_blocks, shape.heads, shape.block_tokens, shape.channels)
        self.cache = torch.randn(size, dtype=torch.float32, device=device).to(dtype)
        order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(2))
        self.blocks = order.to(device)
        self.kv_bytes = self.num_blocks * self.block_bytes
        self.slab = torch.ones(self.kv_bytes, dtype=torch.uint8, device=device)
        self.other = torch.ones_like(self.slab)
        self.total = torch.zeros(1, dtype=torch.int64, device=device)  # whatever it adds up to

    def copy(self) -> None:
        self.other.copy_(self.slab)


def run(notes: Notes) -> None:
    kernels = Kernels(library_in(notes.work))
    torch.set_num_threads(1)
    rates: list[dict[str, Any]] = []
    for dtype in DTYPES:
        for shape in SHAPES:
            memory = Memory(shape, dtype, KV_BYTES[notes.device], notes.device)
            for op, codec, calls in _cases(kernels, memory):
                row = {
                    "op": op, "codec": codec, "dtype": str(dtype).removeprefix("torch."),
                    "cache": shape.name, "block_bytes": memory.block_bytes,
                }  # fmt: skip
                rates.append(row | _measure(calls, memory, notes.is_stand_in))
                notes.note(rates=rates)
            del memory


def _cases(kernels: Kernels, memory: Memory) -> Iterator[tuple[str, str, list[Call]]]:
    """Yield op, codec, and the calls that are one launch of it."""
    planes, blocks, slab = [as_plane(memory.cache)], memory.blocks, memory.slab
    yield "pack", "raw", [kernels.packing(planes, blocks, slab)]
    yield "unpack", "raw", [kernels.unpacking(slab, blocks, planes)]
    yield "digest", "raw", [kernels.digesting(planes, blocks, memory.total)]
    tokens = memory.num_blocks * memory.shape.block_tokens
    for codec in (Codec.INT8, Codec.INT4, Codec.INT2):
        encodes, decodes, start = [], [], 0
        for part in memory.shape.parts:
            encoding = encoding_of(codec, part)
            size = memory.shape.heads * encoding.stripe_bytes(tokens, part.width, 0)
            how = (encoding.bits, encoding.by_channel, encoding.group, 0)
            where = slab[start : start + size]
            parts = [part_of(memory.cache, part)]
            encodes.append(kernels.encoding(parts, blocks, tokens, how, where))
            decodes.append(kernels.decoding(parts, blocks, tokens, how, where))
            start += size
        yield "encode", codec.value, encodes
        yield "decode", codec.value, decodes


def _measure(calls: list[Call], memory: Memory, is_stand_in: bool) -> dict[str, Any]:
    def launch() -> None:
        for call in calls:
            call()

    clock = _wall_s if is_stand_in else _device_s
    ways: dict[str, Callable[[], None]] = {"gb_per_s": launch, "copy_gb_per_s": memory.copy}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(REPETITIONS + 1):
        for name, way in ways.items():
            seconds = clock(way)
            if repetition:  # the first one warms up
                samples[name].append(memory.kv_bytes / seconds / 1e9)
    found: dict[str, Any] = {name: spread(taken) for name, taken in samples.items()}
    return found | {"to_copy": round(found["gb_per_s"][1] / found["copy_gb_per_s"][1], 3)}


def spread(samples: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    low, middle, high = statistics.quantiles(samples, n=4)
    return tuple(float(f"{value:.4g}") for value in (low, middle, high))  # type: ignore[return-value]


def _device_s(way: Callable[[], None]) -> float:
    """Return for how many seconds the device works on one launch."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(LAUNCHES):
        way()
    ended.record()
    ended.synchronize()
    milliseconds: float = began.elapsed_time(ended)
    return milliseconds / 1000 / LAUNCHES


def _wall_s(way: Callable[[], None]) -> float:
    began = time.perf_counter()
    way()
    return max(time.perf_counter() - began, math.ulp(1.0))
