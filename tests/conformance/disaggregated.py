"""Run vLLM's two scripts for pairs of engines, unchanged, on engines of ours.

python -m tests.conformance.disaggregated --json FILE

`test_edge_cases.py` and `test_disagg_accuracy.py` want servers that run: one prefill engine, one
decode engine, and something before them. That is our frontend, and then vLLM's own toy proxy, which
speaks `kv_transfer_params` to the engines.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.common import output
from tests import models
from tests.conformance import source
from tests.conformance.__main__ import PAGE, WORK
from tests.engine import (
    Engine,
    EngineError,
    connector_arguments,
    free_port,
    running,
    say,
    spawn,
    start,
    start_frontend,
)

_FOLDER = "tests/v1/kv_connector/nixl_integration"
FRONTEND, PROXY = "`vllm-pd serve`", "vLLM's toy proxy"
_ENGINE = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096")
_DEADLINE_S = 600
_TAIL_LINES = 25

Row = dict[str, str | bool]
"""test, through, passed: which script, what stood before the engines, and whether it ended well."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance.disaggregated", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--json", type=Path, required=True, help="where the results are written")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        tests = source.fetch(WORK, source.installed_version())
        packages = source.install_test_packages(WORK)
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (packages, tests)))
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            rows = run(tests / _FOLDER, folder, stack)
    except (source.SourceError, EngineError) as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 1
    args.json.write_text(json.dumps(rows, indent=2) + "\n")
    output.write_between(PAGE, "disaggregated", _table(rows))
    return 0 if all(row["passed"] for row in rows) else 1


def run(scripts: Path, folder: Path, stack: ExitStack) -> list[Row]:
    """Return a row for each script and what stands before the engines. stack: gets what ends them.

    Raises:
        EngineError: a server did not start.
    """
    model = models.smollm2()
    say("starting a prefill engine, a decode engine, a frontend and a proxy: about a minute")
    pair = [
        start(role, model, (*_ENGINE, *connector_arguments(role)), cores=core, folder=folder)
        for role, core in (("prefill", "0"), ("decode", "1"))
    ]
    prefill, decode = stack.enter_context(running(pair))
    pool = ("--prefill", prefill.url, "--decode", decode.url, "--local-below", "0")
    frontend = start_frontend("serve", model, pool, folder=folder)
    stack.enter_context(running([frontend]))
    proxy = stack.enter_context(_toy_proxy(scripts, prefill, decode, folder))
    script = [sys.executable, scripts / "test_disagg_accuracy.py", "--model_name", model.name]
    script += ["--file_name", folder / "baseline.json", "--service_url"]
    rows: list[Row] = []
    for name, url in ((FRONTEND, frontend.url), (PROXY, proxy)):
        edge = {
            "PREFILL_PORT": _port(prefill.url),
            "DECODE_PORT": _port(decode.url),
            "PROXY_PORT": _port(url),
        } | {f"{each}_HOST": "127.0.0.1" for each in ("PREFILL", "DECODE", "PROXY")}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        rows.append(_row("test_edge_cases", name, [*command, scripts / "test_edge_cases.py"], edge))
        alone = _row("baseline", "the decode engine alone", [*script, decode.url], {})
        rows.append(_row("test_disagg_accuracy", name, [*script, url, "--mode", "disagg"], {}))
        rows[-1]["passed"] &= alone["passed"]
    return rows


@contextmanager
def _toy_proxy(scripts: Path, prefill: Engine, decode: Engine, folder: Path) -> Iterator[str]:
    """Run vLLM's toy proxy over a pair; gives its URL."""
    port = free_port()
    command = [sys.executable, str(scripts / "toy_proxy_server.py"), "--port", str(port)]
    for name, engine in (("prefiller", prefill), ("decoder", decode)):
        command += [f"--{name}-hosts", "127.0.0.1", f"--{name}-ports", _port(engine.url)]
    log = folder / "proxy.log"
    process = spawn(command, {}, log)
    server = Engine("proxy", f"http://127.0.0.1:{port}", prefill.model, process, log)
    try:
        server.wait_until_ready(path="/healthcheck")
        yield server.url
    finally:
        process.terminate()
        process.wait()


def _row(test: str, before: str, command: Sequence[object], environ: dict[str, str]) -> Row:
    """Run a script to its end; print the end of what it says if it fails."""
    ended = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_DEADLINE_S,
        check=False,
    )
    passed = ended.returncode == 0
    print(f"{test} through {before}: {'passed' if passed else 'failed'}", flush=True)
    if not passed:
        print("\n".join(ended.stdout.splitlines()[-_TAIL_LINES:]), flush=True)
    return {"test": test, "through": before, "passed": passed}


def _port(url: str) -> str:
    return str(urlsplit(url).port)


def _table(rows: Sequence[Row]) -> str:
    lines = [
        f"| `{row['test']}.py` | {row['through']} | {'passed' if row['passed'] else 'failed'} |"
        for row in rows
    ]
    return "\n".join(["| script | through | |", "| --- | --- | --- |", *lines])


if __name__ == "__main__":
    sys.exit(main())
