"""``vllm-pd engines`` and ``vllm-pd top``: a frontend's pool, seen and changed from a terminal."""

from __future__ import annotations

import argparse
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, urlsplit

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vllm_pd_plugin.config import ADMIN_KEY_VARIABLE, FILE_SUFFIX, read_secret
from vllm_pd_plugin.errors import PdError
from vllm_pd_plugin.frontend import admin_keys
from vllm_pd_plugin.frontend.option_words import seconds, some_seconds
from vllm_pd_plugin.net.hosts import is_loopback

_DEFAULT_FRONTEND = "http://127.0.0.1:8000"
_TIMEOUT_S = 10.0
_PIPE_WIDTH = 160
_STATE_STYLES = {"up": "green", "down": "red", "draining": "yellow", "broken": "red"}

_ENGINES = f"""See and change the engines of a running frontend.

The admin key is that of {ADMIN_KEY_VARIABLE}, or in the file that
{ADMIN_KEY_VARIABLE}{FILE_SUFFIX} names. Of a frontend of yours on this machine it is found without.

examples:
  vllm-pd engines list
  vllm-pd engines add --role decode http://10.0.0.7:8000
  vllm-pd engines drain http://10.0.0.7:8000 --timeout 120
  vllm-pd engines remove http://10.0.0.7:8000
  vllm-pd engines list --frontend http://10.0.0.1:8000
"""
_TOP = """A live table of a frontend's engines and requests; Ctrl-C ends it.

examples:
  vllm-pd top
  vllm-pd top --frontend http://10.0.0.1:8000 --interval 2
"""


class AdminError(PdError):
    """A frontend does not do what is asked; the message says why."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer: the key is for the frontend that was named."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)
"""Goes to the frontend itself: a proxy would see the key, and cannot reach loopback."""


def call(frontend: str, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """Call a frontend's admin API. Raises AdminError, or ConfigError for a key that is none."""
    frontend = frontend.rstrip("/") if "://" in frontend else f"http://{frontend.rstrip('/')}"
    headers = {"Content-Type": "application/json"}
    if key := _key_for(frontend):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(f"{frontend}/pd/v1{path}", data, headers, method=method)
        with _OPENER.open(request, timeout=_TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            text = error.read().decode(errors="replace")
        if 300 <= error.code < 400:
            text = f"it redirects to {error.headers.get('Location')}, which is not followed"
        raise AdminError(f"{frontend} refuses ({error.code}): {text}") from error
    except (OSError, ValueError, HTTPException) as error:
        raise AdminError(
            f"no frontend answers at {frontend}: {error}; say where with --frontend"
        ) from error


def _key_for(frontend: str) -> str | None:
    """Return the key to send: that of the environment, or what a frontend here has left."""
    if key := read_secret(os.environ, ADMIN_KEY_VARIABLE):
        return key
    try:
        parts = urlsplit(frontend)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return None  # no address, which is said when it is called
    return admin_keys.find(port, os.environ) if is_loopback(parts.hostname or "") else None


def engines(arguments: Sequence[str]) -> int:
    """Run ``vllm-pd engines``; returns the exit status."""
    parser = _parser("engines", _ENGINES)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--frontend", default=_DEFAULT_FRONTEND, metavar="URL")
    commands.add_parser("list", parents=[common], help="show every engine")
    add = commands.add_parser("add", parents=[common], help="take an engine into the pool")
    add.add_argument("url")
    add.add_argument("--role", choices=["prefill", "decode", "both"], required=True)
    drain = commands.add_parser(
        "drain", parents=[common], help="give an engine nothing new, until `add` names it again"
    )
    drain.add_argument("url")
    drain.add_argument(
        "--timeout",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="what is left on it after so long goes on elsewhere (default: %(default)s)",
    )
    remove = commands.add_parser(
        "remove", parents=[common], help="take an engine out; what is under way goes on elsewhere"
    )
    remove.add_argument("url")
    args = parser.parse_args(list(arguments))
    match args.command:
        case "list":
            _print(table_of(_pool(args.frontend), {}))
        case "add":
            call(args.frontend, "POST", "/engines", {"url": args.url, "role": args.role})
        case "drain":
            body = {"url": args.url, "timeout_s": args.timeout}
            call(args.frontend, "POST", "/engines/drain", body)
        case "remove":
            call(args.frontend, "DELETE", f"/engines?url={quote(args.url, safe='')}")
    return 0


def top(
    arguments: Sequence[str],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run ``vllm-pd top``; returns the exit status."""
    parser = _parser("top", _TOP)
    parser.add_argument("--frontend", default=_DEFAULT_FRONTEND, metavar="URL")
    parser.add_argument("--interval", type=some_seconds, default=1.0, metavar="SECONDS")
    parser.add_argument("--once", action="store_true", help="print one table and end")
    args = parser.parse_args(list(arguments))
    pool, then = _pool(args.frontend), clock()
    if args.once:
        _print(table_of(pool, {}))
        return 0
    try:
        with Live(table_of(pool, {}), auto_refresh=False) as live:
            while True:
                sleep(args.interval)
                before, pool = pool, _pool(args.frontend)
                now = clock()
                live.update(table_of(pool, rates(before, pool, now - then)), refresh=True)
                then = now
    except KeyboardInterrupt:
        return 0


def _pool(frontend: str) -> Mapping[str, Any]:
    """Ask for the pool. Raises AdminError, see ``call``, and where something else answers."""
    pool = call(frontend, "GET", "/pool")
    if not isinstance(pool, dict) or not isinstance(pool.get("engines"), list):
        raise AdminError(f"{frontend} is no frontend of vllm-pd; say where with --frontend")
    return pool


def rates(before: Mapping[str, Any], after: Mapping[str, Any], past_s: float) -> dict[str, float]:
    """Return how many tokens a second each engine has given out between two looks."""
    counts = {engine["url"]: engine["tokens_given"] for engine in before["engines"]}
    return {
        engine["url"]: max(0, engine["tokens_given"] - counts[engine["url"]]) / past_s
        for engine in after["engines"]
        if engine["url"] in counts and past_s > 0
    }


def table_of(pool: Mapping[str, Any], tokens_per_s: Mapping[str, float]) -> Table:
    """Return what is shown of a pool."""
    title = f"{pool['requests_open']} requests under way, {pool['requests_waiting']} waiting"
    table = Table(title=title)
    table.add_column("engine", overflow="fold")
    for name in ("role", "state"):
        table.add_column(name)
    for name in ("running", "waiting", "prompt tokens", "KV", "tokens/s", "prefill tokens/s"):
        table.add_column(name, justify="right")
    for engine in pool["engines"]:
        state, url = engine["state"], engine["url"]
        # Not as Rich's markup: the brackets of an IPv6 address would be a style there.
        shown = Text.assemble((state, _STATE_STYLES[state]))
        if engine["problem"]:
            shown.append(f": {engine['problem']}")
        rate = engine["prefill_tokens_per_s"]
        table.add_row(
            Text(url),
            engine["role"],
            shown,
            str(engine["running"]),
            str(engine["waiting"]),
            str(engine["waiting_tokens"]),
            f"{engine['kv_usage']:.0%}",
            f"{tokens_per_s[url]:.0f}" if url in tokens_per_s else "-",
            f"{rate:.0f}" if rate else "-",
        )
    return table


def _print(table: Table) -> None:
    console = Console()
    Console(width=console.width if console.is_terminal else _PIPE_WIDTH).print(table)


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"vllm-pd {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
