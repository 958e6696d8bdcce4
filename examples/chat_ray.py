"""A chat over one prefill and one decode engine on Ray Serve, with the OpenAI client.

    python examples/chat_ray.py MODEL
    python examples/chat_ray.py MODEL --question "Why is the sky blue?" -- engine_args.dtype=float32

Starts Ray on this machine, deploys with `serve run`, asks a question through Serve's ingress, asks
the decode engine alone the same, prints `serve status`, and stops everything. What follows `--`
goes to `serve run`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from chat import QUESTION, START_TIMEOUT_S, ask, free_port, metric

BIN = Path(sys.executable).parent
APP = "vllm_pd_plugin.ray_serve:app"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or name of a chat model")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("options", nargs="*", help="for `serve run`, after --")
    args = parser.parse_args()
    key = secrets.token_hex(16)
    environ = {**os.environ, "VLLM_PD_ADMIN_KEY": key, "RAY_USAGE_STATS_ENABLED": "0"}
    with running_ray(environ), running_app(args.model, args.options, environ) as frontend:
        engines = wait_for_engines(frontend, key)
        print(f"\nuser:       {args.question}\nassistant:  ", end="", flush=True)
        started = time.monotonic()
        words = []
        for word in ask(frontend, args.question, args.max_tokens):
            if not words:
                first_token_ms = 1000 * (time.monotonic() - started)
            words.append(word)
            print(word, end="", flush=True)
        answer = "".join(words)
        alone = "".join(ask(engines["decode"], args.question, args.max_tokens))
        moved = metric(engines["decode"], "pd_fetch_kv_bytes_total")
        print(f"\n\nfirst token after {first_token_ms:.0f} ms")
        print(f"KV handed off: {moved / 1e6:.1f} MB")
        print("one engine alone says the same" if answer == alone else f"one engine: {alone}")
        print("\nserve status:", flush=True)
        subprocess.run([BIN / "serve", "status"], env=environ, check=True)
    return 0 if answer == alone and moved else 1


@contextlib.contextmanager
def running_ray(environ: dict[str, str]) -> Iterator[None]:
    """Run a Ray of this program's own, beside any other; `ray stop` would stop them all."""
    folder = Path(tempfile.mkdtemp(prefix="pd-ray-", dir="/tmp"))
    port, dashboard = free_port(), free_port()
    environ["RAY_ADDRESS"] = f"127.0.0.1:{port}"
    environ["RAY_DASHBOARD_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    command = [
        BIN / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=4",
        f"--temp-dir={folder}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}",
        f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    print(f"starting Ray, logs in {folder}", flush=True)
    with (folder / "ray.log").open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environ, process_group=0
        )
    try:
        wait_for(process, lambda: get(f"http://127.0.0.1:{dashboard}/api/version"), "Ray")
        yield
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
        print("stopped")


@contextlib.contextmanager
def running_app(model: str, options: list[str], environ: dict[str, str]) -> Iterator[str]:
    """Deploy with `serve run`; gives the ingress's address."""
    port = free_port()
    # `serve run` takes the port from Serve when that runs already.
    subprocess.run(
        [BIN / "serve", "start", "--http-host=127.0.0.1", f"--http-port={port}"],
        env=environ, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    # local_below=0: also a short prompt is handed off.
    command = [BIN / "serve", "run", APP, f"model={model}", "prefill=1", "decode=1",
               "routing.local_below=0", *options]  # fmt: skip
    print(f"deploying: {' '.join(map(str, command))}", flush=True)
    log = Path(tempfile.mkstemp(prefix="serve-run-", suffix=".log")[1])
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environ)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(process, lambda: get(f"{url}/health"), "the application")
        yield url
    except BaseException:
        print(log.read_text(errors="replace")[-6000:], file=sys.stderr)
        raise
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def wait_for(process: subprocess.Popen[bytes], probe: Callable[[], object], name: str) -> None:
    """Wait until something answers; ``probe`` raises OSError as long as it does not."""
    started = time.monotonic()
    while process.poll() is None and time.monotonic() - started < START_TIMEOUT_S:
        with contextlib.suppress(OSError):
            probe()
            print(f"\n{name} is ready after {time.monotonic() - started:.0f} s", flush=True)
            return
        print(f"\rwaiting for {name}: {time.monotonic() - started:.0f} s", end="", flush=True)
        time.sleep(1)
    raise SystemExit(f"{name} did not start")


def wait_for_engines(frontend: str, key: str) -> dict[str, str]:
    """Wait for an engine of each role, and return where they are."""
    request = urllib.request.Request(
        f"{frontend}/pd/v1/pool", headers={"Authorization": f"Bearer {key}"}
    )
    while True:
        with urllib.request.urlopen(request, timeout=10) as answer:
            engines = json.load(answer)["engines"]
        roles = {engine["role"]: engine["url"] for engine in engines if engine["state"] == "up"}
        if len(roles) == 2:
            return roles
        time.sleep(0.5)


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:
        content: bytes = answer.read()
    return content


if __name__ == "__main__":
    sys.exit(main())
