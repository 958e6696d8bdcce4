"""What it costs that a request's blocks lie scattered, read as they lie and packed.

Four pairs of engines: their free blocks in order, or every second one first, so that no two blocks
of a request are neighbours; and raw KV read from block to block, or packed by the producer. All in
one run, interleaved, concurrent dispatch. Needs root, iproute2, two cores and some 16 GB of memory.

    python -m benchmarks.scattered --json benchmarks/results/scattered.json
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common import output, program
from benchmarks.common.arms import start_pair, stop_all, wait_until_paused
from benchmarks.common.client import Prompts
from benchmarks.common.network import two_hosts
from benchmarks.common.processes import Cores
from benchmarks.common.statistics import ratio
from benchmarks.handoff.routes import Route, routes_of
from benchmarks.handoff.rows import find
from benchmarks.handoff.run import Bench
from tests import models
from tests.engine import Engine, say

BLOCK_TOKENS = 32
NUM_BLOCKS = 256
FLAGS = (
    "--block-size", str(BLOCK_TOKENS), "--num-gpu-blocks-override", str(NUM_BLOCKS),
    "--max-num-seqs", str(NUM_BLOCKS), "--max-model-len", "4096",
)  # fmt: skip
POOLS = ("in order", "scattered")
PACKING = {"as it lies": "never", "packed": "always"}
SHORT_PROMPT = 20


def main() -> int:
    parser = program.parser("scattered", __doc__)
    parser.add_argument("--prompt", type=int, default=512, help="tokens (%(default)s)")
    parser.add_argument("--repeat", type=int, default=9, help="repetitions of each (%(default)s)")
    args = parser.parse_args()
    if args.repeat < 5 or not 128 <= args.prompt <= 2048:
        parser.error("--repeat must be 5 or more, --prompt 128 to 2048")
    return program.run(lambda stack: measure(args, stack))


def measure(args: argparse.Namespace, stack: ExitStack) -> int:
    facts = output.machine()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    cores = Cores.choose()
    network = stack.enter_context(two_hosts())
    engines: list[Engine] = []
    stack.callback(stop_all, engines)
    say(f"starting eight engines: some five minutes; logs in {folder}")
    model = models.bench_llama()
    arms = [
        start_pair(
            f"{pool}, {way}", (8010 + number, 5710 + number), {"packing": packing}, FLAGS, model,
            network, cores, folder, engines,
        )
        for number, (pool, way, packing) in enumerate(
            (pool, way, packing) for pool in POOLS for way, packing in PACKING.items()
        )
    ]  # fmt: skip
    wait_until_paused(engines)
    routes: list[Route] = []
    prompts = Prompts(3)
    for arm in arms:
        arm.signal(signal.SIGCONT)
        routes += routes_of(arm, ["concurrent"], ["raw"], cores, folder, stack)
        if arm.name.startswith(POOLS[1]):
            for engine in arm.engines.values():
                scatter(engine, prompts)
        arm.pause()
    bench = Bench(network, routes, args.repeat, 1)
    rows = bench.latency(args.prompt, 0)
    facts += [
        f"Prompts of {args.prompt} tokens, blocks of {BLOCK_TOKENS} tokens, link unlimited (veth, "
        "TCP), one request at a time; medians, in brackets the distance of the quartiles.",
        f"Scattered: {NUM_BLOCKS - 1} requests of one block each run together on every "
        "engine of the pair; every second one ends first, so that free blocks come in the order "
        "1, 3, 5, ...",
        f"Computing on core {cores.compute}, everything else on core {cores.other}.",
    ]
    tables = [("Scattered blocks", table(rows))]
    if args.json:
        output.write(args.json, rows, tables, facts)
    print(output.as_text(tables, facts))
    return 0


def scatter(engine: Engine, prompts: Prompts) -> None:
    """Leave an engine's free blocks in the order 1, 3, 5, ..., 2, 4, 6, ...: all are taken by
    requests of one block each, of which every second one ends first."""
    with ThreadPoolExecutor(NUM_BLOCKS) as pool:
        ends = [
            pool.submit(
                engine.complete, prompts.next(SHORT_PROMPT), 1 if number % 2 == 0 else 10,
                ignore_eos=True,
            )
            for number in range(NUM_BLOCKS - 1)
        ]  # fmt: skip
        for end in ends:
            end.result()


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = ("free blocks", "read", "n", "TTFT ms", "TTFT ÷ in order", "reads", "descriptors a read")
    lines = []
    for row in rows:
        pool, _, way = row["arm"].partition(", ")
        base = find(rows, row, arm=f"{POOLS[0]}, {way}")
        to_base = ratio(row, base, "ttft_samples_ms") if base and base is not row else None
        lines.append(
            [
                pool, way, str(row["n"]), f"{row['ttft_ms']:.1f} ({row['ttft_iqr_ms']:.1f})",
                str(to_base or ""), f"{row['stretches']:.0f}",
                f"{row['descriptors'] / row['stretches']:.1f}",
            ]
        )  # fmt: skip
    return output.markdown(head, lines)


if __name__ == "__main__":
    sys.exit(main())
