"""Prefill on one vLLM engine, decode on another, and compare with one engine alone.

Starts two servers on this machine, one on each half of its cores, asks the same question both
ways, and stops them. Exit status 0 only if both answers are identical.

    python examples/one_prefill_one_decode.py MODEL [--question TEXT]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

START_TIMEOUT_S = 240


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model folder or name, as for `vllm serve`")
    parser.add_argument("--question", default="What is the capital of France?")
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as stack:
            prefill, decode = start_pair(args.model, Path(logs), stack)
            return ask_both_ways(prefill, decode, args.question, args.max_tokens)
    except KeyboardInterrupt:
        print("\ninterrupted; both engines are stopped")
        return 130


def start_pair(model: str, logs: Path, stack: contextlib.ExitStack) -> tuple[str, str]:
    """Start a prefill and a decode engine; return their URLs once both are ready."""
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    print(f"starting a prefill engine on cores {cores[:half]}, a decode engine on {cores[-half:]}")
    engines = [
        stack.enter_context(engine(model, role, own, logs / f"{role}.log"))
        for role, own in (("prefill", cores[:half]), ("decode", cores[-half:]))
    ]
    started = time.monotonic()
    while True:
        ready = [is_ready(url) for url, _ in engines]
        if sys.stdout.isatty():
            waited = time.monotonic() - started
            print(f"\r  {sum(ready)} of 2 ready after {waited:3.0f} s", end="", flush=True)
        for (_, process), role in zip(engines, ("prefill", "decode"), strict=True):
            if process.poll() is not None or time.monotonic() - started > START_TIMEOUT_S:
                log = (logs / f"{role}.log").read_text(errors="replace")
                sys.exit(f"\nthe {role} engine did not start:\n{log[-3000:]}")
        if all(ready):
            print(f"\r  both ready after {time.monotonic() - started:.0f} s      ")
            return engines[0][0], engines[1][0]
        time.sleep(0.5)


@contextlib.contextmanager
def engine(
    model: str, role: str, cores: list[int], log: Path
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run `vllm serve MODEL --kv-connector pdplugin --kv-role ROLE` until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", model,
        "--kv-connector", "pdplugin", "--kv-role", role,
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo",
        "--dtype", "float32", "--max-model-len", "2048", "--enforce-eager",
        # The engine that answers alone must not profit from what it has seen before.
        "--no-enable-prefix-caching",
    ]  # fmt: skip
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **settings},
            process_group=0,
        )
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def ask_both_ways(prefill: str, decode: str, question: str, max_tokens: int) -> int:
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    hand_off(prefill, decode, {**body, "messages": [{"role": "user", "content": "Hello"}]})
    before = read_metrics(decode)
    print(f"question: {question}")
    both = hand_off(prefill, decode, body, "prefill on one, decode on the other")
    after = read_metrics(decode)
    alone = stream_answer("one engine alone", prefill, body)
    moved = {name: after[name] - before.get(name, 0.0) for name in after}
    print(
        f"moved: {moved['pd_fetch_bytes_total']:,.0f} bytes of KV in "
        f"{1000 * moved['pd_fetch_seconds_sum']:.1f} ms, "
        f"{moved['pd_fetch_descriptors_total']:.0f} descriptors"
    )
    print(f"identical: {'yes' if both == alone else 'no'}")
    return 0 if both == alone else 1


def hand_off(prefill: str, decode: str, body: dict[str, Any], title: str = "") -> str:
    """Do what a router does: one token from the prefill engine, the answer from the other."""
    started = time.monotonic()
    first = {**body, "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
    where = post(prefill, first)["kv_transfer_params"]
    return stream_answer(title, decode, {**body, "kv_transfer_params": where}, started)


def stream_answer(title: str, url: str, body: dict[str, Any], started: float | None = None) -> str:
    """Print an answer as it comes (unless the title is empty), and return it."""
    started = started or time.monotonic()
    show = bool(title)
    first_after = 0.0
    text = ""
    if show:
        print(f"{title}: ", end="", flush=True)
    request = {**body, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=request, timeout=120) as answer:
        if answer.status_code != 200:
            sys.exit(f"{url} answered {answer.status_code}: {answer.read().decode()}")
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line[len("data: ") :])["choices"]:
                piece = choice["delta"].get("content") or ""
                if piece and not text:
                    first_after = time.monotonic() - started
                text += piece
                if show:
                    print(piece, end="", flush=True)
    if show:
        took = time.monotonic() - started
        print(f"   [first token after {1000 * first_after:.0f} ms, all after {1000 * took:.0f} ms]")
    return text


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    if answer.status_code != 200:
        sys.exit(f"{url} answered {answer.status_code}: {answer.text}")
    result: dict[str, Any] = answer.json()
    return result


def read_metrics(url: str) -> dict[str, float]:
    """Return the totals of the connector's own metrics."""
    pattern = re.compile(r"^(pd_fetch_\w+?_(?:total|sum))\{.*\} (\S+)$", re.MULTILINE)
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return {name: float(value) for name, value in pattern.findall(text)}


if __name__ == "__main__":
    sys.exit(main())
