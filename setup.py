"""Builds the native modules; everything else is in pyproject.toml.

``vllm_pd_plugin._C`` has the ops and their CPU kernels, ``vllm_pd_plugin._C_cuda`` their CUDA
kernels: what is wrong with one does not cost the other. Both need torch's headers to be built
(``pip install --no-build-isolation``), and then serve every torch from TORCH_TARGET_VERSION on.

PD_USE_CUDA says what is wanted:
    auto (default): what can be built, the CUDA kernels only beside a CUDA build of torch. Without
        torch or a compiler the package is installed all the same, and runs with the reference ops.
    0, 1: no CUDA kernels, or CUDA kernels, beside any build of torch. What cannot be built is an
        error then.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.errors import CompileError
from setuptools.modified import newer_group

# The oldest torch whose stable ABI has all that is used; codecs/native.py agrees.
TORCH_TARGET_VERSION = "0x020d000000000000"
# Codes are to be the same on every machine: no multiplication is fused with an addition.
OPTIMIZED = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
OPTIMIZED_CUDA = ("-O3", "-std=c++17", "-fmad=false", "-Xcompiler", "-fPIC")
# GPUs of the same generation run them too; the newest is compiled when loaded for later ones.
ARCHITECTURES = (75, 80, 90, 100)
DEPENDS = [
    "setup.py",
    *sorted(map(str, [*Path("csrc").rglob("*.h"), *Path("csrc").rglob("*.cuh")])),
]


def native_modules() -> dict:
    """Return what setuptools is told of the native modules."""
    wanted = os.environ.get("PD_USE_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"PD_USE_CUDA={wanted} is not known; allowed are auto, 0 and 1")
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if wanted != "auto":
            raise SystemExit(
                f"PD_USE_CUDA={wanted} asks for native modules, and {error}: "
                "install torch, and use pip's --no-build-isolation"
            ) from error
        print("torch is not there: vllm-pd-plugin is installed without its native modules")
        return {}
    nvcc = find_nvcc()
    if nvcc is None and wanted == "1":
        raise SystemExit("PD_USE_CUDA=1 asks for CUDA kernels, and nvcc is missing: set CUDA_HOME")
    has_cuda = nvcc is not None and (wanted == "1" or (wanted == "auto" and torch.version.cuda))
    common = {
        "define_macros": [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        "extra_compile_args": [*OPTIMIZED, "-Wall"],
        "py_limited_api": True,
        "optional": wanted == "auto",
    }
    described = [cpu_module(), cuda_module()] if has_cuda else [cpu_module()]

    class Build(BuildExtension):
        """nvcc compiles kernels, which know nothing of torch. Torch's own way of calling it wants a
        CUDA build of torch."""

        def build_extension(self, extension: Extension) -> None:
            kernels = [name for name in extension.depends if name.endswith(".cu")]
            if kernels:
                compile_kernels(self, nvcc, kernels, extension)
            super().build_extension(extension)

    return {
        "ext_modules": [CppExtension(**each, **common) for each in described],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def cpu_module() -> dict:
    """Return what makes ``_C`` what it is."""
    kernels = sorted(map(str, Path("csrc/cpu").glob("*.cpp")))
    return {
        "name": "vllm_pd_plugin._C",
        "sources": ["csrc/bindings/cpu.cpp", *kernels],
        "depends": DEPENDS,
    }


def cuda_module() -> dict:
    """Return what makes ``_C_cuda`` what it is; its kernels are among what it depends on."""
    return {
        "name": "vllm_pd_plugin._C_cuda",
        "sources": ["csrc/bindings/cuda.cpp"],
        "depends": [*DEPENDS, *sorted(map(str, Path("csrc/cuda").glob("*.cu")))],
        # Linked in, and out of sight: torch has a CUDA runtime of its own, of any version.
        "libraries": ["cudart_static", "dl", "pthread", "rt"],
        "extra_link_args": ["-Wl,--exclude-libs,libcudart_static.a"],
    }


def compile_kernels(build: Command, nvcc: str, kernels: list, extension: Extension) -> None:
    """Compile what is out of date, and let the extension be linked with it. build: the command that
    builds extensions."""
    includes, libraries = folders_of(nvcc)
    extension.include_dirs += includes
    extension.library_dirs += libraries
    options = architecture_options(nvcc)
    for kernel in kernels:
        compiled = Path(build.build_temp, kernel).with_suffix(".o")
        compiled.parent.mkdir(parents=True, exist_ok=True)
        if build.force or newer_group([*DEPENDS, kernel], compiled):
            build.spawn([nvcc, "-c", kernel, "-o", str(compiled), *OPTIMIZED_CUDA, *options])
        extension.extra_objects.append(str(compiled))


def find_nvcc() -> str | None:
    """Return the CUDA compiler: that of CUDA_HOME if it is set, or of the PATH, or of the usual
    place."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def folders_of(nvcc: str) -> tuple[list, list]:
    """Return where a toolkit's headers and its libraries lie, as nvcc itself has them."""
    told = answer_of(nvcc, "-dryrun", "-x", "cu", "-c", os.devnull)
    folders = dict(re.findall(r"(?m)^#\$ (INCLUDES|LIBRARIES)=(.*)$", told))
    return (
        re.findall(r'"-I([^"]+)"', folders.get("INCLUDES", "")),
        re.findall(r'"-L([^"]+)"', folders.get("LIBRARIES", "")),
    )


def architecture_options(nvcc: str) -> list:
    """Return for which GPUs nvcc is to compile: those of ARCHITECTURES that it knows."""
    listed = re.findall(r"compute_(\d+)\b", answer_of(nvcc, "--list-gpu-arch"))
    known = [number for number in ARCHITECTURES if str(number) in listed]
    if not known:
        raise CompileError(f"{nvcc} knows none of the GPU architectures {ARCHITECTURES}")
    codes = [(number, f"sm_{number}") for number in known]
    codes.append((known[-1], f"compute_{known[-1]}"))
    return [f"-gencode=arch=compute_{number},code={code}" for number, code in codes]


def answer_of(nvcc: str, *options: str) -> str:
    """Return what nvcc prints. Raises CompileError where it fails."""
    try:
        done = subprocess.run([nvcc, *options], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"{nvcc} does not work: {error}") from error
    return done.stdout + done.stderr


setup(**native_modules())
