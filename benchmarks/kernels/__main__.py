"""How fast the native ops are, on one core, beside copying the same bytes.

Each op moves the KV of scattered blocks: pack and unpack bit for bit, encode and decode as small
integers, digest hashes it. Beside it, in the same run and interleaved: memcpy of as many bytes, and
what PyTorch offers for the job (`index_select`, and a cast where the op makes integers). Rates are
bytes of KV a second; block_bytes is what one layer has in a block.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --json benchmarks/results/kernels.json --repeat 9

KV is laid out as attention kernels have it: in rows (a token's channels side by side, as on GPUs),
with the keys in columns (a channel's tokens side by side, as vLLM's CPU backend keeps them), or in
tiles (as it keeps bfloat16, and nothing else, for a matrix unit). Columns and tiles have blocks of
32 tokens and more there.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.common import output, program
from tests.engine import say
from vllm_pd_plugin.codecs import ops
from vllm_pd_plugin.codecs.codec import Codec, Encoding, Part, encoding_of
from vllm_pd_plugin.codecs.cpu_layout import parts_of_cpu_kernel

HEADS, WIDTH = 8, 64
BLOCK_TOKENS = (2, 8, 16, 32, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = {
    "pack": 0.8,
    "unpack": 0.8,
    "encode int8": 0.5,
    "decode int8": 0.3,
    "decode int4": 0.3,
    "decode int2": 0.3,
}
"""Least share of memcpy, for blocks of 4 KiB and more, in every layout."""


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """What is measured: `run` works on `kv_bytes` of KV, `torch_run` does the like in PyTorch."""

    op: str
    codec: str
    dtype: str
    layout: str
    block_bytes: int
    kv_bytes: int
    run: Callable[[], object]
    torch_run: Callable[[], object]


class Memory:
    """One layer's keys and values in `[num_blocks, heads, tokens, 2 * width]`, its blocks in a
    scattered order, and slabs; buffers have been written to, so that no page is new."""

    def __init__(self, total_bytes: int, block_tokens: int, dtype: torch.dtype) -> None:
        element = torch.empty(0, dtype=dtype).element_size()
        self.block_bytes = HEADS * block_tokens * 2 * WIDTH * element
        self.num_blocks = max(2, total_bytes // self.block_bytes)
        shape = (self.num_blocks, HEADS, block_tokens, 2 * WIDTH)
        self.block_tokens = block_tokens
        self.cache = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(2))
        self.blocks = order.contiguous()
        self.kv_bytes = self.num_blocks * self.block_bytes
        self.slab = torch.ones(self.kv_bytes, dtype=torch.uint8)
        self.other = torch.ones(self.kv_bytes, dtype=torch.uint8)

    def memcpy(self, num_bytes: int) -> None:
        ctypes.memmove(self.other.data_ptr(), self.slab.data_ptr(), num_bytes)

    def cases(self, dtype: str) -> Iterator[Case]:
        yield from self._moving(dtype)
        row = 2 * WIDTH
        layouts = {
            "rows": (Part.of_rows("key", WIDTH, 0, row), Part.of_rows("value", WIDTH, WIDTH, row))
        }
        if self.block_tokens % 32 == 0:
            layouts["columns"] = parts_of_cpu_kernel("vec", self.block_tokens, WIDTH)
            if dtype == "bfloat16":
                layouts["tiles"] = parts_of_cpu_kernel("amx", self.block_tokens, WIDTH)
        for layout, parts in layouts.items():
            for codec in (Codec.INT8, Codec.INT4, Codec.INT2):
                yield from self._coding(dtype, layout, codec, parts)

    def _moving(self, dtype: str) -> Iterator[Case]:
        planes, flat = [self.cache], self.cache.view(self.num_blocks, -1)
        into = self.slab.view(self.cache.dtype).view(self.num_blocks, -1)

        def case(op: str, run: Callable[[], object], torch_run: Callable[[], object]) -> Case:
            return Case(op, "raw", dtype, "", self.block_bytes, self.kv_bytes, run, torch_run)

        yield case(
            "pack",
            lambda: ops.pack_blocks(planes, self.blocks, self.slab),
            lambda: torch.index_select(flat, 0, self.blocks, out=into),
        )
        yield case(
            "unpack",
            lambda: ops.unpack_blocks(self.slab, self.blocks, planes),
            lambda: flat.index_copy_(0, self.blocks, into),
        )
        yield case(
            "digest",
            lambda: ops.digest_blocks(planes, self.blocks),
            lambda: torch.index_select(flat, 0, self.blocks, out=into).view(torch.int16).sum(),
        )

    def _coding(
        self, dtype: str, layout: str, codec: Codec, parts: Sequence[Part]
    ) -> Iterator[Case]:
        tokens = self.num_blocks * self.block_tokens
        work: list[tuple[torch.Tensor, Encoding, torch.Tensor]] = []
        start = 0
        for part in parts:
            encoding = encoding_of(codec, part)
            size = HEADS * encoding.stripe_bytes(tokens, WIDTH, 0)
            work.append((ops.part_of(self.cache, part), encoding, self.slab[start : start + size]))
            start += size
        flat = self.cache.view(self.num_blocks, -1)
        small = torch.ones(flat.shape, dtype=torch.int8)

        def encode() -> None:
            for part, encoding, slab in work:
                ops.encode_blocks([part], self.blocks, tokens, encoding, 0, slab)

        def decode() -> None:
            for part, encoding, slab in work:
                ops.decode_blocks(slab, self.blocks, tokens, encoding, 0, [part])

        def torch_encode() -> None:
            small.copy_(torch.index_select(flat, 0, self.blocks))

        def torch_decode() -> None:
            flat.index_copy_(0, self.blocks, small.to(flat.dtype))

        for op, run, torch_run in (
            ("encode", encode, torch_encode),
            ("decode", decode, torch_decode),
        ):
            yield Case(
                op, codec.value, dtype, layout, self.block_bytes, self.kv_bytes, run, torch_run
            )


def main() -> int:
    parser = program.parser("kernels", __doc__)
    parser.add_argument("--repeat", type=int, default=7, help="repetitions of each (%(default)s)")
    parser.add_argument("--mib", type=int, default=64, help="KV in each measurement (%(default)s)")
    args = parser.parse_args()
    if args.repeat < 5 or args.mib < 1:
        parser.error("--repeat must be 5 or more, --mib 1 or more")
    return program.run(lambda stack: measure(args, stack))


def measure(args: argparse.Namespace, stack: ExitStack) -> int:
    facts = output.machine()
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        for block_tokens in BLOCK_TOKENS:
            memory = Memory(args.mib * 2**20, block_tokens, dtype)
            for case in memory.cases(str(dtype).removeprefix("torch.")):
                rows.append(row_of(case, memory, args.repeat))
                shown = {k: v for k, v in rows[-1].items() if not k.endswith("samples")}
                say(" ".join(f"{name}={value}" for name, value in shown.items()))
    facts += [
        f"One thread, on core {core}; {args.mib} MiB of KV in each measurement, blocks of "
        f"{HEADS} heads with keys and values of {WIDTH} channels, in a scattered order.",
        f"Medians of {args.repeat} repetitions; op, memcpy and PyTorch take turns. "
        "Ratios are medians of the ratios of the repetitions, in brackets their quartiles.",
    ]
    tables = [("Rates of the ops", table(rows)), ("Against the targets", targets(rows))]
    if args.json:
        output.write(args.json, rows, tables, facts)
    print(output.as_text(tables, facts))
    return 0


def row_of(case: Case, memory: Memory, repeat: int) -> dict[str, Any]:
    ways = {
        "gb_per_s": case.run,
        "memcpy_gb_per_s": lambda: memory.memcpy(case.kv_bytes),
        "index_select_gb_per_s": case.torch_run,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repeat + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds = time.perf_counter() - began
            if repetition:  # the first one warms up
                rates[name].append(case.kv_bytes / seconds / 1e9)
    low, median, high = quartiles(rates["gb_per_s"], rates["memcpy_gb_per_s"])
    return {
        "op": case.op,
        "codec": case.codec,
        "dtype": case.dtype,
        "layout": case.layout,
        "block_bytes": case.block_bytes,
        **{name: round(statistics.median(taken), 2) for name, taken in rates.items()},
        "to_memcpy": round(median, 2),
        "to_memcpy_quartiles": [round(low, 2), round(high, 2)],
    }


def quartiles(rates: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Return the quartiles of the ratios of rates that were measured in turns; the second is the
    median."""
    ratios = [rate / other for rate, other in zip(rates, others, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return low, median, high


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = (
        "op", "codec", "dtype", "layout", "block bytes", "GB/s", "memcpy GB/s",
        "PyTorch GB/s", "÷ memcpy",
    )  # fmt: skip
    return output.markdown(
        head,
        [
            [
                row["op"], row["codec"], row["dtype"], row["layout"], str(row["block_bytes"]),
                f"{row['gb_per_s']:.2f}", f"{row['memcpy_gb_per_s']:.2f}",
                f"{row['index_select_gb_per_s']:.2f}", shown_ratio(row),
            ]
            for row in rows
        ],
    )  # fmt: skip


def shown_ratio(row: Mapping[str, Any]) -> str:
    low, high = row["to_memcpy_quartiles"]
    return f"{row['to_memcpy']:.2f} ({low:.2f} to {high:.2f})"


def targets(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the worst row of each op that has a target."""
    lines = []
    for name, least in TARGETS.items():
        op, _, codec = name.partition(" ")
        meant = [
            row
            for row in rows
            if row["op"] == op and row["codec"] == (codec or "raw") and row["block_bytes"] >= 4096
        ]
        worst = min(meant, key=lambda row: row["to_memcpy"])
        layout = f" in {worst['layout']}" if worst["layout"] else ""
        where = f"{worst['dtype']}{layout}, {worst['block_bytes']} bytes"
        lines.append([name, f"≥ {least}", shown_ratio(worst), where])
    return output.markdown(("op", "target ÷ memcpy", "worst", "where"), lines)


if __name__ == "__main__":
    sys.exit(main())
