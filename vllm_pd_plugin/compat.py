"""Which vLLM this release works with. Imports neither vLLM nor torch until it is called."""

from __future__ import annotations

import re

from vllm_pd_plugin.errors import UnsupportedError

SUPPORTED_VLLM = ((0, 32),)
"""(major, minor) of every vLLM release line that the tests run on; pyproject.toml agrees."""


def require_supported_vllm() -> None:
    """Raise UnsupportedError unless the installed vLLM is of a supported minor version."""
    from vllm.version import __version__

    check_version(__version__)


def check_version(version: str) -> None:
    """Raise UnsupportedError unless a version string is of a supported minor version."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match and (int(match[1]), int(match[2])) in SUPPORTED_VLLM:
        return
    supported = ", ".join(f"{major}.{minor}.x" for major, minor in SUPPORTED_VLLM)
    raise UnsupportedError(
        f"vLLM {version} is not supported by this release of vllm-pd-plugin; "
        f"install vLLM {supported}, or another release of vllm-pd-plugin"
    )
