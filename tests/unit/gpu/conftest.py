"""What the tests of ``tests/gpu`` share: the kernels for the CPU, behind their C ABI."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.build import build_for_cpu
from tests.gpu.kernels import Kernels
from tests.gpu.notes import Notes


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder after the stage ``build``; without optimization, which takes long."""
    folder = tmp_path_factory.mktemp("work")
    build_for_cpu(folder, "-O0")
    return folder


@pytest.fixture(scope="session")
def kernels(work: Path) -> Kernels:
    return Kernels(work / "libpd_kernels.so")


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    """Those of a stage on the stand-in."""
    return Notes(tmp_path / "stage.json", "cpu", tmp_path)
