"""One run of a module: real pytest, on a file that needs no vLLM."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conformance import arms
from tests.conformance.arms import THEIRS, Site
from tests.conformance.inside.launch import OURS
from tests.conformance.outcomes import Outcome
from tests.conformance.store import Store

MODULE = """\
import os, signal, subprocess, sys
import pytest

def test_passes():
    pass

@pytest.mark.parametrize("x", ["a b", "[c]"])
def test_fails(x):
    assert x == 1

def test_leaves_a_process():
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    )
    open("left", "w").write(str(process.pid))

def test_starts_a_server():
    entry = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", "m"]
    os.environ["PD_CONFORMANCE_PYTHON"] = "/bin/echo"
    process = subprocess.Popen(entry, stdout=subprocess.PIPE, text=True)
    assert process.communicate()[0].endswith("launch.py serve --model m\\n")

def test_is_interrupted():
    signal.raise_signal(signal.SIGINT)
"""

QUICK = ["test_passes", "test_fails[a b]", "test_leaves_a_process", "test_starts_a_server"]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    for name in ("source", "site", "home"):
        (tmp_path / name).mkdir()
    (tmp_path / "source" / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (tmp_path / "source" / "test_m.py").write_text(MODULE)
    return Site(tmp_path / "source", tmp_path / "site", tmp_path / "home")


def test_chosen_tests_run_and_nothing_is_left_behind(site: Site, tmp_path: Path) -> None:
    only = [f"test_m.py::{name}" for name in QUICK]
    found = arms.run("test_m.py", OURS, site, tmp_path / "run", 60.0, only)
    assert found.tests == {
        "test_m.py::test_passes": Outcome.PASSED,
        "test_m.py::test_fails[a b]": Outcome.FAILED,
        "test_m.py::test_leaves_a_process": Outcome.PASSED,
        "test_m.py::test_starts_a_server": Outcome.PASSED,
    }
    assert not found.trouble
    assert "assert 'a b' == 1" in found.messages["test_m.py::test_fails[a b]"]
    pid = (site.source / "left").read_text()
    state = Path("/proc", pid, "stat")
    ends_at = time.monotonic() + 20
    while state.exists() and ") Z " not in state.read_text():
        assert time.monotonic() < ends_at, "it was left behind"
        time.sleep(0.01)


def test_a_run_that_is_interrupted_keeps_what_it_has(site: Site, tmp_path: Path) -> None:
    only = ["test_m.py::test_passes", "test_m.py::test_is_interrupted"]
    found = arms.run("test_m.py", THEIRS, site, tmp_path / "run", 60.0, only)
    assert found.tests["test_m.py::test_passes"] is Outcome.PASSED
    assert found.tests.get("test_m.py::test_is_interrupted") is not Outcome.PASSED


class Endless:
    """A process that goes on until it is interrupted, or until it is killed."""

    def __init__(self, ends_on: signal.Signals) -> None:
        self._ends_on = ends_on
        self.waited_s: list[float] = []
        self.received: list[int] = []

    def wait(self, timeout: float) -> int:
        self.waited_s.append(timeout)
        if self._ends_on not in self.received:
            raise subprocess.TimeoutExpired("pytest", timeout)
        return 0

    def send_signal(self, number: int) -> None:
        self.received.append(number)


@pytest.mark.parametrize("ends_on", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_takes_too_long_is_interrupted_and_given_up(ends_on: signal.Signals) -> None:
    process = Endless(ends_on)
    assert arms.wait(process, 7.0) == "not done in 7 s"
    assert process.received == [signal.SIGINT]
    assert process.waited_s == [7.0, arms.GRACE_S]


def test_a_run_without_results_says_how_it_ended(site: Site, tmp_path: Path) -> None:
    (site.source / "test_m.py").write_text("import os; os._exit(7)")
    found = arms.run("test_m.py", THEIRS, site, tmp_path / "run", 60.0)
    assert not found.tests
    assert found.trouble == "pytest ended with 7 and wrote no results"


def test_only_our_arm_has_our_plug_in(site: Site) -> None:
    given = {"PATH": "/bin", "VLLM_PLUGINS": "x", "PYTEST_ADDOPTS": "-x", "HOME": "/root"}
    theirs, ours = (arms.environ(arm, site, given) for arm in (THEIRS, OURS))
    assert "pdplugin" not in theirs["VLLM_PLUGINS"].split(",")
    assert "VLLM_PLUGINS" not in ours
    for environ in (theirs, ours):
        assert environ["HOME"] == "/root"
        assert "PYTEST_ADDOPTS" not in environ
        assert environ["PATH"].split(":")[0] == str(arms.INSIDE / "bin")
        places = environ["PYTHONPATH"].split(":")
        assert places.index(str(site.source)) < places.index(str(arms.REPO))


def test_runs_are_kept_by_module_and_arm(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = arms.Run({"a": Outcome.FAILED}, {"a": "why"}, "trouble", 1.5, 2)
    second = arms.Run({"a": Outcome.PASSED})
    store.add("tests/m.py", OURS, first)
    store.add("tests/m.py", OURS, second)
    again = Store(tmp_path)
    assert again.runs("tests/m.py", OURS) == [first, second]
    assert again.runs("tests/m.py", THEIRS) == []
    assert again.runs("tests/n.py", OURS) == []
    again.forget("tests/m.py")
    assert again.runs("tests/m.py", OURS) == []
