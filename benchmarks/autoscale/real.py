"""The real part of `benchmarks.autoscale`: Ray Serve, real engines, a decode pool that scales."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common.statistics import Row
from tests import models
from tests.engine import Engine, running, say, start
from tests.ray_cluster import RayCluster, wait_until

LOW_CLIENTS, HIGH_CLIENTS = 1, 8
MAX_RUNNING = 4
PROMPT_TOKENS, ANSWER_TOKENS = 200, 200
LOW_S, SETTLE_S = 20.0, 300.0
DOWNSCALE_DELAY_S = 20.0
ENGINE_FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096")
DESCRIPTION = (
    f"Real part: tiny-llama in float32, one prefill engine, one to two decode engines of "
    f"{MAX_RUNNING} requests at once, a frontend, Ray and its proxy, all on the two cores; "
    f"{LOW_CLIENTS} client, then {HIGH_CLIENTS}, then {LOW_CLIENTS}, each asking again as soon as "
    f"it has its answer ({PROMPT_TOKENS} tokens in, {ANSWER_TOKENS} out, greedy). Each answer is "
    f"compared with one engine's. upscale_delay_s 2, downscale_delay_s {DOWNSCALE_DELAY_S:.0f}."
)


class Clients:
    """Ask again and again; how many of them do can change."""

    def __init__(self, server: Engine, expected: dict[int, tuple[int, ...]]) -> None:
        self._server = server
        self._expected = expected
        self._wanted = 0
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(HIGH_CLIENTS)
        self.answers = 0
        self.lost = 0
        self._running = [self._pool.submit(self._ask, i) for i in range(HIGH_CLIENTS)]

    def set(self, number: int) -> None:
        self._wanted = number

    def _ask(self, number: int) -> None:
        turn = number
        while not self._stop.is_set():
            if number >= self._wanted:
                time.sleep(0.1)
                continue
            turn = (turn + 1) % len(self._expected)
            try:
                answer = self._server.complete(
                    prompt(turn), ANSWER_TOKENS, ignore_eos=True, logprobs=None
                )
            except httpx.HTTPError as error:
                say(f"a stream was lost: {error!r}")
                self.lost += 1
                continue
            self.answers += 1
            self.lost += answer.token_ids != self._expected[turn]

    def close(self) -> None:
        self._stop.set()
        for each in self._running:
            each.result(120)
        self._pool.shutdown()


def prompt(number: int) -> list[int]:
    import random

    chooser = random.Random(number)
    return [chooser.randrange(100, 49_000) for _ in range(PROMPT_TOKENS)]


def run(stack: ExitStack, folder: Path, high_s: float) -> Row:
    """Run it; returns its row. Raises AssertionError when the pool does not do as it should."""
    model = models.tiny_llama()
    say("one engine alone says what is right: half a minute")
    with running([start("alone", model, ENGINE_FLAGS, cores="0", folder=folder)]) as (alone,):
        expected = {
            i: alone.complete(prompt(i), ANSWER_TOKENS, ignore_eos=True, logprobs=None).token_ids
            for i in range(HIGH_CLIENTS)
        }
    say("Ray and two engines: about a minute")
    cluster = RayCluster({"VLLM_CPU_KVCACHE_SPACE": "1"})
    stack.callback(cluster.stop)
    cluster.start_head()
    cluster.add("node", 8)
    cluster.deploy(configuration(model, cluster.http_port))
    cluster.wait_until_running()
    process: Any = None
    server = Engine("ingress", cluster.url, model.name, process, Path())
    clients = Clients(server, expected)
    timeline: list[tuple[float, int, int]] = []
    began_at = time.monotonic()
    try:
        _watch(cluster, clients, timeline, began_at, LOW_CLIENTS, LOW_S)
        _watch(cluster, clients, timeline, began_at, HIGH_CLIENTS, high_s, number=2)
        _watch(cluster, clients, timeline, began_at, LOW_CLIENTS, SETTLE_S, number=1, then_end=True)
    finally:
        clients.close()
    return summary(timeline, clients)


def _watch(
    cluster: RayCluster,
    clients: Clients,
    timeline: list[tuple[float, int, int]],
    began_at: float,
    number_of_clients: int,
    seconds: float,
    number: int | None = None,
    then_end: bool = False,
) -> None:
    """Let clients ask for so long and until there are as many decode engines; note both."""
    clients.set(number_of_clients)
    say(f"{number_of_clients} clients")
    phase_at = time.monotonic()

    def is_over() -> bool:
        now = time.monotonic()
        if not cluster.application():
            return False
        there = len(cluster.replicas("DecodeEngine"))
        timeline.append((round(now - began_at, 1), number_of_clients, there))
        reached = number is None or there == number
        time.sleep(0.9)
        return reached and (then_end or now - phase_at >= seconds)

    wait_until(is_over, seconds + SETTLE_S, f"{number} decode engines")


def configuration(model: Path, port: int) -> dict[str, Any]:
    args = {
        "model": str(model),
        "served_model_name": model.name,
        "engine_args": {"dtype": "float32", "enforce-eager": True, "max-model-len": 4096},
        "prefill": {"replicas": 1},
        "decode": {
            "engine_args": {"max-num-seqs": MAX_RUNNING},
            "autoscaling": {
                "min_replicas": 1,
                "max_replicas": 2,
                "upscale_delay_s": 2,
                "downscale_delay_s": DOWNSCALE_DELAY_S,
            },
        },
        "routing": {"local_below": 0},
    }
    application = {
        "name": "default",
        "import_path": "vllm_pd_plugin.ray_serve:app",
        "route_prefix": "/",
        "args": args,
    }
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [application],
    }


def summary(timeline: list[tuple[float, int, int]], clients: Clients) -> Row:
    numbers = [there for _, _, there in timeline]
    steps = [n for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1]]
    high = next(at for at, asking, _ in timeline if asking == HIGH_CLIENTS)
    up = next((at for at, _, there in timeline if there == 2), None)
    low = next(at for at, asking, _ in timeline if asking == LOW_CLIENTS and at > high)
    down = next((at for at, _, there in timeline if at > low and there == 1), None)
    return {
        "part": "real",
        "arm": "autoscaling",
        "requests": clients.answers + clients.lost,
        "lost": clients.lost,
        "steps": steps,
        "up_s": up - high if up is not None else None,
        "down_s": down - low if down is not None else None,
        "timeline": timeline,
    }
