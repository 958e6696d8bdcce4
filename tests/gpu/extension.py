"""Stage: the extension itself, as `pip install` builds it, for the PyTorch that is here.

It needs headers of PyTorch's stable ABI from ``TORCH_TARGET_VERSION`` of setup.py on; with an older
PyTorch its compiler says so, and that is the outcome.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.gpu import few_ops
from tests.gpu.build import cuda_home
from tests.gpu.notes import Notes, NotTriedError
from vllm_pd_plugin.codecs.native import refused_torch

ROOT = Path(__file__).parents[2]
_LIMIT_S = 100.0
_OPS = (
    "pack_blocks", "unpack_blocks", "encode_blocks", "decode_blocks", "gather_heads",
    "scatter_heads", "digest_blocks",
)  # fmt: skip


def run(notes: Notes) -> None:
    if notes.is_stand_in:
        raise NotTriedError("stand-in device: `make setup` builds the extension for the CPU")
    built, said = build(notes.work)
    if not built:
        lines = [line for line in said.splitlines() if "error" in line.lower()]
        text = f"it cannot be built: {' '.join(lines[:3]) or said[-500:]}"
        if refused_torch(torch.__version__) is not None:
            raise NotTriedError(text)
        notes.check(False, text)
        return
    for library in built:
        torch.ops.load_library(str(library))
    if not torch._C._dispatch_has_kernel_for_dispatch_key("vllm_pd_plugin::pack_blocks", "CUDA"):
        raise NotTriedError("it was built without the kernels for CUDA")
    notes.fact("built", ", ".join(path.name for path in built))
    ops = SimpleNamespace(**{name: getattr(torch.ops.vllm_pd_plugin, name) for name in _OPS})
    for wrong in few_ops.wrong(ops, torch.device("cuda")):
        notes.check(False, wrong)
    notes.check(True, "")


def build(work: Path) -> tuple[list[Path], str]:
    """Return what was built, nothing where that failed, and what was said meanwhile."""
    target = work / "extension"
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(target)]
    environ = {
        "PD_USE_CUDA": "1",
        "CUDA_HOME": str(cuda_home()),
    }
    told = subprocess.run(
        [*command, "--build-temp", str(work / "extension-objects")],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    said = told.stdout + told.stderr
    print(said, flush=True)
    return sorted(target.rglob("*.so")) if told.returncode == 0 else [], said
