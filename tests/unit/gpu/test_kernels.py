"""The C ABI has every kernel, and the checks of the ops find what is wrong with one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.gpu import few_ops, ops
from tests.gpu.kernels import SCHEMAS, Kernels
from tests.gpu.notes import Notes
from tests.tools import needs
from vllm_pd_plugin.codecs.ops import HAS_NATIVE

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
OPS = [schema.partition("(")[0] for schema in SCHEMAS]


def launchers() -> list[str]:
    """The ops that csrc/ops.h declares for CUDA."""
    return re.findall(r"\bvoid (\w+)_cuda\(", (ROOT / "csrc" / "ops.h").read_text())


def test_the_c_abi_exports_every_kernel(kernels: Kernels) -> None:
    source = (ROOT / "tests" / "gpu" / "native" / "c_abi.cpp").read_text()
    assert sorted(launchers()) == sorted(OPS)
    for op in launchers():
        assert kernels.function(f"pd_{op}")
        assert re.search(rf"\bpd::{op}_cuda\(", source), f"it does not call {op}_cuda"


@needs(HAS_NATIVE, "the native extension")
@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_ops_are_those_of_the_extension(schema: str) -> None:
    found = getattr(torch.ops.vllm_pd_plugin, schema.partition("(")[0]).default._schema
    assert str(found) == f"vllm_pd_plugin::{schema}"


def test_every_op_of_the_stand_in_is_right(kernels: Kernels, notes: Notes) -> None:
    ops.check_all(kernels, notes, rounds=1)
    assert notes.finish(), notes.found["failures"]
    assert notes.found["checks"] > 200


def test_blocks_that_are_gigabytes_apart_are_found(kernels: Kernels, notes: Notes) -> None:
    ops.check_far(kernels, notes)
    assert notes.finish(), notes.found["failures"]
    assert notes.found["checks"] == 5


Break = Callable[..., None]


def first_byte(changed: torch.Tensor) -> None:
    """The first of what an op writes is another."""
    if changed.numel():
        changed.view(-1)[:1].view(torch.uint8)[:1] += 1


def byte_behind(changed: torch.Tensor) -> None:
    """The one behind the end is another."""
    beside = changed.as_strided((1,), (1,), changed.storage_offset() + changed.numel())
    beside.view(torch.uint8)[:1] += 1


@pytest.mark.parametrize("break_", [first_byte, byte_behind])
@pytest.mark.parametrize("op", ["pack_blocks", "encode_blocks"])
def test_an_op_that_writes_something_else_or_beside_a_slab_is_found(
    kernels: Kernels, op: str, break_: Break
) -> None:
    def broken(*arguments: Any) -> None:
        getattr(kernels, op)(*arguments)
        break_(arguments[-1])

    wrong = few_ops.wrong(with_op(kernels, op, broken), CPU)
    assert any(op in text for text in wrong)


@pytest.mark.parametrize("op", ["unpack_blocks", "decode_blocks"])
def test_an_op_that_leaves_out_a_block_is_found(kernels: Kernels, op: str) -> None:
    def broken(slab: torch.Tensor, blocks: torch.Tensor, *arguments: Any) -> None:
        views = arguments[-1]
        kept = [view[blocks[:1]].clone() for view in views]
        getattr(kernels, op)(slab, blocks, *arguments)
        for view, before in zip(views, kept, strict=True):
            view[blocks[:1]] = before

    wrong = few_ops.wrong(with_op(kernels, op, broken), CPU)
    assert wrong
    assert all(op in text for text in wrong)


def test_a_digest_of_something_else_is_found(kernels: Kernels) -> None:
    def broken(planes: list[torch.Tensor], blocks: torch.Tensor) -> torch.Tensor:
        return kernels.digest_blocks(planes, blocks.flip(0)[:1])

    wrong = few_ops.wrong(with_op(kernels, "digest_blocks", broken), CPU)
    assert wrong
    assert all("digest_blocks" in text for text in wrong)


def with_op(kernels: Kernels, op: str, function: Any) -> SimpleNamespace:
    return SimpleNamespace(**{name: getattr(kernels, name) for name in OPS} | {op: function})
