"""The pool changes, is empty, is shared or is too full."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.engine import Engine, running
from tests.engines.conftest import random_prompt
from tests.engines.frontend_failures.cluster import (
    Cluster,
    stream,
    wait_until,
)
from tests.http_client import HTTP

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def engines(frontend: Engine, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("vllm-pd")), "engines", *words]
    return subprocess.run(
        [*command, "--frontend", frontend.url], capture_output=True, text=True, timeout=60
    )


def test_engines_come_and_go_while_streams_run(cluster: Cluster) -> None:
    prompt = random_prompt(300, 7)
    expected = cluster.alone.tokens(prompt, 300)
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


def doctor(*words: str, **environ: str) -> tuple[int, list[str]]:
    """Return the status of ``vllm-pd doctor``, and what it finds."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("vllm-pd")), "doctor", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environ},
    )
    assert "Traceback" not in done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "FAIL "))]
    return done.returncode, found


def test_doctor_hands_kv_over_between_two_engines(cluster: Cluster) -> None:
    prefill, decode = (cluster.urls[name] for name in ("prefill-0", "decode-0"))
    for _ in range(2):  # a prompt that is in no cache, each time
        status, found = doctor(prefill, decode)
        assert status == 0, found
        assert len(found) == 9
        moved = r"513 of 513 prompt tokens came from P: \d+\.\d [MK]iB in \d+ reads, raw$"
        assert re.search(moved, found[7])
        assert "all 8 are those of D by itself" in found[8]
    for name in ("prefill-0", "decode-0"):
        cluster.engine(name).wait_until_at_rest()


def test_doctor_names_what_is_wrong(cluster: Cluster) -> None:
    prefill, decode = (cluster.urls[name] for name in ("prefill-0", "decode-0"))
    status, found = doctor(decode, prefill)
    assert status == 1
    assert "P: it is named as prefill, and was started with --kv-role decode" in found[-1]
    status, found = doctor(prefill, decode, VLLM_PD_CLUSTER_KEY="another key than none")
    assert status == 1
    assert "is VLLM_PD_CLUSTER_KEY the same there and here?" in found[-1]
    status, found = doctor("http://127.0.0.1:1", decode)
    assert status == 1
    assert "nothing listens there" in found[0]


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
        assert HTTP.get(f"{other.url}/pd/v1/pool").status_code == 401
        key = {"Authorization": "Bearer secret"}
        url = cluster.urls["decode-0"]
        drain = {"url": url, "timeout_s": 0}
        HTTP.post(f"{other.url}/pd/v1/engines/drain", json=drain, headers=key).raise_for_status()
        started = time.monotonic()
        answer = HTTP.post(f"{other.url}/v1/completions", json=other.body("A", 2), timeout=30)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert time.monotonic() - started < 10
        assert HTTP.get(f"{other.url}/health").status_code == 503
        add = {"url": url, "role": "decode"}
        HTTP.post(f"{other.url}/pd/v1/engines", json=add, headers=key).raise_for_status()
        assert other.complete("A", 2).finish_reason == "length"
        body, short = other.body("A", 2000), {"X-Request-Timeout": "0.5"}
        late = HTTP.post(f"{other.url}/v1/completions", json=body, headers=short, timeout=30)
        assert late.status_code == 504


def test_workers_share_a_port_and_what_they_know_of_the_engines(cluster: Cluster) -> None:
    other = cluster.serve("--workers", "2", "--queue-timeout", "1")
    url = cluster.urls["decode-0"]

    def states() -> set[str]:
        """Ask often enough that both workers have answered."""
        pools = [HTTP.get(f"{other.url}/pd/v1/pool", timeout=10).json() for _ in range(16)]
        return {e["state"] for pool in pools for e in pool["engines"] if e["url"] == url}

    with running([other]):
        workers = psutil.Process(other.process.pid).children()
        assert len(workers) == 2
        wait_until(lambda: states() == {"up"})
        prompt = random_prompt(300, 8)
        expected = cluster.alone.tokens(prompt, 20)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: stream(other, prompt, 20), range(16)))
        assert answers == [expected] * 16
        answered = 'pd_frontend_requests_total{outcome="answered",slo_class="default"}'
        assert other.metrics()[answered] == 16
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
        HTTP.post(f"{other.url}/v1/completions", json=body, headers=parent).raise_for_status()
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
        answer = HTTP.post(f"{other.url}/v1/completions", json=body, timeout=60)
        return answer.status_code, answer.headers.get("retry-after")

    with running([other]), ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert {(200, None), (503, "1")} == set(answers)
