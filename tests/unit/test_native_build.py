"""What ``setup.py`` refuses when it is asked outright for native modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"PD_USE_CUDA": "yes"}, "PD_USE_CUDA=yes is not known; allowed are auto, 0 and 1"),
        ({"PD_USE_CUDA": "1", "CUDA_HOME": "/nowhere"}, "nvcc is missing: set CUDA_HOME"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(environ: dict[str, str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(message)
