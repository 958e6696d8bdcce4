"""What the plug-in costs in memory: an engine with the connector against the same one without.

Engines: `plain` (no connector), and a `producer` and a `consumer` with pdplugin. Each handoff is a
new prompt, prefilled on the producer and decoded on the consumer; `plain` answers the same prompts,
so that what vLLM itself keeps of a request is in both. Memory is the proportional set size (PSS) of
the server and all its children, so shared pages count once.

    python -m benchmarks.memory --handoffs 2000 --json benchmarks/results/memory.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from tests import models
from tests.engine import (
    Engine,
    connector_arguments,
    free_port,
    hand_off,
    hand_off_at_once,
    running,
    say,
    start,
)
from tests.engines.conftest import random_prompt

COMMON = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096")
PROMPT_TOKENS, ANSWER_TOKENS = 300, 2
AT_ONCE = 4
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--handoffs", type=int, default=2000, help="how many (%(default)s)")
    parser.add_argument("--samples", type=int, default=10, help="how often to look (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plain, producer, consumer = engines = start_engines(Path(folder))
        with running(engines):
            rows = [sample(0, engines)]
            each = max(1, args.handoffs // args.samples)
            for first in range(0, args.handoffs, each):
                run(plain, producer, consumer, range(first, first + each))
                rows.append(sample(first + each, engines))
    print(table(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
        args.json.with_suffix(".md").write_text(table(rows) + "\n")
    return 0


def start_engines(folder: Path) -> list[Engine]:
    path, port = models.tiny_llama(), free_port()
    produce = connector_arguments("prefill", port=port)
    return [
        start("plain", path, COMMON, cores="0", folder=folder),
        start("producer", path, (*COMMON, *produce), cores="0", folder=folder, control_port=port),
        start(
            "consumer", path, (*COMMON, *connector_arguments("decode")), cores="1", folder=folder
        ),
    ]


def run(plain: Engine, producer: Engine, consumer: Engine, seeds: range) -> None:
    """Answer prompts on the plain engine, and hand them off, serially and at once in turns."""

    def one(seed: int) -> None:
        prompt = random_prompt(PROMPT_TOKENS, seed)
        how = (hand_off, hand_off_at_once)[seed % 2]
        how(producer, consumer, prompt, ANSWER_TOKENS)
        plain.complete(prompt, ANSWER_TOKENS)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(one, seeds))


def sample(handoffs: int, engines: list[Engine]) -> dict[str, float]:
    row = {"handoffs": float(handoffs)}
    row |= {f"{engine.name}_mib": round(resident_bytes(engine) / MIB, 1) for engine in engines}
    say(f"{handoffs} handoffs: {row}")
    return row


def resident_bytes(engine: Engine) -> float:
    """Return the memory of the server and all its children."""
    server = psutil.Process(engine.process.pid)
    family = [server, *server.children(recursive=True)]
    return float(sum(process.memory_full_info().pss for process in family))


def table(rows: list[dict[str, float]]) -> str:
    lines = [
        "| handoffs | plain MiB | producer MiB | consumer MiB | producer adds | consumer adds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        plain, producer, consumer = (row[f"{n}_mib"] for n in ("plain", "producer", "consumer"))
        lines.append(
            f"| {row['handoffs']:.0f} | {plain:.1f} | {producer:.1f} | {consumer:.1f} | "
            f"{producer - plain:.1f} | {consumer - plain:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
