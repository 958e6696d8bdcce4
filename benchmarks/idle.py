"""What an idle engine costs: CPU seconds of the engine's processes while nobody asks anything.

Arms: `plain` (no connector), `pdplugin`, `nixl` (vLLM's own NixlConnector, as shipped). All three
engines are up at the same time; each has answered a request before. The windows of the arms are
the same, so whatever else runs on the machine touches all alike.

    python -m benchmarks.idle --json benchmarks/results/idle.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests import models
from tests.engine import Engine, connector_arguments, free_port, running, say, start

COMMON = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096")
NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a window")
    parser.add_argument("--repeat", type=int, default=5, help="number of windows")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engines = start_arms(Path(folder))
        with running(engines):
            for engine in engines:
                engine.complete([5, 6, 7, 8], 4)
            time.sleep(5)
            rows = measure(engines, args.seconds, args.repeat)
    print(table(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def start_arms(folder: Path) -> list[Engine]:
    path = models.tiny_llama()
    nixl = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
    return [
        start("plain", path, COMMON, cores="0", folder=folder),
        start("pdplugin", path, (*COMMON, *connector_arguments("both")), cores="0", folder=folder),
        start(
            "nixl",
            path,
            (*COMMON, "--kv-transfer-config", json.dumps(NIXL)),
            cores="1",
            folder=folder,
            environ=nixl,
        ),
    ]


def measure(engines: list[Engine], seconds: float, repeat: int) -> list[dict[str, object]]:
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
    """CPU seconds that the server and all its children have used so far."""
    server = psutil.Process(engine.process.pid)
    times = [p.cpu_times() for p in (server, *server.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def table(rows: list[dict[str, object]]) -> str:
    lines = ["| arm | CPU share of one core, idle | range | windows |", "| --- | --- | --- | --- |"]
    for row in rows:
        median, low, high = (
            100 * float(str(row[f"cpu_share_{part}"])) for part in ("median", "min", "max")
        )
        lines.append(f"| {row['arm']} | {median:.2f} % | {low:.2f} to {high:.2f} % | {row['n']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
