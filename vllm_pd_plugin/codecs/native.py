"""The native modules; their only importer, and why one of them does not serve.

Importing ``_C`` registers the ops with their CPU kernels; importing ``_C_cuda``, after it, their
CUDA kernels. A fault of the second leaves the first alone. ``_C_cuda`` is imported when a CUDA
tensor is given first, which is when its absence counts: it asks for the driver, and that must not
be done before a process forks.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re

import torch

OLDEST_TORCH = (2, 13)
"""(major, minor): its stable ABI has all that the modules use; ``setup.py`` builds for it."""

_BUILD = (
    "in a checkout of vllm-pd-plugin run `make wheel`, "
    "then here `pip install --force-reinstall --no-deps dist/*.whl`"
)


_NO_DRIVER = "there is no CUDA driver here"
"""What ``_C_cuda`` says; see ``csrc/bindings/cuda.cpp``."""


@dataclasses.dataclass(frozen=True, slots=True)
class Missing:
    """A native module that does not serve. why: half a sentence. remedy: what to do about it."""

    why: str
    remedy: str


@functools.cache
def missing(on_cuda: bool) -> Missing | None:
    """Return why the native ops do not serve tensors on a CPU, or on a GPU; None where they do."""
    if on_cuda:
        return missing(on_cuda=False) or _missing_cuda(torch.version.cuda)
    return refused_torch(torch.__version__) or _import("_C", _BUILD)


def refused_torch(version: str) -> Missing | None:
    """Say why a torch cannot load the modules, which link against its library."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match and (int(match[1]), int(match[2])) >= OLDEST_TORCH:
        return None
    needed = ".".join(map(str, OLDEST_TORCH))
    return Missing(
        f"torch {version} is here, and {needed} or newer is needed",
        f"install a vLLM that comes with torch {needed} or newer",
    )


def _missing_cuda(cuda_version: str | None) -> Missing | None:
    """cuda_version: what torch was built with; None for a CPU and for a ROCm build."""
    if cuda_version is None:
        return Missing("this torch is not a CUDA build", "there are no kernels for other GPUs")
    missing = _import("_C_cuda", f"beside a CUDA toolkit that the driver serves, {_BUILD}")
    if missing is not None and _NO_DRIVER in missing.why:
        return Missing(
            missing.why, "run it where an NVIDIA driver is, or give the container its GPU"
        )
    return missing


def _import(name: str, remedy: str) -> Missing | None:
    whole_name = f"vllm_pd_plugin.{name}"
    try:
        importlib.import_module(whole_name)
    except ModuleNotFoundError as error:
        if error.name != whole_name:
            return Missing(str(error), remedy)
        return Missing(f"{whole_name} was not built", remedy)
    except ImportError as error:
        return Missing(str(error), remedy)
    return None
