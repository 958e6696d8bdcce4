"""What autoscaling does with a step of load: replicas, queues, and requests within their SLO.

Two parts. `simulated`: as many engines as are asked for, with the step times of one real engine of
this machine, which is measured first; the policy is the real one, the engines are not. `real`: Ray
Serve on this machine with real engines of a tiny model, one decode engine and at most two, whose
answers are compared with those of one engine alone; a stream that is lost or differs is an error.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.autoscale import plot as autoscale_plot
from benchmarks.autoscale import real as autoscale_real
from benchmarks.autoscale import sim as autoscale_sim
from benchmarks.common import output, program
from benchmarks.common.client import Prompts, ask
from benchmarks.common.engines import SMALL_FLAGS
from benchmarks.common.statistics import Row, median, quartiles
from tests import models
from tests.engine import Engine, running, say, start

EXAMPLES = """examples:
  python -m benchmarks.autoscale --json benchmarks/results/autoscale.json
  python -m benchmarks.autoscale --parts simulated --repeat 3
  python -m benchmarks.autoscale --parts real --seconds 60
"""

PARTS = ("simulated", "real")
PROMPT_TOKENS, ANSWER_TOKENS = 512, 64
AT_ONCE = 8
MEASUREMENTS = 5


def main() -> int:
    parser = program.parser("autoscale", __doc__)
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), default=list(PARTS), metavar="PART,...",
        help=f"some of {', '.join(PARTS)} (all)",
    )  # fmt: skip
    parser.add_argument("--repeat", type=int, default=5, help="simulations of each arm (5)")
    parser.add_argument(
        "--seconds", type=float, default=90.0, help="of high load in the real part (%(default)s)"
    )
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")

    def body(stack: ExitStack) -> int:
        facts = output.machine()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows: list[Row] = []
        tables: list[tuple[str, str]] = []
        if "simulated" in args.parts:
            pace = measure_pace(folder)
            simulated = simulate(pace, args.repeat)
            rows += simulated
            tables.append(("A step of load, simulated engines", simulated_table(simulated)))
            facts += [
                f"Simulated engines: {pace.prefill_rate:.0f} prompt tokens a second; a decode step "
                f"of {1e3 * pace.step_s:.1f} ms and {1e3 * pace.step_each_s:.2f} ms for each "
                "request, measured on one real engine (bench-llama, float32, one core).",
                autoscale_sim.DESCRIPTION,
            ]
        if "real" in args.parts:
            real = autoscale_real.run(stack, folder, args.seconds)
            rows.append(real)
            tables.append(("A step of load, real engines on Ray Serve", real_table(real)))
            facts.append(autoscale_real.DESCRIPTION)
        print(output.as_text(tables, facts))
        if args.json:
            output.write(args.json, rows, tables, facts)
            autoscale_plot.plot(args.json.with_suffix(".png"), rows)
        return 1 if any(row.get("lost") for row in rows) else 0

    return program.run(body)


def measure_pace(folder: Path) -> autoscale_sim.Pace:
    """Measure one engine alone: a prompt, one answer, and several answers at once."""
    say("measuring one engine: about a minute")
    model = models.bench_llama()
    with running([start("pace", model, SMALL_FLAGS, cores="0", folder=folder, kv_gib=2)]) as (one,):
        prompts = Prompts(1)
        ttft_s, alone_s = median_pace(one, prompts, 1)
        _, together_s = median_pace(one, prompts, AT_ONCE)
    each_s = max(0.0, (together_s - alone_s) / (AT_ONCE - 1))
    return autoscale_sim.Pace(PROMPT_TOKENS / ttft_s, max(1e-4, alone_s - each_s), each_s)


def median_pace(engine: Engine, prompts: Prompts, at_once: int) -> tuple[float, float]:
    """Return TTFT of the first, and the time between two tokens once all are decoding."""
    from concurrent.futures import ThreadPoolExecutor

    ttfts, itls = [], []
    with ThreadPoolExecutor(at_once) as pool:
        for _ in range(MEASUREMENTS):
            asked = [
                pool.submit(
                    ask, engine.url, engine.model, prompts.next(PROMPT_TOKENS), ANSWER_TOKENS
                )
                for _ in range(at_once)
            ]
            answers = [each.result() for each in asked]
            ttfts.append(min(arrivals[0] - sent for sent, arrivals in answers))
            begun = max(arrivals[0] for _, arrivals in answers)
            for _, arrivals in answers:
                later = [at for at in arrivals if at > begun]
                itls += [b - a for a, b in zip(later, later[1:], strict=False)]
    return median(ttfts), median(itls)


def simulate(pace: autoscale_sim.Pace, repeat: int) -> list[Row]:
    rows: list[Row] = []
    for name, arm in autoscale_sim.ARMS.items():
        runs = [autoscale_sim.run(arm, pace, seed) for seed in range(repeat)]
        rows.append(
            {
                "part": "simulated",
                "arm": name,
                "attainment": [run.attainment for run in runs],
                "engine_s": [run.engine_s for run in runs],
                "ttft_p90_ms": [run.ttft_p90_ms for run in runs],
                "tpot_p90_ms": [run.tpot_p90_ms for run in runs],
                "timeline": runs[0].timeline,
            }
        )
        say(f"{name}: {100 * median(rows[-1]['attainment']):.1f} % within the SLO")
    return rows


def simulated_table(rows: list[Row]) -> str:
    def spread(values: list[float], scale: float, form: str) -> str:
        low, high = quartiles(values)
        return f"{scale * median(values):{form}} ({scale * low:{form}} to {scale * high:{form}})"

    head = ["arm", "n", "within the SLO, %", "TTFT p90 ms", "TPOT p90 ms", "engine seconds"]
    return output.markdown(
        head,
        [
            [
                row["arm"],
                str(len(row["attainment"])),
                spread(row["attainment"], 100, ".1f"),
                spread(row["ttft_p90_ms"], 1, ".0f"),
                spread(row["tpot_p90_ms"], 1, ".1f"),
                spread(row["engine_s"], 1, ".0f"),
            ]
            for row in rows
        ],
    )


def real_table(row: Row) -> str:
    head = ["requests", "lost or wrong", "decode engines", "second one after", "given up after"]
    return output.markdown(
        head,
        [
            [
                str(row["requests"]),
                str(row["lost"]),
                " → ".join(map(str, row["steps"])),
                f"{row['up_s']:.0f} s of load" if row["up_s"] else "-",
                f"{row['down_s']:.0f} s without" if row["down_s"] else "-",
            ]
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
