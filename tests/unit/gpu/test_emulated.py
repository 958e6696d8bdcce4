"""The kernels for CUDA, run on a CPU by an emulator, write what the references write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu import cases, few_ops, ops
from tests.gpu.emulator import build_emulated
from tests.gpu.kernels import Kernels
from tests.gpu.notes import Notes

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def test_every_kernel_for_cuda_is_right(tmp_path: Path, notes: Notes) -> None:
    kernels = Kernels(build_emulated(tmp_path))
    assert few_ops.wrong(kernels, CPU) == []
    for moving in cases.moving_once():
        assert list(ops.moving_errors(kernels, moving, CPU)) == []
    for coding in cases.coding_once():
        assert list(ops.coding_errors(kernels, coding, CPU)) == []
    ops.check_far(kernels, notes)
    assert notes.finish(), notes.found["failures"]


@pytest.mark.parametrize(
    "barrier",
    [
        "__syncwarp();",
        "__syncthreads();  // until here",
        "__syncthreads();  // every warp reads",  # without the one between, nothing but a crash
    ],
)
def test_a_barrier_that_is_left_out_is_found(tmp_path: Path, barrier: str) -> None:
    found = []

    def without(source: str) -> str:
        found.append(source.count(barrier))
        return source.replace(barrier, "//")

    wrong = few_ops.wrong(Kernels(build_emulated(tmp_path, without)), CPU)
    assert sum(found) > 0
    assert sum(found) > 0
    assert wrong
    assert all("encode_blocks" in text for text in wrong)
