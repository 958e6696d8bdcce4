"""Stage: what the machine is."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.gpu.notes import Notes

ROOT = Path(__file__).parents[2]


def run(notes: Notes) -> None:
    facts = {
        "commit": _said(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "nvcc": _said(["nvcc", "--version"]),
        "cores": str(os.cpu_count()),
    }
    if not notes.is_stand_in:
        notes.check(torch.cuda.is_available(), "torch.cuda.is_available() is False")
        if torch.cuda.is_available():
            facts |= _of_gpu()
    for name, text in facts.items():
        notes.fact(name, text)


def _of_gpu() -> dict[str, str]:
    found = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "GPU": found.name,
        "compute capability": f"{found.major}.{found.minor}",
        "multiprocessors": str(found.multi_processor_count),
        "memory": f"{found.total_memory / 2**30:.1f} GiB",
        "L2": f"{found.L2_cache_size / 2**20:.0f} MiB",
        "driver": _said(query),
    }


def _said(command: Sequence[str]) -> str:
    """Return the last line of what a command prints."""
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {type(error).__name__}"
    return (told.stdout.strip().splitlines() or [""])[-1]
