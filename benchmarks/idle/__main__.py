"""What an idle engine costs: CPU seconds of the engine's processes while nobody asks anything.

Arms: `plain` (no connector), `pdplugin`, `nixl` (vLLM's own NixlConnector, as shipped). All three
engines are up at the same time; each has answered a request before. The windows of the arms are
the same, so whatever else runs on the machine touches all alike.

    python -m benchmarks.idle --json benchmarks/results/idle.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.common import output, program
from benchmarks.common.engines import SMALL_FLAGS, nixl_arguments
from benchmarks.common.processes import family, own_cpu_seconds
from tests import models
from tests.engine import Engine, connector_arguments, free_port, running, say, start


def main() -> int:
    parser = program.parser("idle", __doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a window (%(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="number of windows (%(default)s)")
    args = parser.parse_args()
    if args.seconds <= 0 or args.repeat < 1:
        parser.error("--seconds must be above 0, --repeat 1 or more")
    return program.run(lambda stack: run(args, stack))


def run(args: argparse.Namespace, stack: ExitStack) -> int:
    """Start the engines, measure, print and write. ``stack`` gets what ends it all."""
    facts = output.machine()
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    engines = stack.enter_context(running(start_arms(Path(folder))))
    for engine in engines:
        engine.complete([5, 6, 7, 8], 4)
    time.sleep(5)
    rows = measure(engines, args.seconds, args.repeat)
    tables = [("CPU of idle engines", table(rows))]
    print(output.as_text(tables, facts))
    if args.json:
        output.write(args.json, rows, tables, facts)
    return 0


def start_arms(folder: Path) -> list[Engine]:
    path = models.tiny_llama()
    pdplugin = (*SMALL_FLAGS, *connector_arguments("both"))
    nixl = (*SMALL_FLAGS, *nixl_arguments())
    port = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
    return [
        start("plain", path, SMALL_FLAGS, cores="0", folder=folder),
        start("pdplugin", path, pdplugin, cores="0", folder=folder),
        start("nixl", path, nixl, cores="1", folder=folder, environ=port),
    ]


def measure(engines: Sequence[Engine], seconds: float, repeat: int) -> list[dict[str, object]]:
    """Return one row an arm: CPU share of one core in each window, median and range."""
    shares: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for window in range(repeat):
        before = [cpu_seconds(engine) for engine in engines]
        started = time.monotonic()
        time.sleep(seconds)
        elapsed = time.monotonic() - started
        for engine, then in zip(engines, before, strict=True):
            shares[engine.name].append((cpu_seconds(engine) - then) / elapsed)
        say(f"window {window + 1} of {repeat}")
    return [
        {
            "arm": arm,
            "window_s": seconds,
            "n": repeat,
            "cpu_share_median": round(statistics.median(values), 5),
            "cpu_share_min": round(min(values), 5),
            "cpu_share_max": round(max(values), 5),
        }
        for arm, values in shares.items()
    ]


def cpu_seconds(engine: Engine) -> float:
    """Return the CPU seconds that the server and all its children have used so far."""
    return sum(map(own_cpu_seconds, family(engine.process.pid)))


def table(rows: list[dict[str, object]]) -> str:
    lines = []
    for row in rows:
        median, low, high = (
            100 * float(str(row[f"cpu_share_{part}"])) for part in ("median", "min", "max")
        )
        lines.append(
            [str(row["arm"]), f"{median:.2f} %", f"{low:.2f} to {high:.2f} %", str(row["n"])]
        )
    return output.markdown(("arm", "CPU share of one core, idle", "range", "windows"), lines)


if __name__ == "__main__":
    sys.exit(main())
