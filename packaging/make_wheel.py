"""Builds the wheel with the native modules (run by `make wheel`).

    python packaging/make_wheel.py FOLDER

One wheel serves every CPython from 3.11 on, and every torch from 2.13 on, though it is built beside
the one of this interpreter. The CUDA kernels are in it where nvcc is found; PD_USE_CUDA=0 or 1
decides otherwise (``setup.py``). auditwheel tags it with the oldest glibc that it runs on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "wheel"
REQUIREMENTS = ROOT / "requirements" / "wheel.txt"
OF_TORCH = ("libc10*.so", "libtorch*.so")
"""Libraries that a wheel finds in the process that loads it."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the wheel with the native modules.")
    parser.add_argument("folder", type=Path, help="gets the wheel, in the place of an older one")
    folder: Path = parser.parse_args().folder
    has_nvcc = find_nvcc() is not None
    use_cuda = os.environ.get("PD_USE_CUDA", "1" if has_nvcc else "0")
    print(
        f"PD_USE_CUDA={use_cuda}"
        + ("" if has_nvcc else ": there is no nvcc; set CUDA_HOME where it is"),
        flush=True,
    )
    for old in folder.glob("vllm_pd_plugin-*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory() as untagged:
        build(Path(untagged), use_cuda)
        tag(next(Path(untagged).glob("*.whl")), folder)
    print(*folder.glob("vllm_pd_plugin-*.whl"))
    return 0


def find_nvcc() -> str | None:
    """Return the CUDA compiler, sought where ``setup.py`` seeks it."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def build(folder: Path, use_cuda: str) -> None:
    """Build a wheel for this machine; compile what has changed since the last one."""
    base = BUILD / f"torch-{metadata.version('torch')}-cuda-{use_cuda}"
    for packed in base.glob("lib*/**/*.py"):
        packed.unlink()  # a module that was removed would be in the wheel
    base.mkdir(parents=True, exist_ok=True)
    config = base / "setup.cfg"
    config.write_text(f"[build]\nbuild_base = {base}\n")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"),
            *("-w", folder, ROOT),
        ],
        check=True,
        env={**os.environ, "PD_USE_CUDA": use_cuda, "DIST_EXTRA_CONFIG": str(config)},
    )


def tag(wheel: Path, folder: Path) -> None:
    """Write a wheel with the tag that it deserves, without debug symbols, to a folder."""
    tools = BUILD / "tools"
    have = tools / REQUIREMENTS.name
    if not have.exists() or have.read_text() != REQUIREMENTS.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", tools], check=True)
        pip = (tools / "bin" / "python", "-m", "pip")
        subprocess.run([*pip, "install", "-qq", "--no-deps", "-r", REQUIREMENTS], check=True)
        shutil.copy(REQUIREMENTS, have)
    subprocess.run(
        [
            *(tools / "bin" / "auditwheel", "repair", "--strip", "-w", folder),
            *(word for library in OF_TORCH for word in ("--exclude", library)),
            wheel,
        ],
        check=True,
        env={**os.environ, "PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"},
    )


if __name__ == "__main__":
    sys.exit(main())
