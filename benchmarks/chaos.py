"""Chaos: two engines under load while they are killed, stopped and cut off from each other.

Distinct prompts arrive as a Poisson process. Meanwhile engines are killed (SIGKILL) and started
again at the same address, stopped for some seconds (SIGSTOP, SIGCONT), the link between them drops
every packet for some seconds, and one client in ten leaves within a second. Every answer is
compared with that of one plain engine: tokens and log-probabilities, in float32.

Arms, one after another, under the same plan: `pdplugin`, and `nixl` (vLLM's own NixlConnector, as
shipped). The client is the router: it asks the producer, then the consumer; with `pdplugin` it asks
both at once for half of the requests. With root and iproute2 each engine has a network namespace;
without, the link is not dropped.

What the columns mean:

  answered       HTTP 200, and equal to the reference
  wrong          HTTP 200, and anything else
  failed         with a reason: the engine was killed, stopped or starting; the error names it; the
                 engine counted a failure for it; the client left
  unexplained    failed without any of these
  hung           neither answer nor error in --hang-after seconds
  leaked_blocks  KV blocks in use on both engines after the load has ended and leases ran out
  engine_deaths  engines that ended by themselves

Each request is in exactly one of answered, wrong, failed, unexplained and hung. Where vLLM says
only "Internal server error", a life of an engine explains as many as it counted failures: by
`pd_handoff_failures_total`, or `vllm:nixl_num_failed_transfers_total`. With `--policy recompute`
a failed handoff fails no request, and so explains none.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import output, program
from benchmarks.chaos_account import is_clean, table
from benchmarks.chaos_plan import Arrival, plan_arrivals, plan_events
from benchmarks.chaos_requests import MAX_TOKENS
from benchmarks.chaos_run import Plan, report, run_arm
from benchmarks.chaos_site import ARMS
from benchmarks.engines import SMALL_FLAGS
from tests import models
from tests.engine import Completion, Engine, running, say, start

EXAMPLES = """examples:
  python -m benchmarks.chaos --seed 1 --minutes 5 --json benchmarks/results/chaos.json
  python -m benchmarks.chaos --arms pdplugin --minutes 2 --policy recompute --logs chaos-logs

The status is 1 if the arm `pdplugin` had anything but answers and failures with a reason, 2 if
the run could not go on.
"""

REFERENCES_AT_ONCE = 4


def main() -> int:
    args = parse_arguments()
    return program.run(lambda stack: run(args, stack))


def run(args: argparse.Namespace, stack: ExitStack) -> int:
    """Ask the reference, run each arm, print and write. ``stack`` gets what ends it all."""
    facts = output.machine()
    names = ("seed", "minutes", "rate", "hang_after", "policy")
    facts.append(", ".join(f"{name} {getattr(args, name)}" for name in names) + ".")
    duration_s = 60.0 * args.minutes
    plan = Plan(
        plan_arrivals(args.seed, duration_s, args.rate),
        plan_events(args.seed, duration_s),
        duration_s,
        args.hang_after,
        args.policy,
    )
    folder = args.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
    folder.mkdir(parents=True, exist_ok=True)
    opened = stack.enter_context(ExitStack())
    references = reference_answers(plan.arrivals, folder, opened)
    opened.close()
    rows: list[dict[str, Any]] = []
    for arm in args.arms:
        rows.append(asyncio.run(run_arm(arm, plan, references, folder, opened)))
        opened.close()
        print(table(rows[-1:]) + "\n", flush=True)
        if args.json:
            output.write(args.json, rows, [("Chaos", table(rows))], facts)
    if len(rows) > 1:
        print(table(rows))
    return 0 if all(is_clean(row) for row in rows if row["arm"] == "pdplugin") else 1


def parse_arguments() -> argparse.Namespace:
    parser = program.parser("chaos", __doc__)
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--seed", type=int, default=1, help="of prompts, arrivals and disturbances (%(default)s)"
    )
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="of load, for each arm (%(default)s)"
    )
    parser.add_argument("--rate", type=float, default=1.5, help="requests a second (%(default)s)")
    parser.add_argument(
        "--hang-after",
        type=float,
        default=90.0,
        help="seconds without any answer that are a hang (%(default)s)",
    )
    parser.add_argument(
        "--policy", choices=("fail", "recompute"), default="fail",
        help="vLLM's kv_load_failure_policy, of both arms (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--arms",
        type=parse_arms,
        default=ARMS,
        metavar="ARM,...",
        help=f"some of {', '.join(ARMS)} (all)",
    )
    parser.add_argument("--logs", type=Path, help="keep the engines' logs in this folder")
    args = parser.parse_args()
    if min(args.minutes, args.rate, args.hang_after) <= 0:
        parser.error("--minutes, --rate and --hang-after must be above 0")
    return args


def parse_arms(text: str) -> list[str]:
    arms = text.split(",")
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no arm {', '.join(unknown)}; there are {', '.join(ARMS)}"
        )
    return arms


def reference_answers(
    arrivals: Sequence[Arrival], folder: Path, stack: ExitStack
) -> dict[int, Completion]:
    """Return what one plain engine answers to every prompt of the run, by index."""
    say(f"reference: starting one plain engine, for {len(arrivals)} prompts")
    engine = start("reference", models.tiny_llama(), SMALL_FLAGS, cores="0", folder=folder)
    stack.enter_context(running([engine]))
    return asyncio.run(ask_references(engine, arrivals))


async def ask_references(engine: Engine, arrivals: Sequence[Arrival]) -> dict[int, Completion]:
    answers: dict[int, Completion] = {}
    gate = asyncio.Semaphore(REFERENCES_AT_ONCE)

    async def ask(arrival: Arrival) -> None:
        async with gate:
            answers[arrival.index] = await asyncio.to_thread(
                engine.complete, arrival.prompt(), MAX_TOKENS
            )

    progress = asyncio.create_task(
        report(lambda: f"reference: {len(answers)} of {len(arrivals)} prompts answered")
    )
    try:
        await asyncio.gather(*(ask(arrival) for arrival in arrivals))
    finally:
        progress.cancel()
    return answers


if __name__ == "__main__":
    sys.exit(main())
