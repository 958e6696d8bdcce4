"""What the plug-in costs in memory: an engine with the connector against the same one without.

Engines: `plain` (no connector), and a `producer` and a `consumer` with pdplugin. Each handoff is a
new prompt, prefilled on the producer and decoded on the consumer, asked serially and at once in
turns; `plain` answers the same prompts, so that what vLLM itself keeps of a request is in all.
Some handoffs that are not counted come first: they touch every block of the small KV caches.

Memory is the proportional set size (PSS) of the server and all its children: a page that several
processes share counts in each as its share. Added is what an engine has beyond `plain` and beyond
the staging buffers that are configured. The plug-in reads into the KV cache and has none. Growth
is the slope of a straight line through all samples, as MiB over the whole run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common import output, program
from benchmarks.common.client import Prompts
from benchmarks.common.engines import SMALL_FLAGS
from benchmarks.common.processes import family, own_pss_bytes
from benchmarks.common.statistics import MIB, growth
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

EXAMPLES = """examples:
  python -m benchmarks.memory --handoffs 2000 --json benchmarks/results/memory.json
  python -m benchmarks.memory --handoffs 200 --samples 4
"""

FLAGS = (*SMALL_FLAGS, "--num-gpu-blocks-override", "64")
PROMPT_TOKENS, ANSWER_TOKENS = 300, 2
AT_ONCE = 4
WARM_UP_HANDOFFS = 100
STAGING_MIB = 0.0


def main() -> int:
    parser = program.parser("memory", __doc__)
    parser.epilog = EXAMPLES
    parser.add_argument("--handoffs", type=int, default=2000, help="how many (%(default)s)")
    parser.add_argument("--samples", type=int, default=20, help="how often to look (%(default)s)")
    args = parser.parse_args()
    if not 2 <= args.samples <= args.handoffs:
        parser.error("--samples must be 2 or more, and no more than --handoffs")
    return program.run(lambda stack: run(args, stack))


def run(args: argparse.Namespace, stack: ExitStack) -> int:
    """Start the engines, hand off, print and write. ``stack`` gets what ends it all."""
    facts = output.machine()
    say("starting three engines: one to three minutes")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    engines = stack.enter_context(running(start_engines(folder)))
    prompts = Prompts(1)
    answer(engines, [prompts.next(PROMPT_TOKENS) for _ in range(WARM_UP_HANDOFFS)])
    counts = [args.handoffs * number // args.samples for number in range(args.samples + 1)]
    samples = {engine.name: [pss_mib(engine)] for engine in engines}
    for before, after in zip(counts, counts[1:], strict=False):
        answer(engines, [prompts.next(PROMPT_TOKENS) for _ in range(before, after)])
        for engine in engines:
            samples[engine.name].append(pss_mib(engine))
        now = ", ".join(f"{name} {taken[-1]:.1f}" for name, taken in samples.items())
        say(f"{after} of {args.handoffs} handoffs: MiB: {now}")
    rows = rows_of(counts, samples)
    tables = [("Memory beyond an engine without a connector", table(rows))]
    print(output.as_text(tables, facts))
    if args.json:
        output.write(args.json, rows, tables, facts)
    return 0


def start_engines(folder: Path) -> list[Engine]:
    """Start plain, producer and consumer, in this order, and return at once."""
    path, port = models.tiny_llama(), free_port()
    produce = connector_arguments("prefill", port=port)
    return [
        start("plain", path, FLAGS, cores="0", folder=folder),
        start("producer", path, (*FLAGS, *produce), cores="0", folder=folder, control_port=port),
        start("consumer", path, (*FLAGS, *connector_arguments("decode")), cores="1", folder=folder),
    ]


def answer(engines: Sequence[Engine], prompts: Sequence[list[int]]) -> None:
    """Hand each prompt off, and have the plain engine answer it too."""
    plain, producer, consumer = engines

    def one(number: int) -> None:
        how = (hand_off, hand_off_at_once)[number % 2]
        how(producer, consumer, prompts[number], ANSWER_TOKENS)
        plain.complete(prompts[number], ANSWER_TOKENS)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(one, range(len(prompts))))


def pss_mib(engine: Engine) -> float:
    """Return the memory of the server and all its children."""
    return sum(map(own_pss_bytes, family(engine.process.pid))) / MIB


def rows_of(counts: Sequence[int], samples: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Return a row for each engine.

    counts: handoffs done at each sample, from 0 on.
    samples: MiB by engine, among them ``plain``.
    """
    rows = []
    for arm, taken in samples.items():
        is_plain = arm == "plain"
        staging = 0.0 if is_plain else STAGING_MIB
        added = [own - plain - staging for own, plain in zip(taken, samples["plain"], strict=True)]
        rows.append(
            {
                "arm": arm,
                "handoffs": counts[-1],
                "staging_mib": staging,
                "start_mib": round(taken[0], 1),
                "end_mib": round(taken[-1], 1),
                "growth_mib": round(growth(counts, taken), 2),
                "added_mib": None if is_plain else round(added[-1], 1),
                "added_growth_mib": None if is_plain else round(growth(counts, added), 2),
                "samples_mib": [
                    [count, round(mib, 2)] for count, mib in zip(counts, taken, strict=True)
                ],
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = (
        "engine", "handoffs", "MiB at the start", "MiB at the end", "growth MiB", "staging MiB",
        "added MiB", "growth of added MiB",
    )  # fmt: skip
    lines = []
    for row in rows:
        added = ("added_mib", "added_growth_mib")
        lines.append(
            [
                str(row["arm"]), str(row["handoffs"]), f"{row['start_mib']:.1f}",
                f"{row['end_mib']:.1f}", f"{row['growth_mib']:.2f}", f"{row['staging_mib']:.0f}",
                *("" if row[name] is None else f"{row[name]:.1f}" for name in added),
            ]
        )  # fmt: skip
    return output.markdown(head, lines)


if __name__ == "__main__":
    sys.exit(main())
