"""How many requests a second two cores serve, and keep to an SLO: goodput, by open-loop arrivals.

Arms, each with two engines, one a core: `alone x2` (no connector, asked in turn), `nixl` (vLLM's
NixlConnector behind vllm-router), `pdplugin` (behind `vllm-pd serve --local-below 0`) and
`pdplugin-auto` (engines of role both behind `vllm-pd serve`, which hands off what it finds worth
it). The API servers, frontend, router and client share both cores with the engines.

For each arm and workload a ladder of Poisson rates is climbed. Goodput is the highest rate at which
90 % of the requests keep to both limits of the SLO, TTFT and mean TPOT. Needs two cores and some
16 GB of memory; the default takes hours: name workloads, arms and rates.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import httpx

from benchmarks.common import output, program
from benchmarks.common.client import Prompts, RequestFailed
from benchmarks.common.processes import Cores
from benchmarks.common.program import some_of
from benchmarks.common.statistics import Row, rotated
from benchmarks.goodput import plot as goodput_plot
from benchmarks.goodput.arms import ARMS, Arm, start_arms
from benchmarks.goodput.load import Target, load
from benchmarks.goodput.plan import SLOS, WORKLOADS, Phases, Slo, Workload, longest_s
from benchmarks.goodput.rows import (
    NOTES,
    Ladder,
    Step,
    attainment,
    goodput_rows,
    is_hopeless,
    tables,
)
from tests import models
from tests.engine import EngineError, say

EXAMPLES = """examples:
  python -m benchmarks.goodput --quick
  python -m benchmarks.goodput --workloads long-in --json benchmarks/results/goodput.json
  python -m benchmarks.goodput --workloads chat,short-in --arms "alone x2,pdplugin-auto" --repeat 3
  python -m benchmarks.goodput --slo tight:300/30 --slo headline:600/45 --rates 1,2,3 --seconds 60
"""

RATES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048")
"""What every engine of every arm is started with."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What is measured of each arm."""

    workloads: Sequence[Workload]
    slos: tuple[Slo, ...]
    rates: Sequence[float]
    warm_up_s: float
    seconds: float
    drain_s: float
    repeat: int
    seed: int

    def phases(self, workload: Workload) -> Phases:
        return Phases(self.warm_up_s, self.seconds, longest_s(workload, self.slos))


def main() -> int:
    args = parse_arguments()
    return program.run(lambda stack: measure(args, stack))


def parse_arguments() -> argparse.Namespace:
    parser = program.parser("goodput", __doc__)
    parser.epilog = EXAMPLES
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument(
        "--arms", type=some_of(list(ARMS)), default=list(ARMS), metavar="ARM,...",
        help=f"some of {', '.join(ARMS)} (all)",
    )  # fmt: skip
    parser.add_argument(
        "--workloads", type=some_of(names), metavar="NAME,...",
        help="; ".join(map(str, WORKLOADS)) + " (all)",
    )  # fmt: skip
    parser.add_argument(
        "--slo", type=slo, action="append", metavar="NAME:TTFT/TPOT",
        help=f"in ms; may be given several times ({'; '.join(map(str, SLOS))})",
    )  # fmt: skip
    parser.add_argument(
        "--rates", type=rising_rates, metavar="R,...",
        help=f"requests a second, rising ({','.join(f'{rate:g}' for rate in RATES)})",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, help="of arrivals that count at a rate (40)")
    parser.add_argument("--warm-up", type=float, help="seconds of arrivals before these (8)")
    parser.add_argument(
        "--drain", type=float, default=120.0, metavar="SECONDS",
        help="for what is under way at the end of a rate, until it is broken off (%(default)g)",
    )  # fmt: skip
    parser.add_argument("--repeat", type=int, help="repetitions of each ladder (5)")
    parser.add_argument("--seed", type=int, default=1, help="of arrivals, prompts (%(default)s)")
    parser.add_argument(
        "--chunk", type=int, metavar="TOKENS",
        help="--max-num-batched-tokens of every engine (vLLM's own)",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help="one workload, two rates, six seconds, one repetition, unless these are given",
    )  # fmt: skip
    parser.add_argument("--requests", type=Path, metavar="FILE", help="a JSON line a request")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the servers' logs here")
    args = parser.parse_args()
    usual = (names, list(RATES), 40.0, 8.0, 5)
    quick = (names[:1], [0.5, 1.0], 6.0, 2.0, 1)
    options = ("workloads", "rates", "seconds", "warm_up", "repeat")
    for option, value in zip(options, quick if args.quick else usual, strict=True):
        if getattr(args, option) is None:
            setattr(args, option, value)
    if args.repeat < 1 or args.seconds <= 0 or args.warm_up < 0 or args.drain <= 0:
        parser.error(
            "--repeat must be 1 or more, --seconds and --drain above 0, --warm-up not below"
        )
    slos = args.slo or list(SLOS)
    if len({each.name for each in slos}) != len(slos):
        parser.error("each --slo needs a name of its own")
    args.slo = tuple(slos)
    return args


def slo(text: str) -> Slo:
    try:
        return Slo.parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: NAME:TTFT/TPOT in milliseconds is allowed, as headline:600/45"
        ) from None


def rising_rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or rates[0] <= 0 or sorted(set(rates)) != rates or not math.isfinite(rates[-1]):
        raise argparse.ArgumentTypeError(f"{text!r}: rising numbers above 0, with commas between")
    return rates


def measure(args: argparse.Namespace, stack: ExitStack) -> int:
    """Start everything, measure, print and write. ``stack`` gets what ends it all."""
    facts = output.machine()
    model = models.bench_llama()
    folder = args.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
    folder.mkdir(parents=True, exist_ok=True)
    chunk = ("--max-num-batched-tokens", str(args.chunk)) if args.chunk else ()
    flags = (*FLAGS, *chunk)
    workloads = [workload for workload in WORKLOADS if workload.name in args.workloads]
    plan = Plan(
        workloads, args.slo, args.rates, args.warm_up, args.seconds, args.drain, args.repeat,
        args.seed,
    )  # fmt: skip
    requests = stack.enter_context(open_lines(args.requests)) if args.requests else None
    bench = Bench(start_arms(args.arms, model, flags, folder, stack), plan, requests)
    facts += facts_of(plan, args.arms, model.name, flags)

    def report() -> tuple[list[Row], list[str]]:
        rows = bench.rows()
        late = f"The client sent no request more than {bench.latest_ms:.0f} ms after it was due."
        if args.json:
            output.write(args.json, rows, tables(rows), [*facts, late])
        return rows, [*facts, late]

    for repetition in range(plan.repeat):
        bench.repeat(repetition)
        report()
    rows, facts = report()
    print(output.as_text(tables(rows), facts))
    if args.json:
        goodput_plot.plot(args.json.with_suffix(".png"), rows)
    return 0


def open_lines(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w")


def facts_of(plan: Plan, arms: Sequence[str], model: str, flags: Sequence[str]) -> list[str]:
    cores = Cores.choose()
    shown = {
        "arms": "; ".join(f"`{name}`, {ARMS[name]}" for name in arms),
        "first": cores.compute,
        "second": cores.other,
        "warm_up": plan.warm_up_s,
        "seconds": plan.seconds,
        "drain": plan.drain_s,
    }
    return [
        f"Workloads: {'; '.join(map(str, plan.workloads))}. Seed {plan.seed}.",
        *(note.format(**shown) for note in NOTES),
        f"Engines: {' '.join(flags)}; model {model}, float32; 1 GiB of KV cache each.",
    ]


class Bench:
    """One arm is awake at a time. requests: where each request's times go, if anywhere."""

    def __init__(self, arms: Sequence[Arm], plan: Plan, requests: TextIO | None) -> None:
        self.latest_ms = 0.0
        self._arms = arms
        self._plan = plan
        self._requests = requests
        self._prompts = Prompts(2)
        self._ladders: dict[tuple[str, str], list[Ladder | None]] = {}

    def repeat(self, repetition: int) -> None:
        """Let each arm have its turn; what fails is said, and its ladder is missing."""
        for arm in rotated(self._arms, repetition):
            missing = {workload.name: workload for workload in self._plan.workloads}
            try:
                arm.wake(self._prompts)
                for workload in self._plan.workloads:
                    self._keep(arm, workload, self._climb(arm, workload, repetition))
                    del missing[workload.name]
            except (RequestFailed, EngineError, httpx.HTTPError) as error:
                say(f"{arm.name}: {error!r}\n{arm.tails()}")
            finally:
                arm.pause()
            for workload in missing.values():
                self._keep(arm, workload, None)

    def rows(self) -> list[Row]:
        """Return the rows so far, in the order of the tables."""
        rows = [
            goodput_rows(arm.name, workload.name, self._plan.slos, ladders)
            for workload in self._plan.workloads
            for arm in self._arms
            if any(ladders := self._ladders.get((arm.name, workload.name), []))
        ]
        names = [workload.name for workload in self._plan.workloads]
        slos = [each.name for each in self._plan.slos]
        # What is equal stays in the order of the arms.
        order: Callable[[Row], Any] = lambda r: (names.index(r["workload"]), slos.index(r["slo"]))  # noqa: E731
        return sorted((row for group in rows for row in group), key=order)

    def _keep(self, arm: Arm, workload: Workload, ladder: Ladder | None) -> None:
        self._ladders.setdefault((arm.name, workload.name), []).append(ladder)

    def _climb(self, arm: Arm, workload: Workload, repetition: int) -> Ladder:
        """Take one rate after another, until fewer than half of the requests meet any SLO."""
        steps: list[Step] = []
        target = Target(arm.urls, arm.model)
        for rate in self._plan.rates:
            step = self._step(arm, target, workload, rate, repetition)
            steps.append(step)
            if is_hopeless(step.answers, self._plan.slos):
                break
        return steps

    def _step(
        self, arm: Arm, target: Target, workload: Workload, rate: float, repetition: int
    ) -> Step:
        plan = self._plan
        requests = plan.phases(workload).plan(workload, rate, plan.seed, repetition)
        before = arm.routes()
        taken = load(target, workload, requests, plan.drain_s)
        routes = {name: count - before.get(name, 0.0) for name, count in arm.routes().items()}
        self.latest_ms = max(self.latest_ms, taken.latest_ms)
        shares = ", ".join(
            f"{100 * attainment(taken.answers, each):.0f} % {each.name}" for each in plan.slos
        )
        failed = sum(answer.has_failed for answer in taken.answers)
        unwell = f"; {failed} failed" if failed else ""
        unwell += f"; {taken.cut_off} broken off" if taken.cut_off else ""
        say(
            f"{repetition + 1} of {plan.repeat}, {arm.name}, {workload.name}, {rate:g}/s: {shares} "
            f"of {len(taken.answers)}{unwell}"
        )
        step = Step(rate, taken.answers, {name: n for name, n in routes.items() if n})
        self._write(arm, workload, repetition, step)
        return step

    def _write(self, arm: Arm, workload: Workload, repetition: int, step: Step) -> None:
        if self._requests is None:
            return
        for answer in step.answers:
            line = {
                "arm": arm.name,
                "workload": workload.name,
                "repetition": repetition,
                "rate": step.rate,
                "ttft_ms": None if answer.has_failed else round(answer.ttft_ms, 2),
                "tpot_ms": None if answer.has_failed else round(answer.tpot_ms, 3),
                "itl_ms": [round(gap, 2) for gap in answer.itl_ms],
            }
            self._requests.write(json.dumps(line) + "\n")
        self._requests.flush()


if __name__ == "__main__":
    sys.exit(main())
