"""Some hundreds of seeds of the simulated world, each with its own faults; see
``python -m tests.simulation --help``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_whatever_goes_wrong_no_stale_kv_is_used_nothing_leaks_and_everything_ends() -> None:
    done = run("--seeds", "400", "--processes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "400 seeds" in done.stdout
    assert " 0 failed" in done.stdout


def test_a_seed_replays_exactly() -> None:
    first, second = (run("--seed", "11", "--verbose").stdout for _ in range(2))
    assert len(first.splitlines()) > 50
    assert first == second


def test_without_a_guard_of_the_protocol_a_seed_fails() -> None:
    done = run("--seeds", "500", "--processes", "1", "--without", "fingerprint")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "StaleKv" in done.stdout
