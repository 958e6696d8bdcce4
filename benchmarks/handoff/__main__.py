"""What a handoff costs: one engine alone, vLLM's NixlConnector behind vllm-router, and pdplugin.

Arms: `alone` (one engine, no connector), `nixl` (NixlConnector behind vllm-router), `pdplugin`
(behind the same router: serial; and behind examples/concurrent_proxy.py: concurrent), `frontend`
(pdplugin behind `vllm-pd serve`, every prompt handed off; not by default). Producer and
consumer are in two network namespaces, joined by a link whose rate is set. All arms are measured in
one run, interleaved. Needs root, iproute2, two cores and some 16 GB of memory.

    python -m benchmarks.handoff --prompts 512 --link-mbit 0 --repeat 7
    python -m benchmarks.handoff --prompts 512,2048 --link-mbit 0,300,1000 \\
      --json benchmarks/results/handoff-links.json
    python -m benchmarks.handoff --prompts 128,512,2048,8192 --link-mbit 0,1000,300,100
    python -m benchmarks.handoff --codec raw,int8,int4,int2 --link-mbit 100,300 --prompts 512,2048
    python -m benchmarks.handoff --undisturbed --json benchmarks/results/handoff-undisturbed.json
    python -m benchmarks.handoff --frontend --json benchmarks/results/handoff-frontend.json
    python -m benchmarks.handoff --against ../before --arms pdplugin --prompts 512,2048 --repeat 15

`--frontend` measures alone, nixl and frontend, at 512 tokens over an unlimited link and one of
300 Mbit/s, and says whether the frontend adds at most 25 ms to the TTFT of `alone`, and its second
token comes no later after that than nixl's.

`--against FOLDER` adds the arm `before`: pdplugin as another checkout of this project has it (after
`make setup` there), and a table of the ratios of requests of the same repetition.

`--json FILE` also writes the tables (FILE with .md) and, without --undisturbed, a plot (.png). The
JSON and the tables grow while the benchmark runs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.common import output, program
from benchmarks.common.arms import ENGINE_FLAGS
from benchmarks.common.network import two_hosts
from benchmarks.common.processes import Cores
from benchmarks.common.program import some_of, whole_numbers
from benchmarks.common.statistics import Row
from benchmarks.handoff import criterion as handoff_criterion
from benchmarks.handoff import report, routes
from benchmarks.handoff.rows import with_hidden_shares
from benchmarks.handoff.run import RUNNING_PROMPT, Bench
from tests import models

ARMS = ("alone", "nixl", "pdplugin", "frontend")
BEFORE = "before"
DISPATCHES = ("serial", "concurrent")
CODECS = ("raw", "int8", "int4", "int2", "auto")

MIN_PROMPT, MAX_PROMPT = 128, 8192


def main() -> int:
    args = parse_arguments()
    return program.run(lambda stack: measure(args, stack))


def parse_arguments() -> argparse.Namespace:
    parser = program.parser("handoff", __doc__)
    parser.add_argument(
        "--prompts",
        type=whole_numbers(MIN_PROMPT, MAX_PROMPT),
        metavar="N,...",
        help=f"prompt lengths, {MIN_PROMPT} to {MAX_PROMPT} (512; with --undisturbed 2048)",
    )
    parser.add_argument(
        "--link-mbit",
        type=whole_numbers(0, 100_000),
        metavar="N,...",
        help="rates of the link, 0 for unlimited (0; with --frontend 0,300)",
    )
    parser.add_argument("--repeat", type=int, help="repetitions of each (5; with --frontend 7)")
    parser.add_argument(
        "--frontend",
        action="store_true",
        help="measure a frontend's first two tokens, and judge them",
    )
    parser.add_argument(
        "--arms", type=some_of(ARMS), metavar="ARM,...",
        help=f"some of {', '.join(ARMS)} (all but frontend; with --frontend all but pdplugin)",
    )  # fmt: skip
    parser.add_argument(
        "--dispatch", type=some_of(DISPATCHES), default=DISPATCHES, metavar="WAY,...",
        help="of pdplugin: serial, concurrent (both)",
    )  # fmt: skip
    parser.add_argument(
        "--codec", type=some_of(CODECS), default=CODECS[:1], metavar="CODEC,...",
        help=f"of pdplugin, dispatched concurrently: some of {', '.join(CODECS)} ({CODECS[0]})",
    )  # fmt: skip
    parser.add_argument(
        "--undisturbed",
        action="store_true",
        help="measure ITL of eight running decodes while handoffs arrive",
    )
    parser.add_argument(
        "--handoffs", type=int, default=5, help="with --undisturbed: how many arrive (%(default)s)"
    )
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER", help="also measure another checkout's pdplugin"
    )
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the servers' logs here")
    args = parser.parse_args()
    if args.frontend and args.undisturbed:
        parser.error("--frontend measures single requests: leave out --undisturbed")
    other = "pdplugin" if args.frontend else "frontend"
    args.arms = args.arms or [arm for arm in ARMS if arm != other]
    args.link_mbit = args.link_mbit or ([0, 300] if args.frontend else [0])
    args.repeat = (7 if args.frontend else 5) if args.repeat is None else args.repeat
    if args.repeat < 1 or args.handoffs < 1:
        parser.error("--repeat and --handoffs must be 1 or more")
    if args.frontend and "frontend" not in args.arms:
        parser.error("--frontend needs frontend among --arms, and alone and nixl to judge it")
    args.prompts = args.prompts or ([2048] if args.undisturbed else [512])
    if args.against is not None:
        args.arms = [BEFORE, *args.arms]
        if not list(args.against.glob("vllm_pd_plugin/_C.*so")):
            parser.error(f"--against: {args.against} has no built vllm_pd_plugin: run make setup")
    if args.undisturbed:
        args.arms = [arm for arm in args.arms if arm != "alone"]
    if not args.arms:
        parser.error("--undisturbed needs nixl, pdplugin or frontend among --arms")
    return args


def measure(args: argparse.Namespace, stack: ExitStack) -> int:
    """Start everything, measure, print and write. ``stack`` gets what ends it all."""
    facts = output.machine()
    model = models.bench_llama()
    folder = args.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
    folder.mkdir(parents=True, exist_ok=True)
    cores = Cores.choose()
    network = stack.enter_context(two_hosts())
    source = None if args.against is None else args.against.resolve()
    if source is not None:
        facts.append(f"`before` is commit {output.commit(source)}, `pdplugin` {output.commit()}.")
    started = routes.start(
        args.arms, args.dispatch, args.codec, model, network, folder, stack, source
    )
    notes = [*(report.UNDISTURBED_NOTES if args.undisturbed else report.LATENCY_NOTES)]
    if args.frontend:
        notes += handoff_criterion.NOTES
    facts += [
        note.format(compute=cores.compute, other=cores.other, running=RUNNING_PROMPT)
        for note in (*report.SHARED_NOTES, *notes)
    ]
    facts.append(f"Engines: {' '.join(ENGINE_FLAGS)}; model {model.name}, float32.")
    bench = Bench(network, started, args.repeat, args.handoffs)
    rows: list[Row] = []
    tables: list[tuple[str, str]] = []
    for link in args.link_mbit:
        network.limit(link)
        for prompt in args.prompts:
            if args.undisturbed:
                rows += bench.undisturbed(prompt, link)
                tables = report.undisturbed_tables(rows)
            else:
                rows = with_hidden_shares([*rows, *bench.latency(prompt, link)])
                tables = report.latency_tables(rows)
                if source is not None:
                    tables = [report.paired_table(rows), *tables]
                if args.frontend:
                    rows = handoff_criterion.with_criterion(rows)
                    tables = [handoff_criterion.table(rows), *tables]
            if args.json:
                output.write(args.json, rows, tables, facts)
    print(output.as_text(tables, facts))
    if args.json and not args.undisturbed:
        report.plot(args.json.with_suffix(".png"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
