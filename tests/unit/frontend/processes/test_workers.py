"""Several frontend processes on one port: what each is given, and when all are up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from vllm_pd_plugin.frontend.admin_keys import find

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.options import add_engine_options, parse_options
    from vllm_pd_plugin.frontend.parsing import make_parser
    from vllm_pd_plugin.frontend.processes.workers import _READY, run_workers, say_ready

WORKER = """
import json, os, pathlib, stat, sys, time
folder = pathlib.Path(os.environ["VLLM_PD_ENGINES_FILE"]).parent
noted = {
    "admin": os.environ["VLLM_PD_ADMIN_KEY"],
    "words": sys.argv[1:-1],
    "api": pathlib.Path(sys.argv[-1]).read_text(),
    "mode": stat.S_IMODE(folder.stat().st_mode),
    "worker": os.environ["VLLM_PD_WORKER"],
}
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps(noted) + "\\n")
(folder / f"READY{os.getpid()}").touch()
while not os.path.exists(os.environ["GO"]):
    time.sleep(0.05)
"""


@pytest.mark.parametrize("host", ["::", "127.0.0.1"])
def test_workers_are_given_their_keys_and_kept_up_whatever_they_listen_on(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_PD_ADMIN_KEY", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    notes, go = tmp_path / "notes", tmp_path / "go"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    parser, _ = make_parser("this", "", "", add_engine_options)
    words = ["M", "--host", host, "--port", str(port), "--workers", "2", "--api-key", "K", "L"]
    args = parser.parse_args([*words, "--decode", "http://127.0.0.1:1"])
    options = parse_options(args, [], os.environ)
    code = WORKER.replace("READY", _READY)

    def noted() -> list[dict[str, Any]]:
        return list(map(json.loads, notes.read_text().splitlines())) if notes.exists() else []

    async def until(number: int) -> None:
        async with asyncio.timeout(60):
            while len(noted()) < number:
                await asyncio.sleep(0.05)

    async def run() -> None:
        environ = {"NOTES": str(notes), "GO": str(go)}
        command = [sys.executable, "-c", code, "words"]
        task = asyncio.create_task(run_workers(args, options, (), command, environ))
        await until(2)
        assert find(port, os.environ) == options.admin_key.text
        await asyncio.sleep(1)  # it looks four times a second
        go.touch()  # they end, and are started again: all were up
        await until(4)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(task, 30)

    asyncio.run(run())
    for each in noted():
        assert each["admin"] == options.admin_key.text
        assert each["words"] == ["words", "--config"]
        assert json.loads(each["api"]) == {"api-key": ["K", "L"]}
        assert each["mode"] & (stat.S_IRWXG | stat.S_IRWXO) == 0
    places = [each["worker"] for each in noted()]
    assert sorted(places[:2]) == sorted(places[2:]) == ["0/2", "1/2"]
    assert find(port, os.environ) is None


def test_a_worker_says_that_it_serves_in_the_folder_of_the_engines(tmp_path: Path) -> None:
    say_ready(tmp_path / "engines.json")
    assert [path.name for path in tmp_path.iterdir()] == [f"{_READY}{os.getpid()}"]
