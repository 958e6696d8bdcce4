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

With `--frontend` there are several engines of each role on this machine's loopback, and one of them
is killed in every `--kill-every` seconds, at any moment, and started again; the last one of a role
that is up is spared, unless `--kill-last` is given. Arms: `frontend` (pdplugin behind `vllm-pd
serve`) and `nixl` (NixlConnector behind vllm-router, both as shipped). Prompts are short and long,
sampling is greedy, greedy with penalties, or seeded, answers are streamed or whole. No failure has
an excuse there:

  answered, client left   what came is what the reference has; of a client that left, up to then
  failed                  an error, or a stream that broke off
  wrong                   another token, or another log-probability
  tokens twice, missing   what one engine gives, but for tokens that came again or not at all
  retried                 attempts that the frontend counted as failed and followed by another
  longest pause           between two tokens of a stream

With `--race` nothing is killed: leases are 50 ms, pools have 24 blocks, the producer has other work
for each block, and the consumer is stopped and continued several times a second, often while it
reads. In the arm `check-taken-out` every commit is granted: there must be wrong answers.

  committed      HTTP 200
  wrong          of these, what is not what one engine alone answers
  refused_by     the others, by what the client was told; reasons: by the consumer's counters
  reused         refused by the producer when blocks of the handoff had been given to others
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.chaos import fleet as chaos_fleet
from benchmarks.chaos import race as chaos_race
from benchmarks.chaos.account import is_clean, table
from benchmarks.chaos.fleet_plan import Topology
from benchmarks.chaos.plan import Arrival, plan_arrivals, plan_events
from benchmarks.chaos.reference import reference_answers
from benchmarks.chaos.requests import MAX_TOKENS
from benchmarks.chaos.run import Plan, run_arm
from benchmarks.chaos.site import ARMS
from benchmarks.common import output, program
from benchmarks.common.engines import SMALL_FLAGS
from tests.engine import Completion, Engine

EXAMPLES = """examples:
  python -m benchmarks.chaos --seed 1 --minutes 5 --json benchmarks/results/chaos.json
  python -m benchmarks.chaos --arms pdplugin --minutes 2 --policy recompute --logs chaos-logs
  python -m benchmarks.chaos --frontend --topology 2P2D
  python -m benchmarks.chaos --race --seed 1 --minutes 3 --json benchmarks/results/chaos-race.json

The status is 1 if the arm `pdplugin` had anything but answers and failures with a reason, or the
arm `frontend` anything but answers and clients that left, or no engine was killed there; 2 if the
run could not go on.
"""


def main() -> int:
    args = parse_arguments()
    carry_out = chaos_fleet.run if args.frontend else chaos_race.run if args.race else run
    return program.run(lambda stack: carry_out(args, stack))


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
    questions = {arrival.index: question(arrival) for arrival in plan.arrivals}
    references = reference_answers(questions, SMALL_FLAGS, folder, opened)
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
        type=lambda text: text.split(","),
        metavar="ARM,...",
        help=f"some of {', '.join(ARMS)}; with --frontend of {', '.join(chaos_fleet.ARMS)}, with "
        f"--race of {', '.join(chaos_race.ARMS)} (all)",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--frontend", action="store_true", help="kill engines of a fleet behind a frontend"
    )
    kind.add_argument(
        "--race", action="store_true", help="stop a consumer while its producer reuses the blocks"
    )
    parser.add_argument(
        "--topology", type=topology, default="2P2D", metavar="nPnD",
        help="with --frontend: how many engines prefill and decode (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--kill-every", type=float, default=20.0, metavar="SECONDS",
        help="with --frontend: how often one of them is killed (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--kill-last", action="store_true",
        help="with --frontend: do not spare the last one of a role; requests wait for the next one",
    )  # fmt: skip
    parser.add_argument("--logs", type=Path, help="keep the engines' logs in this folder")
    args = parser.parse_args()
    if min(args.minutes, args.rate, args.hang_after, args.kill_every) <= 0:
        parser.error("--minutes, --rate, --hang-after and --kill-every must be above 0")
    known = chaos_fleet.ARMS if args.frontend else chaos_race.ARMS if args.race else ARMS
    args.arms = args.arms or list(known)
    unknown = [arm for arm in args.arms if arm not in known]
    if unknown:
        parser.error(f"--arms: no arm {', '.join(unknown)}; there are {', '.join(known)}")
    return args


def topology(text: str) -> Topology:
    try:
        return Topology.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def question(arrival: Arrival) -> Callable[[Engine], Completion]:
    return lambda engine: engine.complete(arrival.prompt(), MAX_TOKENS)


if __name__ == "__main__":
    sys.exit(main())
