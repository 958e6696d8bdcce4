"""Stage: the kernels and their C ABI as one shared library.

On a GPU nvcc compiles ``csrc/cuda``; for the stand-in a C++ compiler ``csrc/cpu``. No header of
PyTorch is needed.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.gpu.notes import Notes, NotTriedError

ROOT = Path(__file__).parents[2]
NATIVE = Path(__file__).parent / "native"
_NAME = "libpd_kernels.so"

# As setup.py has it: codes are to be the same on every machine.
NVCC = ("nvcc", "-std=c++17", "-O3", "-fmad=false", "-DPD_USE_CUDA", "-Xcompiler", "-fPIC")
CXX = ("-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC")


def run(notes: Notes) -> None:
    if notes.is_stand_in:
        library = build_for_cpu(notes.work)
    else:
        capability = _capability()
        notes.fact("compiled for", f"sm_{capability}")
        library = build_for_cuda(notes.work, capability)
    notes.check(library.exists(), "there is no library")


def library_in(work: Path) -> Path:
    """Return where the library is. Raises NotTriedError where it was not built."""
    library = work / _NAME
    if not library.exists():
        raise NotTriedError("the kernels were not built")
    return library


def build_for_cpu(work: Path, optimization: str = "-O3") -> Path:
    compiler = os.environ.get("CXX", "g++")
    sources = [NATIVE / "c_abi.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    compile_ = [compiler, optimization, *CXX]
    return link([compiler, "-shared"], compile_all(compile_, sources, work), work)


def build_for_cuda(work: Path, capability: str) -> Path:
    """capability: such as 90. (nvcc's own ``-arch=native`` takes another one, and only warns, where
    it sees no GPU.)"""
    sources = [*sorted(NATIVE.iterdir()), *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    objects = compile_all([*NVCC, f"-arch=sm_{capability}"], sources, work)
    return link(["nvcc", "-shared"], objects, work)


def _capability() -> str:
    import torch

    return "{}{}".format(*torch.cuda.get_device_capability(0))


def compile_all(command: Sequence[str], sources: Sequence[Path], work: Path) -> list[Path]:
    """Compile each source, as many at once as there are cores."""
    objects = [work / f"{source.name}.o" for source in sources]

    def compile_(source: Path, target: Path) -> None:
        _do([*command, "-c", str(source), "-o", str(target)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_, sources, objects))
    return objects


def link(command: Sequence[str], objects: Sequence[Path], work: Path) -> Path:
    library = work / _NAME
    _do([*command, *map(str, objects), "-o", str(library)])
    return library


def _do(command: Sequence[str]) -> str:
    """Run a compiler, and return what it says. Raises RuntimeError with that."""
    print(" ".join(command), flush=True)
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]} is not there") from error
    said = told.stdout + told.stderr
    if told.returncode:
        print(said, flush=True)
        errors = [line for line in said.splitlines() if "error" in line.lower()]
        raise RuntimeError(f"{command[0]} ended with {told.returncode}: {' '.join(errors[:3])}")
    return said


def cuda_home() -> Path:
    """Return where nvcc has its headers and tools; the nvcc that is found may only call it.

    Raises RuntimeError where it does not say."""
    with tempfile.NamedTemporaryFile(suffix=".cu") as empty:
        told = _do(["nvcc", "--dryrun", "-c", empty.name])
    top = re.search(r"^#\$ TOP=(.*)$", told, re.MULTILINE)
    if top is None:
        raise RuntimeError("nvcc does not say where it is")
    return Path(top[1]).resolve()
