"""Builds the native extension where it can; everything else is in pyproject.toml.

Without a compiler or without torch at build time (``pip install --no-build-isolation`` to have it),
the package is installed all the same, and runs with the reference ops. PD_USE_CUDA=0 or 1 decides
about the CUDA kernels; by default they are built where torch is a CUDA build and nvcc is found.
"""

import os
from pathlib import Path

from setuptools import setup

# The oldest torch whose stable ABI has all that is used.
TORCH_TARGET_VERSION = "0x020d000000000000"
# Codes are to be the same on every machine: no multiplication is fused with an addition.
OPTIMIZED = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")


def extension() -> dict:
    try:
        from torch.utils import cpp_extension
    except ImportError:
        print("torch is not there: vllm-pd-plugin is installed without its native extension")
        return {}
    by_default = bool(cpp_extension.CUDA_HOME) and cpp_extension.torch.version.cuda is not None
    use_cuda = os.environ.get("PD_USE_CUDA", str(int(by_default))) == "1"
    sources = ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    defines = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
    if use_cuda:
        sources += sorted(map(str, Path("csrc/cuda").glob("*.cu")))
        defines.append(("PD_USE_CUDA", None))
    kind = cpp_extension.CUDAExtension if use_cuda else cpp_extension.CppExtension
    module = kind(
        "vllm_pd_plugin._C",
        sources,
        depends=sorted(map(str, [*Path("csrc").rglob("*.h"), *Path("csrc").rglob("*.cuh")])),
        define_macros=defines,
        extra_compile_args={"cxx": [*OPTIMIZED, "-Wall"], "nvcc": ["-O3", "-fmad=false"]},
        py_limited_api=True,
        optional=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension())
