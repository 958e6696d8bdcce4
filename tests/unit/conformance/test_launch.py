"""What stands in the place of `vllm` for vLLM's tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.arms import INSIDE, THEIRS
from tests.conformance.inside import launch
from tests.conformance.inside.launch import OURS, command, entry_arguments

POOL = ["--prefill", "1", "--decode", "1", "--local-below", "0"]


def test_a_server_is_a_pool_on_our_arm() -> None:
    words = ["serve", "some/model", "--port", "1", "--enforce-eager"]
    assert command(words, OURS) == ["vllm-pd", "up", *words[1:], *POOL]


def test_a_server_is_itself_on_vllms_arm() -> None:
    words = ["serve", "some/model", "--port", "1"]
    assert command(words, THEIRS) == ["vllm", *words]


def test_other_commands_are_vllms_on_both_arms() -> None:
    for arm in (THEIRS, OURS):
        assert command(["bench", "serve", "--model", "m"], arm) == [
            "vllm",
            "bench",
            "serve",
            "--model",
            "m",
        ]
        assert command(["--version"], arm) == ["vllm", "--version"]
        assert command([], arm) == ["vllm"]


def test_a_model_that_is_named_by_an_option_comes_first() -> None:
    expected = ["vllm-pd", "up", "m", "--seed", "0", "--port", "1", *POOL]
    assert command(["serve", "--seed", "0", "--model", "m", "--port", "1"], OURS) == expected
    assert command(["serve", "--seed", "0", "--model=m", "--port", "1"], OURS) == expected


def test_both_servers_go_without_adapters_and_pooling() -> None:
    words = [
        *("serve", "m", "--enable-lora", "--lora-modules", "a=/x", "b=/y", "--max-lora-rank", "64"),
        *("--runner", "pooling", "--max-cpu-loras=2", "--seed", "0"),
    ]
    assert command(words, THEIRS) == ["vllm", "serve", "m", "--seed", "0"]
    assert command(words, OURS) == ["vllm-pd", "up", "m", "--seed", "0", *POOL]


def test_a_value_after_an_option_that_has_none_is_kept() -> None:
    for option in ("--enable-lora", "--max-cpu-loras=2"):
        words = ["serve", option, "m", "--seed", "0"]
        assert command(words, THEIRS) == ["vllm", "serve", "m", "--seed", "0"]


def test_a_server_that_is_started_as_a_module_is_known() -> None:
    entry = ["python", "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", "m"]
    assert entry_arguments(entry) == ["serve", "--model", "m"]
    assert entry_arguments(["python", "-m", "pytest"]) is None
    assert entry_arguments(["python"]) is None


def test_a_server_is_counted_and_another_command_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers, started = tmp_path / "servers", []
    monkeypatch.setenv(launch.ARM_VARIABLE, OURS)
    monkeypatch.setenv(launch.SERVERS_VARIABLE, str(servers))
    monkeypatch.setattr(os, "execv", lambda program, words: started.append((program, words)))
    for words in (["serve", "m", "--seed", "0"], ["--version"], ["bench", "serve"]):
        monkeypatch.setattr(sys, "argv", ["launch.py", *words])
        launch.main()
    assert servers.read_text() == f"vllm-pd up m --seed 0 {' '.join(POOL)}\n"
    programs = Path(sys.executable).parent
    assert [program for program, _ in started] == [
        programs / "vllm-pd",
        programs / "vllm",
        programs / "vllm",
    ]


def test_the_program_on_the_path_passes_every_word_on() -> None:
    surroundings = {"PD_CONFORMANCE_PYTHON": "/bin/echo", "PD_CONFORMANCE_LAUNCH": "launch.py"}
    words = ["serve", "two words", ""]
    told = subprocess.run(
        [INSIDE / "bin" / "vllm", *words],
        env={**os.environ, **surroundings},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == "launch.py serve two words \n"
