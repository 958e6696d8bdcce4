"""The kernels for CUDA on a CPU, as a library of the same C ABI: see ``cuda_runtime_api.h``.

It tells wrong indices and arithmetic, missing barriers and misaligned words. What a GPU's memory,
its compiler and its speed make of the kernels, it does not tell.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.gpu.build import CXX, NATIVE, ROOT, compile_all, link

HERE = Path(__file__).parent
MAX_GRID = 3
"""Blocks of threads: so few that each works on several items, one after the other."""

_SANITIZED = ("-fsanitize=undefined", "-fno-sanitize-recover=all")
"""A CPU lets misaligned words pass; on a GPU they end the kernel."""

_LAUNCH = re.compile(r"(\w+(?:<\w+>)?)<<<(.+?), 0, on>>>\(([^;]*)\);", re.DOTALL)
"""Kernel, grid and threads, arguments."""


def build_emulated(work: Path, change: Callable[[str], str] = str) -> Path:
    """Return the library; ``change`` is applied to each source of ``csrc/cuda``."""
    folder = work / "emulated" / "cuda"
    folder.mkdir(parents=True)
    for header in (ROOT / "csrc").glob("*.h"):
        shutil.copy(header, folder.parent)
    for original in (ROOT / "csrc" / "cuda").iterdir():
        text = change(original.read_text())
        text, launches = _LAUNCH.subn(r"emulated::launch(\2, [=] { \1(\3); });", text)
        text, grids = re.subn(r"(kMaxGrid =) \d+", rf"\1 {MAX_GRID}", text)
        assert launches or original.suffix != ".cu", f"{original.name} launches nothing"
        assert grids or original.name != "launch.cuh", "where is the largest grid?"
        name = original.with_suffix(".cpp").name if original.suffix == ".cu" else original.name
        (folder / name).write_text(text)
    # What is fortified refuses to go from one stack to another.
    command = ["g++", "-O0", *CXX, *_SANITIZED, "-U_FORTIFY_SOURCE", "-DPD_USE_CUDA"]
    command += ["-I", str(HERE), "-include", str(HERE / "cuda_runtime_api.h")]
    sources = [HERE / "emulator.cpp", NATIVE / "c_abi.cpp", *sorted(folder.glob("*.cpp"))]
    return link(["g++", "-shared", *_SANITIZED], compile_all(command, sources, work), work)
