from __future__ import annotations

import subprocess
import sys

import pytest

import vllm_pd_plugin
from vllm_pd_plugin import cli


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_pd_plugin.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_help_shows_the_commands_and_an_example() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert "check" in result.stdout
    assert "--kv-connector pdplugin --kv-role prefill" in result.stdout
    assert result.stderr == ""


def test_version_is_the_package_s() -> None:
    result = run("--version")
    assert result.returncode == 0
    assert result.stdout.strip() == f"vllm-pd-plugin {vllm_pd_plugin.__version__}"


@pytest.mark.parametrize("arguments", [["fly"], [], ["check", "--fast"], ["--fast"]])
def test_what_it_does_not_know_ends_with_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: vllm-pd" in capsys.readouterr().err


def test_the_exit_status_reaches_the_shell() -> None:
    result = run("fly")
    assert result.returncode == 2
    assert "'fly'" in result.stderr
    assert "check" in result.stderr
