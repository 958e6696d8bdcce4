"""Collect what a handoff needs besides PyTorch, for a machine without a network.

    python -m tests.gpu.site --python 3.12

Downloads wheels with pip and puts what is in them into ``build/gpu-site-3.12.zip``, which
``python -m tests.gpu`` of such a Python unpacks: numpy, pyzmq, msgspec, and NIXL for CUDA 13 if the
file stays small enough.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

NEEDED = ("numpy>=2", "pyzmq>=26", "msgspec>=0.19")
NIXL = ("nixl==1.5.1", "nixl-cu13==1.5.1")
MAX_BYTES = 56 * 2**20
"""It stays a file that can be sent by every way there is."""

_LEFT_OUT = ("nixl_ep_",)
"""NIXL's kernels for expert parallelism: half of its wheel."""

_GLIBC = range(39, 16, -1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default="3.12", help="of that machine (%(default)s)")
    args = parser.parse_args()
    target = site_for(args.python)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wheels = _download(NEEDED, Path(folder) / "needed", args.python)
        nixl = _download(NIXL, Path(folder) / "nixl", args.python)
        size = collect([*wheels, *nixl], target)
        if size > MAX_BYTES:
            print(f"with NIXL it has {size / 2**20:.1f} MiB, which is too much: without it")
            size = collect(wheels, target)
    print(f"{target}: {size / 2**20:.1f} MiB")
    return 0


def site_for(python: str) -> Path:
    """Return where the packages for a version of Python, such as 3.12, are collected."""
    return Path(__file__).parents[2] / "build" / f"gpu-site-{python}.zip"


def collect(wheels: Iterable[Path], target: Path) -> int:
    """Put what is in some wheels into one zip file; return its bytes."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as site:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if not name.startswith(_LEFT_OUT):
                        site.writestr(name, archive.read(name), zipfile.ZIP_DEFLATED)
    return target.stat().st_size


def _download(packages: Sequence[str], folder: Path, python: str) -> list[Path]:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
        "--implementation", "cp", "--python-version", python, "--dest", str(folder),
        *(word for n in _GLIBC for word in ("--platform", f"manylinux_2_{n}_x86_64")),
        "--platform", "manylinux2014_x86_64",
    ]  # fmt: skip
    subprocess.run([*command, *packages], check=True)
    return sorted(folder.glob("*.whl"))


if __name__ == "__main__":
    sys.exit(main())
