"""What ``vllm-pd engines`` and ``vllm-pd top`` show, and ask of a frontend."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from vllm_pd_plugin import cli
from vllm_pd_plugin.frontend import console
from vllm_pd_plugin.frontend.admin_keys import AdminKey, published

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
        self.location = ""
        frontend = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                key = self.headers.get("Authorization")
                frontend.asked.append((self.command, self.path, body, key))
                self.send_response(frontend.status)
                if frontend.location:
                    self.send_header("Location", frontend.location)
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
def frontend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Frontend]:
    monkeypatch.delenv("VLLM_PD_ADMIN_KEY", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
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


def test_the_key_of_a_file_goes_along(
    frontend: Frontend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("secret\n")
    monkeypatch.setenv("VLLM_PD_ADMIN_KEY_FILE", str(tmp_path / "key"))
    cli.main(["engines", "list", "--frontend", frontend.url])
    assert frontend.asked[0][3] == "Bearer secret"


@pytest.mark.parametrize("host", ["http://127.0.0.1", "http://localhost", "127.0.0.1"])
def test_the_key_that_a_frontend_here_has_made_is_found(frontend: Frontend, host: str) -> None:
    port = urlsplit(frontend.url).port
    assert port is not None
    with published(AdminKey("made", is_made=True), port, os.environ):
        assert cli.main(["engines", "list", "--frontend", f"{host}:{port}"]) == 0
    assert frontend.asked[0][3] == "Bearer made"


def test_a_key_that_was_made_here_goes_to_no_other_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("VLLM_PD_ADMIN_KEY", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with published(AdminKey("made", is_made=True), 8000, os.environ):
        assert console._key_for("http://127.0.0.1:8000") == "made"
        assert console._key_for("http://10.0.0.1:8000") is None
        assert console._key_for("http://frontend.example:8000") is None


def test_the_key_is_sent_to_no_proxy(frontend: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Frontend()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_PD_ADMIN_KEY", "secret")
    assert cli.main(["engines", "list", "--frontend", frontend.url]) == 0
    proxy.close()
    assert proxy.asked == []
    assert len(frontend.asked) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_is_sent_to_nobody_that_a_frontend_points_to(
    frontend: Frontend,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: int,
) -> None:
    other = Frontend()
    frontend.status, frontend.location = status, f"{other.url}/pd/v1/pool"
    monkeypatch.setenv("VLLM_PD_ADMIN_KEY", "secret")
    assert cli.main(["engines", "list", "--frontend", frontend.url]) == 1
    other.close()
    assert other.asked == []
    assert (
        f"it redirects to {other.url}/pd/v1/pool, which is not followed" in capsys.readouterr().err
    )


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:x", "", "ftp://127.0.0.1"])
def test_what_is_no_address_is_an_error_of_one_line(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["engines", "list", "--frontend", url]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--frontend" in line


def test_the_list_names_every_engine_in_full_where_it_is_piped(
    frontend: Frontend, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["engines", "list", "--frontend", frontend.url])
    shown = capsys.readouterr().out
    for text in (ENGINE["url"], "decode", "up", "25%", "700", "1234", "4 requests under way"):
        assert str(text) in shown


def test_addresses_and_problems_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    url, problem = "http://[d8::1]:8000", "[/x] said :smile: and [red]no"
    engine = {**ENGINE, "url": url, "problem": problem}
    console._print(console.table_of({**POOL, "engines": [engine]}, {}))
    shown = capsys.readouterr().out
    assert url in shown
    assert f"up: {problem}" in shown


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
