from __future__ import annotations

import subprocess
import sys

import pytest

import vllm_pd_plugin
from tests.fakes.native import without_native_ops
from vllm_pd_plugin import cli
from vllm_pd_plugin.errors import PdError


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


def test_check_says_that_the_extension_is_missing_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The connector runs without it: that is no failure."""
    without_native_ops(monkeypatch)
    assert cli.run_checks({"native extension": cli._check_extension}) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("SLOW  native extension: missing for CPU")
    assert line.endswith("they were not built. To have it: build them")


def test_check_goes_on_after_a_failure_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> str:
        raise PdError("it is too old")

    assert cli.run_checks({"first": fail, "second": lambda: "1.0"}) == 1
    assert capsys.readouterr().out == "FAIL  first: it is too old\nok    second: 1.0\n"
