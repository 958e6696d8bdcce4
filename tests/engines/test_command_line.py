"""The command line and `LLM()`, as a new user meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import models

pytestmark = pytest.mark.engine

REPO = Path(__file__).resolve().parents[2]
AS_USERS_HAVE_IT = {
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}  # fmt: skip
PDPLUGIN = ("--kv-connector", "pdplugin")
OPTION = "--kv-transfer-config.kv_connector_extra_config"


def run(*command: str, stdin: str | None = None) -> tuple[int, str, str]:
    """Run a command to its end; return its status and what it printed on each stream."""
    done = subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **AS_USERS_HAVE_IT},
        cwd=REPO,
    )
    return done.returncode, done.stdout, done.stderr


def lines() -> dict[str, tuple[list[str], int, list[str]]]:
    """Return what is typed after ``vllm serve``, the exit status, and what the output contains."""
    model = str(models.tiny_llama())
    return {
        "help": (
            ["--help=all"],
            0,
            ["--kv-connector {pdplugin}", "--kv-role {prefill,decode,both}"],
        ),
        "wrong role": (
            [model, *PDPLUGIN, "--kv-role", "prefiller"],
            2,
            ["invalid choice: 'prefiller'", "decode"],
        ),
        "unknown option": (
            ["model", *PDPLUGIN, f"{OPTION}.leese_s", "3"],
            2,
            ["has no option 'leese_s'", "lease_s"],
        ),
        "open address without a key": (
            ["model", *PDPLUGIN, f"{OPTION}.host", "10.0.0.1"],
            2,
            ["host='10.0.0.1'", "VLLM_PD_CLUSTER_KEY"],
        ),
        "ports for two engines, of which one is there": (
            [model, *PDPLUGIN, "--data-parallel-size", "2", f"{OPTION}.port", "65535"],
            1,
            ["port=65535 leaves none for each of --data-parallel-size=2 engines"],
        ),
    }


NAMES = ("help", "wrong role", "unknown option", "open address without a key",
         "ports for two engines, of which one is there")  # fmt: skip


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[int, str]]:
    """What became of each line."""
    cases = lines()
    assert tuple(cases) == NAMES
    typed = [["vllm", "serve", *arguments] for arguments, _, _ in cases.values()]
    module = (sys.executable, "-m", "tests.command_lines")
    status, out, problems = run(*module, stdin=json.dumps(typed))
    assert status == 0, problems
    return dict(zip(NAMES, json.loads(out), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_what_vllm_serve_answers_before_anything_is_loaded(
    outcomes: dict[str, tuple[int, str]], name: str
) -> None:
    _, expected_status, expected = lines()[name]
    status, text = outcomes[name]
    assert status == expected_status, text[-3000:]
    assert "Loading weights" not in text
    parts = text.splitlines() if status == 2 else [text]  # one line says it all
    assert any(all(part in each for part in expected) for each in parts), text


def test_a_refused_config_of_llm_says_what_to_do() -> None:
    code = (
        "from vllm import LLM; import sys; "
        f"LLM({str(models.tiny_llama())!r}, kv_transfer_config={{'kv_connector': 'pdplugin', "
        "'kv_role': 'kv_both', 'kv_connector_extra_config': {'lease_s': -1}})"
    )
    status, _, problems = run(sys.executable, "-c", code)
    assert status == 1
    assert "lease_s=-1 is not a time; allowed are 0.05 to 86400 seconds" in problems


def test_the_offline_example_answers_alike() -> None:
    status, text, problems = run(sys.executable, "examples/offline_llm.py", str(models.smollm2()))
    assert status == 0, (problems + text)[-3000:]
    assert "identical: yes" in text
    assert "Paris" in text
