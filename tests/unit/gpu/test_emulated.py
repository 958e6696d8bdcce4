"""The kernels for CUDA, run on a CPU by an emulator, write what the references write."""

from __future__ import annotations

from collections.abc import Callable
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


def without_warp_barriers(source: str) -> str:
    return source.replace("__syncwarp();", "")


def without_block_barriers(source: str) -> str:
    return source.replace("__syncthreads();", "")


@pytest.mark.parametrize("without", [without_warp_barriers, without_block_barriers])
def test_a_barrier_that_is_left_out_is_found(tmp_path: Path, without: Callable[[str], str]) -> None:
    wrong = few_ops.wrong(Kernels(build_emulated(tmp_path, without)), CPU)
    assert wrong
    assert all("encode_blocks" in text for text in wrong)
