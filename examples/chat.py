"""A chat over one prefill and one decode engine, with `vllm-pd up` and the OpenAI client.

    python examples/chat.py MODEL
    python examples/chat.py MODEL --question "Why is the sky blue?" -- --max-model-len 8192

Starts two engines and a frontend on this machine, asks a question, asks the decode engine alone the
same, and stops everything. What follows `--` goes to `vllm-pd up`.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI

START_TIMEOUT_S = 600
QUESTION = "What is the capital of France, and which river flows through it?"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or name of a chat model")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("options", nargs="*", help="for `vllm-pd up`, after --")
    args = parser.parse_args()
    with running_pool(args.model, args.options) as (frontend, log):
        print(f"\nuser:       {args.question}\nassistant:  ", end="", flush=True)
        started = time.monotonic()
        words = []
        for word in ask(frontend, args.question, args.max_tokens):
            if not words:
                first_token_ms = 1000 * (time.monotonic() - started)
            words.append(word)
            print(word, end="", flush=True)
        answer = "".join(words)
        decode = engine_url(log, "decode-0")
        alone = "".join(ask(decode, args.question, args.max_tokens))
        moved = metric(decode, "pd_fetch_kv_bytes_total")
        print(f"\n\nfirst token after {first_token_ms:.0f} ms")
        print(f"KV handed off: {moved / 1e6:.1f} MB")
        print("one engine alone says the same" if answer == alone else f"one engine: {alone}")
    return 0 if answer == alone and moved else 1


@contextlib.contextmanager
def running_pool(model: str, options: list[str]) -> Iterator[tuple[str, Path]]:
    """Run `vllm-pd up`; gives the frontend's address and its log."""
    port = free_port()
    log = Path(tempfile.mkstemp(prefix="vllm-pd-up-", suffix=".log")[1])
    # 0: also a short prompt is handed off.
    command = [
        str(Path(sys.executable).with_name("vllm-pd")), "up", model,
        "--port", str(port), "--local-below", "0", *options,
    ]  # fmt: skip
    print(f"starting: {' '.join(command)}\nlog: {log}")
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}", log
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        print("stopped")


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    started = time.monotonic()
    while process.poll() is None and time.monotonic() - started < START_TIMEOUT_S:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            print(f"ready after {time.monotonic() - started:.0f} s")
            return
        print(f"\rwaiting for the engines: {time.monotonic() - started:.0f} s", end="", flush=True)
        time.sleep(1)
    print("\n".join(log.read_text(errors="replace").splitlines()[-20:]), file=sys.stderr)
    raise SystemExit("the engines did not start")


def ask(url: str, question: str, max_tokens: int) -> Iterator[str]:
    """Ask a server, and give its answer as it comes."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


def engine_url(log: Path, name: str) -> str:
    """Find in the log of `vllm-pd up` where one of its engines listens."""
    found = re.search(rf"starting {name} at (\S+),", log.read_text())
    assert found is not None
    return found[1]


def metric(url: str, name: str) -> float:
    """Return a counter of a server; what is counted shows up with the next step of its engine."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


if __name__ == "__main__":
    sys.exit(main())
