"""What ``vllm-pd engines`` and ``vllm-pd top`` show, and ask of a frontend."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from vllm_pd_plugin import cli
from vllm_pd_plugin.frontend import console

ENGINE = {
    "url": "http://127.0.0.1:8200",
    "role": "decode",
    "state": "up",
    "problem": "",
    "running": 3,
    "waiting": 1,
    "waiting_tokens": 700,
    "kv_usage": 0.25,
    "legs": 4,
    "prefill_tokens_per_s": 1234.5,
    "tokens_given": 100,
}
POOL: dict[str, Any] = {"requests_open": 4, "requests_waiting": 0, "engines": [ENGINE]}


class Frontend:
    """An admin API that notes what it is asked. status: what it answers with."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any, str | None]] = []
        self.status = 200
        frontend = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                key = self.headers.get("Authorization")
                frontend.asked.append((self.command, self.path, body, key))
                self.send_response(frontend.status)
                self.end_headers()
                self.wfile.write(json.dumps(POOL).encode())

            do_POST = do_DELETE = do_GET  # noqa: N815

            def log_message(self, *args: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def frontend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Frontend]:
    monkeypatch.delenv("VLLM_PD_ADMIN_KEY", raising=False)
    frontend = Frontend()
    yield frontend
    frontend.close()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["add", "http://d:1", "--role", "decode"],
         ("POST", "/pd/v1/engines", {"url": "http://d:1", "role": "decode"})),
        (["drain", "http://d:1", "--timeout", "5"],
         ("POST", "/pd/v1/engines/drain", {"url": "http://d:1", "timeout_s": 5.0})),
        (["remove", "http://d:1"], ("DELETE", "/pd/v1/engines?url=http%3A%2F%2Fd%3A1", None)),
        (["list"], ("GET", "/pd/v1/pool", None)),
    ],
)  # fmt: skip
def test_each_command_asks_for_one_thing(
    frontend: Frontend, words: list[str], expected: tuple[str, str, Any]
) -> None:
    assert cli.main(["engines", *words, "--frontend", frontend.url]) == 0
    assert frontend.asked == [(*expected, None)]


def test_the_key_goes_along(frontend: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PD_ADMIN_KEY", "secret")
    cli.main(["engines", "list", "--frontend", frontend.url])
    assert frontend.asked[0][3] == "Bearer secret"


def test_the_list_names_every_engine_in_full_where_it_is_piped(
    frontend: Frontend, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["engines", "list", "--frontend", frontend.url])
    shown = capsys.readouterr().out
    for text in (ENGINE["url"], "decode", "up", "25%", "700", "1234", "4 requests under way"):
        assert str(text) in shown


def test_a_refusal_is_an_error(frontend: Frontend, capsys: pytest.CaptureFixture[str]) -> None:
    frontend.status = 404
    assert cli.main(["engines", "remove", "http://d:1", "--frontend", frontend.url]) == 1
    assert "refuses (404)" in capsys.readouterr().err


def test_no_frontend_is_an_error_that_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--once", "--frontend", "http://127.0.0.1:1"]) == 1
    assert "say where with --frontend" in capsys.readouterr().err


def test_rates_are_what_came_between_two_looks() -> None:
    later = {"engines": [ENGINE | {"tokens_given": 160}, ENGINE | {"url": "new"}]}
    assert console.rates(POOL, later, 2.0) == {ENGINE["url"]: 30.0}
    restarted = {"engines": [ENGINE | {"tokens_given": 5}]}
    assert console.rates(POOL, restarted, 2.0) == {ENGINE["url"]: 0.0}


def test_top_looks_again_until_it_is_interrupted(frontend: Frontend) -> None:
    looks = iter([0.0, 1.0, 2.0, 3.0])

    def sleep(_: float) -> None:
        if len(frontend.asked) == 3:
            raise KeyboardInterrupt

    arguments = ["--frontend", frontend.url]
    assert console.top(arguments, sleep, lambda: next(looks)) == 0
    assert len(frontend.asked) == 3
