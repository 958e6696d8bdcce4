"""Engines and frontends die; the clients' streams go on, and nothing is left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psutil
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests import models
from tests.engine import Engine, running, start, start_frontend
from tests.engines.conftest import ARGUMENTS, random_prompt
from tests.engines.test_openai import engine_urls

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

NAMES = ("prefill-0", "decode-0", "decode-1")
ARGS = (*ARGUMENTS["tiny-llama"], "--max-num-batched-tokens", "768")


class Cluster:
    """One engine alone, and a pool that one frontend runs and another one uses too."""

    def __init__(self, logs: Path) -> None:
        model = models.tiny_llama()
        self._logs = logs
        self.alone = start("alone", model, ARGS, cores="0", folder=logs)
        pool = ("--prefill", "1", "--decode", "2", "--local-below", "0")
        self.frontend = start_frontend("up", model, (*ARGS, *pool), folder=logs)

    @property
    def urls(self) -> dict[str, str]:
        return engine_urls(self.frontend)

    def engine(self, name: str) -> Engine:
        url = self.urls[name]
        return Engine(name, url, self.frontend.model, self.frontend.process, self.frontend.log)

    def process(self, name: str) -> psutil.Process:
        port = self.urls[name].rsplit(":", 1)[1]
        children = psutil.Process(self.frontend.process.pid).children()
        return next(c for c in children if port in c.cmdline())

    def signal(self, name: str, number: signal.Signals) -> None:
        process = self.process(name)
        for each in (process, *process.children(recursive=True)):
            each.send_signal(number)

    def serve(self, *arguments: str, environ: dict[str, str] | None = None) -> Engine:
        """Start another frontend over the same engines."""
        pool = ("--prefill", self.urls["prefill-0"], "--decode", self.urls["decode-0"])
        limits = ("--max-model-len", "4096", *arguments)
        model = models.tiny_llama()
        return start_frontend("serve", model, (*pool, *limits), folder=self._logs, environ=environ)

    def pool(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.frontend.url}/pd/v1/pool", timeout=10).json()
        return answer

    def tell(self, path: str, **body: Any) -> None:
        """Call the admin API."""
        httpx.post(f"{self.frontend.url}/pd/v1{path}", json=body, timeout=10).raise_for_status()

    def wait_until_whole(self) -> None:
        """Wait until every engine is up again, and holds nothing."""
        wait_until(lambda: all(e["state"] == "up" for e in self.pool()["engines"]), 240)
        for name in NAMES:
            self.engine(name).wait_until_at_rest(60)
        assert self.pool()["requests_open"] == 0

    def working(self) -> str:
        """Return which decode engine works on the one request there is."""
        wait_until(lambda: self._decoding() is not None, 30)
        name = self._decoding()
        assert name is not None
        return name

    def _decoding(self) -> str | None:
        busy = {e["url"] for e in self.pool()["engines"] if e["role"] == "decode" and e["legs"]}
        return next((name for name, url in self.urls.items() if url in busy), None)

    def retries(self) -> float:
        """Return how often a request had to go on elsewhere so far, because its engine was lost."""
        return self.frontend.metrics()['pd_frontend_retries_total{reason="engine_lost"}']


BEGUN_TOKENS = 20


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster(logs: Path) -> Iterator[Cluster]:
    cluster = Cluster(logs)
    with running([cluster.alone, cluster.frontend]):
        yield cluster


@pytest.fixture(autouse=True)
def _whole(cluster: Cluster) -> None:
    cluster.wait_until_whole()


def stream(
    server: Engine,
    prompt: list[int],
    num_tokens: int,
    *,
    begun: threading.Semaphore | None = None,
    timeout_s: float = 120.0,
    **sampling: Any,
) -> list[Any]:
    """Return the tokens of a streamed answer, and its finish reason or error at the end.

    `begun` is released when some tokens have come, so that the decode engine is at work.
    """
    body = server.body(prompt, num_tokens, ignore_eos=True, stream=True, **sampling)
    body.pop("logprobs")
    got: list[Any] = []
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=timeout_s) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            part = json.loads(line.removeprefix("data: "))
            if "error" in part:
                return [*got, part["error"]["message"]]
            choice = part["choices"][0]
            before = len(got)
            got += choice["token_ids"] or []
            if begun and before < BEGUN_TOKENS <= len(got):
                begun.release()
            if choice["finish_reason"]:
                got.append(choice["finish_reason"])
    return got


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalties": {"frequency_penalty": 0.6, "presence_penalty": 0.3},
    "seed": {"temperature": 1.0, "seed": 7},
    "minimum": {"min_tokens": 200},
}


def test_streams_go_on_when_their_decode_engine_dies(cluster: Cluster) -> None:
    """Each as its sampling allows; what was drawn at random with penalties cannot be drawn again,
    and its client is told so."""
    unseeded = {"temperature": 1.0, "presence_penalty": 0.5}
    requests = [(random_prompt(300, 20 + i), each) for i, each in enumerate(SAMPLINGS.values())]
    expected = [stream(cluster.alone, prompt, 600, **sampling) for prompt, sampling in requests]
    requests.append((random_prompt(200, 2), unseeded))
    before = cluster.retries()
    other = cluster.urls["decode-1"]
    cluster.tell("/engines/drain", url=other)
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = [
            pool.submit(stream, cluster.frontend, prompt, 600, begun=begun, **sampling)
            for prompt, sampling in requests
        ]
        assert all(begun.acquire(timeout=60) for _ in requests)
        cluster.tell("/engines", url=other, role="decode")
        cluster.signal("decode-0", signal.SIGKILL)
        *got, refused = [answer.result(120) for answer in answers]
    assert got == expected
    assert 0 < len(refused) < 600
    assert "need a seed" in refused[-1]
    assert cluster.retries() == before + len(SAMPLINGS)


def test_a_stream_goes_on_when_its_decode_engine_hangs(cluster: Cluster) -> None:
    prompt = random_prompt(300, 3)
    expected = stream(cluster.alone, prompt, 600)
    before = cluster.retries()
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stream, cluster.frontend, prompt, 600, begun=begun)
        assert begun.acquire(timeout=60)
        victim = cluster.working()
        cluster.signal(victim, signal.SIGSTOP)
        try:
            assert answer.result(120) == expected
        finally:
            cluster.signal(victim, signal.SIGCONT)
    assert cluster.retries() == before + 1


@pytest.mark.parametrize("delay_s", [0.1, 0.4])
def test_a_prefill_engine_dies_at_any_moment(cluster: Cluster, delay_s: float) -> None:
    prompts = [random_prompt(3900, 40 + i) for i in range(4)]
    expected = [stream(cluster.alone, prompt, 20) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(stream, cluster.frontend, prompt, 20) for prompt in prompts]
        time.sleep(delay_s)
        cluster.signal("prefill-0", signal.SIGKILL)
        assert [answer.result(120) for answer in answers] == expected


def test_an_engine_that_is_told_to_stop_loses_no_stream(cluster: Cluster) -> None:
    prompt = random_prompt(300, 5)
    expected = stream(cluster.alone, prompt, 600)
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stream, cluster.frontend, prompt, 600, begun=begun)
        assert begun.acquire(timeout=60)
        victim = cluster.working()
        cluster.process(victim).terminate()
        assert answer.result(120) == expected


def test_a_storm_of_requests_deaths_and_impatient_clients_loses_and_leaks_nothing(
    cluster: Cluster,
) -> None:
    chooser = Random(6)
    prompts = [random_prompt(chooser.randrange(1, 1500), 100 + i) for i in range(40)]
    expected = [stream(cluster.alone, prompt, 60) for prompt in prompts]

    def leave(prompt: list[int], delay_s: float) -> None:
        body = cluster.frontend.body(prompt, 500)
        with httpx.Client(timeout=httpx.Timeout(delay_s, connect=5)) as client:
            try:
                client.post(f"{cluster.frontend.url}/v1/completions", json=body)
            except httpx.TimeoutException:
                return

    def kill() -> None:
        for name in ("decode-0", "prefill-0"):
            time.sleep(1.0)
            cluster.signal(name, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    with ThreadPoolExecutor(16) as pool:
        killer.start()
        answers = []
        for prompt in prompts:
            answers.append(pool.submit(stream, cluster.frontend, prompt, 60))
            if chooser.random() < 0.4:
                pool.submit(leave, prompt, chooser.random())
        got = [answer.result(200) for answer in answers]
    killer.join()
    assert got == expected
    cluster.wait_until_whole()


def test_a_frontend_that_dies_leaves_nothing_on_the_engines(cluster: Cluster) -> None:
    other = cluster.serve("--local-below", "0")
    with running([other]), ThreadPoolExecutor(4) as pool:
        for i in range(4):
            pool.submit(_ignore_errors, stream, other, random_prompt(500, 60 + i), 3000)
        wait_until(cluster.engine("decode-0").holds_blocks)
        other.kill()
    for name in NAMES:
        cluster.engine(name).wait_until_at_rest(40)


def _ignore_errors(function: Callable[..., Any], *args: Any) -> None:
    try:
        function(*args)
    except httpx.HTTPError:
        return


def engines(frontend: Engine, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("vllm-pd")), "engines", *words]
    return subprocess.run(
        [*command, "--frontend", frontend.url], capture_output=True, text=True, timeout=60
    )


def test_engines_come_and_go_while_streams_run(cluster: Cluster) -> None:
    prompt = random_prompt(300, 7)
    expected = stream(cluster.alone, prompt, 300)
    frontend, urls = cluster.frontend, cluster.urls
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stream, frontend, prompt, 300)
        victim = cluster.working()
        assert engines(frontend, "drain", urls[victim], "--timeout", "0").returncode == 0
        assert answer.result(120) == expected
        listed = engines(frontend, "list")
        assert "draining" in listed.stdout
        assert engines(frontend, "remove", urls[victim]).returncode == 0
        assert victim in urls
        assert urls[victim] not in [engine["url"] for engine in cluster.pool()["engines"]]
        assert stream(frontend, prompt, 300) == expected
    assert engines(frontend, "add", "--role", "decode", urls[victim]).returncode == 0


def test_an_engine_that_does_not_fit_is_not_used_and_says_why(cluster: Cluster) -> None:
    frontend, urls = cluster.frontend, cluster.urls
    assert engines(frontend, "remove", urls["decode-1"]).returncode == 0
    assert engines(frontend, "add", "--role", "prefill", urls["decode-1"]).returncode == 0

    def problem() -> str:
        found = [e for e in cluster.pool()["engines"] if e["url"] == urls["decode-1"]]
        return str(found[0]["problem"])

    wait_until(lambda: "--kv-role decode" in problem())
    assert engines(frontend, "remove", urls["decode-1"]).returncode == 0
    assert engines(frontend, "add", "--role", "decode", urls["decode-1"]).returncode == 0
    assert engines(frontend, "drain", "http://127.0.0.1:1").returncode == 1


def test_without_an_engine_requests_are_turned_away_in_time(cluster: Cluster) -> None:
    environ = {"VLLM_PD_ADMIN_KEY": "secret"}
    other = cluster.serve("--queue-timeout", "1", environ=environ)
    with running([other]):
        assert httpx.get(f"{other.url}/pd/v1/pool").status_code == 401
        key = {"Authorization": "Bearer secret"}
        url = cluster.urls["decode-0"]
        drain = {"url": url, "timeout_s": 0}
        httpx.post(f"{other.url}/pd/v1/engines/drain", json=drain, headers=key).raise_for_status()
        started = time.monotonic()
        answer = httpx.post(f"{other.url}/v1/completions", json=other.body("A", 2), timeout=30)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert time.monotonic() - started < 10
        assert httpx.get(f"{other.url}/health").status_code == 503
        add = {"url": url, "role": "decode"}
        httpx.post(f"{other.url}/pd/v1/engines", json=add, headers=key).raise_for_status()
        assert other.complete("A", 2).finish_reason == "length"
        body, short = other.body("A", 2000), {"X-Request-Timeout": "0.5"}
        late = httpx.post(f"{other.url}/v1/completions", json=body, headers=short, timeout=30)
        assert late.status_code == 504


def test_workers_share_a_port_and_what_they_know_of_the_engines(cluster: Cluster) -> None:
    other = cluster.serve("--workers", "2", "--queue-timeout", "1")
    url = cluster.urls["decode-0"]

    def states() -> set[str]:
        """Ask often enough that both workers have answered."""
        pools = [httpx.get(f"{other.url}/pd/v1/pool", timeout=10).json() for _ in range(16)]
        return {e["state"] for pool in pools for e in pool["engines"] if e["url"] == url}

    with running([other]):
        workers = psutil.Process(other.process.pid).children()
        assert len(workers) == 2
        wait_until(lambda: states() == {"up"})
        prompt = random_prompt(300, 8)
        expected = stream(cluster.alone, prompt, 20)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: stream(other, prompt, 20), range(16)))
        assert answers == [expected] * 16
        assert other.metrics()['pd_frontend_requests_total{slo_class="default"}'] == 16
        assert engines(other, "drain", url, "--timeout", "0").returncode == 0
        wait_until(lambda: states() == {"draining"})
        assert engines(other, "add", "--role", "decode", url).returncode == 0
        wait_until(lambda: states() == {"up"})
        workers[0].kill()
        workers[0].wait(30)  # until then it may be given connections, which end with it
        wait_until(lambda: len(psutil.Process(other.process.pid).children()) == 2, 60)
        other.wait_until_ready()
        assert stream(other, prompt, 20) == expected
    assert other.process.returncode == 0


class Collector:
    """Takes OpenTelemetry spans over HTTP."""

    def __init__(self) -> None:
        self.spans: dict[str, Any] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                export = ExportTraceServiceRequest.FromString(body)
                for resource in export.resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans |= {span.name: span for span in scope.spans}
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_a_request_leaves_a_trace_of_its_way(cluster: Cluster) -> None:
    collector = Collector()
    environ = {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    options = ("--local-below", "0", "--otlp-traces-endpoint", collector.url)
    other = cluster.serve(*options, environ=environ)
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    with running([other]):
        parent = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
        body = other.body(random_prompt(300, 9), 8)
        httpx.post(f"{other.url}/v1/completions", json=body, headers=parent).raise_for_status()
        wanted = {"pd.route", "pd.prefill", "pd.transfer", "pd.first_token", "pd.decode"}
        wait_until(lambda: wanted <= set(collector.spans))
    collector.close()
    assert {collector.spans[name].trace_id.hex() for name in wanted} == {trace_id}
    prefill, decode = collector.spans["pd.prefill"], collector.spans["pd.decode"]
    assert prefill.end_time_unix_nano <= decode.start_time_unix_nano
    attributes = {each.key: each.value.string_value for each in decode.attributes}
    assert attributes["pd.route"] == "disaggregated"
    assert attributes["pd.prefill_engine"] == cluster.urls["prefill-0"]
    assert attributes["pd.decode_engine"] == cluster.urls["decode-0"]


def test_more_requests_than_may_wait_are_turned_away(cluster: Cluster) -> None:
    other = cluster.serve("--max-num-queued-reqs", "2")

    def ask(index: int) -> tuple[int, str | None]:
        body = other.body(random_prompt(100, index), 300)
        answer = httpx.post(f"{other.url}/v1/completions", json=body, timeout=60)
        return answer.status_code, answer.headers.get("retry-after")

    with running([other]), ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert {(200, None), (503, "1")} == set(answers)
