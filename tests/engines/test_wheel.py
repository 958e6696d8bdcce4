"""What a user installs: the wheel, in an environment without the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest

from tests import wheel
from tests.engine import hand_off, hand_off_at_once
from tests.engines.conftest import FROM_THE_WHEEL, Trio, TrioOf, random_prompt
from tests.parity import FLOAT32, compare

pytestmark = pytest.mark.engine

NEWEST_GLIBC = (2, 34)
"""What a machine needs that the wheel is installed on; ``README.md`` says so."""

# Where no driver is, the CUDA module refuses to be used, after its kernels have been registered.
LOAD = """
import torch, vllm_pd_plugin
from vllm_pd_plugin import _C
try:
    from vllm_pd_plugin import _C_cuda
except ImportError as error:
    assert str(error) == "there is no CUDA driver here", error
for op in ("pack", "unpack", "encode", "decode", "digest"):
    for key in ("CPU", "CUDA"):
        name = f"vllm_pd_plugin::{op}_blocks"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)
print(vllm_pd_plugin.__file__)
"""


def run(*command: str, cwd: Path) -> str:
    """Run a program of the wheel's environment; return what it prints."""
    program, *rest = command
    done = subprocess.run(
        [wheel.environment() / "bin" / program, *rest],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trio(trio_of: TrioOf) -> Trio:
    return trio_of(FROM_THE_WHEEL)


def test_engines_run_from_the_wheel_and_answer_alike(trio: Trio) -> None:
    for engine in (trio.producer, trio.consumer):
        mapped = {part.path for part in psutil.Process(engine.worker_pid()).memory_maps()}
        native = [Path(path) for path in mapped if "/vllm_pd_plugin/" in path]
        assert "_C.abi3.so" in [path.name for path in native]
        assert all(wheel.environment() in path.parents for path in native)
    for seed, how in enumerate((hand_off, hand_off_at_once)):
        prompt = random_prompt(300, 600 + seed)
        expected = trio.alone.complete(prompt)
        compare(expected, how(trio.producer, trio.consumer, prompt), FLOAT32)
    trio.assert_at_rest()


def test_vllm_pd_check_finds_everything_in_the_wheel(tmp_path: Path) -> None:
    text = run("vllm-pd", "check", cwd=tmp_path)
    assert text.count("ok ") == 5
    assert "native extension: built" in text


# Not `needs`: `make tools` does not bring a CUDA toolkit, and all else can do without one.
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="without nvcc there are no CUDA kernels")
def test_both_native_modules_of_the_wheel_load(tmp_path: Path) -> None:
    found = run("python", "-c", LOAD, cwd=tmp_path)
    assert wheel.environment() in Path(found.strip()).parents


def test_the_wheel_is_tagged_for_older_systems_and_later_pythons() -> None:
    tag = re.search(r"-cp311-abi3-manylinux_(\d+)_(\d+)_\w+\.whl$", wheel.wheel().name)
    assert tag is not None
    assert (int(tag[1]), int(tag[2])) <= NEWEST_GLIBC
