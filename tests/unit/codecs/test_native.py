"""Which native modules serve, and what is said where one does not."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vllm_pd_plugin
from tests.fakes.native import without_native_ops
from tests.tools import needs
from vllm_pd_plugin.codecs import native, ops, ops_reference

ROOT = Path(__file__).parents[3]
BROKEN = "invalid ELF header"


def broken_module(name: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let a native module of the package be a file that no process can load."""
    (folder / f"{name}.abi3.so").write_bytes(b"not a library" * 100)
    patch.setattr(vllm_pd_plugin, "__path__", [str(folder), *vllm_pd_plugin.__path__])


@pytest.mark.parametrize("version", ["2.13.0", "2.13.1+cu130", "2.14.0a0+git1234", "3.0"])
def test_a_torch_that_is_new_enough_is_taken(version: str) -> None:
    assert native.refused_torch(version) is None


@pytest.mark.parametrize("version", ["2.12.1", "2.9.0+cu128", "1.13.1", "unknown"])
def test_an_older_torch_is_named_beside_the_one_that_is_needed(version: str) -> None:
    refused = native.refused_torch(version)
    assert refused is not None
    assert refused.why == f"torch {version} is here, and 2.13 or newer is needed"
    assert "2.13" in refused.remedy


def test_the_modules_are_built_for_the_oldest_torch_that_may_load_them() -> None:
    built_for = re.search(r'TORCH_TARGET_VERSION = "(0x\w+)"', (ROOT / "setup.py").read_text())
    assert built_for is not None
    version = int(built_for[1], 16).to_bytes(8, "big")
    assert (version[0], version[1]) == native.OLDEST_TORCH


def test_a_module_that_was_not_built_is_told_from_one_that_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = native._import("_C_absent", "build it")
    assert absent == native.Missing("vllm_pd_plugin._C_absent was not built", "build it")
    broken_module("_C_broken", tmp_path, monkeypatch)
    broken = native._import("_C_broken", "build it")
    assert broken is not None
    assert BROKEN in broken.why


@needs(ops.HAS_NATIVE, "the native extension")
def test_a_broken_cuda_module_does_not_cost_the_cpu_ops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_module("_C_cuda", tmp_path, monkeypatch)
    missing = native._missing_cuda("13.0")
    assert missing is not None
    assert BROKEN in missing.why
    assert "CUDA toolkit" in missing.remedy
    assert "make wheel" in missing.remedy
    blocks = torch.tensor([1])
    assert ops.kernel("digest_blocks", blocks) is torch.ops.vllm_pd_plugin.digest_blocks


def test_beside_a_torch_without_cuda_the_cuda_module_is_not_even_looked_for() -> None:
    missing = native._missing_cuda(None)
    assert missing is not None
    assert missing.why == "this torch is not a CUDA build"
    assert "vllm_pd_plugin._C_cuda" not in sys.modules


def test_a_cuda_tensor_without_its_module_gets_the_reference_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_native_ops(monkeypatch, "libsomething.so is missing")
    on_cuda: Any = SimpleNamespace(is_cuda=True)
    for _ in range(2):
        assert ops.kernel("pack_blocks", on_cuda) is ops_reference.pack_blocks
    (record,) = caplog.records
    assert "(libsomething.so is missing)" in record.message
    assert record.message.endswith("To have them: build them")
