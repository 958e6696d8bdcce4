"""An environment that has the wheel installed, and vLLM from this one.

python -m tests.wheel    builds the wheel
"""

from __future__ import annotations

import functools
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "wheel"
_VLLM = "#!{python}\nimport sys\nfrom vllm.entrypoints.cli.main import main\nsys.exit(main())\n"


@functools.cache
def wheel() -> Path:
    """Build the wheel, as ``make wheel`` does; some seconds where nothing is to be compiled."""
    folder = BUILD / "for-tests"
    subprocess.run([sys.executable, ROOT / "packaging" / "make_wheel.py", folder], check=True)
    (built,) = folder.glob("*.whl")
    return built


@functools.cache
def environment() -> Path:
    """Make the environment anew; return it.

    The other packages are found in this interpreter's environment, by a path: its editable install
    of the checkout needs a ``.pth`` file there to be read, and none is.
    """
    folder = BUILD / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    # Before the path is there: pip is not to see the other installation.
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", python, "install", "-q"),
            *("--no-deps", "--no-index", wheel()),
        ],
        check=True,
    )
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout
    (Path(site.strip()) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    vllm = folder / "bin" / "vllm"
    vllm.write_text(_VLLM.format(python=python))
    vllm.chmod(0o755)
    return folder


if __name__ == "__main__":
    wheel()
