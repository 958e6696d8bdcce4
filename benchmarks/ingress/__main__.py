"""What Ray Serve's ingress adds to a request, and to each streamed token: none, its proxy, HAProxy.

The same frontend over an engine of role both (tiny-llama), three times: `direct` is `vllm-pd
serve`, `proxy` the frontend on Ray Serve behind Serve's own proxy, with the same engine, `haproxy`
the same where Ray was started with RAY_SERVE_ENABLE_HA_PROXY=1, with another engine. All are up at
once, one is asked at a time, in an order that rotates: first one request after another, then
several at once. CPU is that of ingress and frontend.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.common import output, program
from benchmarks.common.client import Prompts, ask
from benchmarks.common.statistics import Row, median, quartiles
from tests import models
from tests.engine import running, say, start_frontend
from tests.ray_cluster import RayCluster, wait_until

EXAMPLES = """examples:
  python -m benchmarks.ingress --json benchmarks/results/ingress.json
  python -m benchmarks.ingress --repeat 2 --requests 10
"""

ARMS = ("direct", "proxy", "haproxy")
PROMPT_TOKENS, ANSWER_TOKENS = 64, 64
AT_ONCE = 16
ADMIN_KEY = "benchmark-of-the-ingress"
COUNTED = ("ProxyActor", "haproxy", ":Frontend", "vllm-pd")


def main() -> int:
    parser = program.parser("ingress", __doc__)
    parser.epilog = EXAMPLES
    parser.add_argument("--repeat", type=int, default=5, help="repetitions (%(default)s)")
    parser.add_argument(
        "--requests", type=int, default=30, help="one after another, in each (%(default)s)"
    )
    args = parser.parse_args()

    def body(stack: ExitStack) -> int:
        facts = output.machine()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls, families = set_up(stack, folder)
        samples: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for repetition in range(-1, args.repeat):
            for turn in range(len(ARMS)):
                arm = ARMS[(repetition + turn) % len(ARMS)]
                count = args.requests if repetition >= 0 else 8
                sample = measure(urls[arm], families[arm], count, Prompts(100 * repetition + turn))
                if repetition >= 0:  # the first one only warms up
                    samples[arm].append(sample)
                    say(f"{repetition + 1} of {args.repeat}, {arm}: {sample['ttft_ms']:.1f} ms")
        rows: list[Row] = [{"arm": arm, **columns(samples[arm])} for arm in ARMS]
        facts += [
            f"tiny-llama in float32, engines of role both; {PROMPT_TOKENS} tokens in, "
            f"{ANSWER_TOKENS} out, greedy, streamed; {args.requests} requests one after another, "
            f"then {AT_ONCE} at once four times.",
            "Medians of repetitions (quartiles); a repetition's own number is the median over its "
            "requests. Differences to `direct` are of the same repetition.",
        ]
        tables = [("What the ingress adds", table(rows))]
        print(output.as_text(tables, facts))
        if args.json:
            output.write(args.json, rows, tables, facts)
        return 0

    return program.run(body)


def set_up(stack: ExitStack, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Start everything; returns each arm's address, and what lists its processes."""
    urls: dict[str, str] = {}
    families: dict[str, Any] = {}
    engine = ""
    for arm in ("proxy", "haproxy"):
        say(f"Ray with {arm}: about a minute")
        environ = {"VLLM_PD_ADMIN_KEY": ADMIN_KEY, "VLLM_CPU_KVCACHE_SPACE": "1"}
        if arm == "haproxy":
            environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
        cluster = RayCluster(environ)
        stack.callback(cluster.stop)
        cluster.start_head()
        cluster.add("node", 4)
        cluster.deploy(configuration(cluster.http_port))
        cluster.wait_until_running()
        urls[arm] = cluster.url
        families[arm] = lambda cluster=cluster: [
            process for name in ("head", "node") for process in cluster.processes(name)
        ]
        if arm == "proxy":
            engine = engine_of(cluster)
    model = models.tiny_llama()
    words = ("--both", engine, "--max-model-len", "4096")
    frontend = start_frontend("serve", model, words, folder=folder)
    stack.enter_context(running([frontend]))
    urls["direct"] = frontend.url
    families["direct"] = lambda: [
        psutil.Process(frontend.process.pid),
        *psutil.Process(frontend.process.pid).children(recursive=True),
    ]
    return urls, families


def engine_of(cluster: RayCluster) -> str:
    """Return where the engine of a cluster is, when the ingress lets us through."""
    found: list[str] = []

    def is_there() -> bool:
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        answer = httpx.get(f"{cluster.url}/pd/v1/pool", headers=headers, timeout=10)
        found[:] = [e["url"] for e in answer.json()["engines"]] if answer.is_success else []
        return bool(found)

    wait_until(is_there, 60, "the pool is known")
    return found[0]


def configuration(port: int) -> Mapping[str, Any]:
    model = models.tiny_llama()
    args = {
        "model": str(model),
        "served_model_name": model.name,
        "engine_args": {"dtype": "float32", "enforce-eager": True, "max-model-len": 4096},
        "prefill": 0,
        "decode": 0,
        "both": 1,
    }
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {"name": "default", "import_path": "vllm_pd_plugin.ray_serve:app", "args": args}
        ],
    }


def measure(url: str, family: Any, num_requests: int, prompts: Prompts) -> dict[str, float]:
    """Ask one after another, then several at once."""
    model = models.tiny_llama().name

    def once() -> tuple[float, float]:
        sent, arrivals = ask(url, model, prompts.next(PROMPT_TOKENS), ANSWER_TOKENS)
        return arrivals[0] - sent, (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)

    cpu_before = cpu_s(family())
    times = [once() for _ in range(num_requests)]
    cpu = cpu_s(family()) - cpu_before
    began_at = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for each in [pool.submit(once) for _ in range(4 * AT_ONCE)]:
            each.result()
    seconds = time.perf_counter() - began_at
    return {
        "ttft_ms": 1e3 * median([ttft for ttft, _ in times]),
        "itl_ms": 1e3 * median([itl for _, itl in times]),
        "cpu_ms_per_request": 1e3 * cpu / num_requests,
        "tokens_per_s": 4 * AT_ONCE * ANSWER_TOKENS / seconds,
    }


def cpu_s(family: Sequence[psutil.Process]) -> float:
    """Return the CPU time of ingress and frontend."""
    total = 0.0
    for process in family:
        try:
            if any(name in " ".join(process.cmdline()) for name in COUNTED):
                times = process.cpu_times()
                total += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return total


def columns(samples: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def table(rows: Sequence[Row]) -> str:
    direct = next(row for row in rows if row["arm"] == "direct")

    def spread(values: Sequence[float], form: str) -> str:
        low, high = quartiles(values)
        return f"{median(values):{form}} ({low:{form}} to {high:{form}})"

    def added(row: Row, name: str, form: str) -> str:
        if row is direct:
            return ""
        return spread([a - b for a, b in zip(row[name], direct[name], strict=True)], form)

    head = ["ingress", "n", "TTFT ms", "added", "time per token ms", "added", "CPU ms a request",
            "tokens/s, 16 at once"]  # fmt: skip
    return output.markdown(
        head,
        [
            [
                row["arm"],
                str(len(row["ttft_ms"])),
                spread(row["ttft_ms"], ".1f"),
                added(row, "ttft_ms", ".1f"),
                spread(row["itl_ms"], ".2f"),
                added(row, "itl_ms", ".2f"),
                spread(row["cpu_ms_per_request"], ".1f"),
                spread(row["tokens_per_s"], ".0f"),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
