"""Which vLLM this release works with, and what is elsewhere in one release line than in another.

Imports neither vLLM nor torch until it is called.
"""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any

from vllm_pd_plugin.errors import UnsupportedError

Minor = tuple[int, int]
"""(major, minor): one of vLLM's release lines."""

SUPPORTED_VLLM: tuple[Minor, ...] = ((0, 31), (0, 32))
"""Every release line that the tests run on; pyproject.toml agrees."""

SAME_MESSAGES: tuple[frozenset[Minor], ...] = (frozenset({(0, 31), (0, 32)}),)
"""Release lines whose engine cores say the same to their clients, so that a frontend of one goes
with engines of another. ``tests/minors`` has a frontend of the newer over engines of both."""

MOVED: dict[str, dict[Minor, str]] = {
    "CacheHitSource": {(0, 32): "vllm.v1.metrics.cache_hit_source"},
    "make_arg_parser": {
        (0, 31): "vllm.entrypoints.launchers.cli_args",
        (0, 33): "vllm.entrypoints.common.cli_args",
    },
    "validate_parsed_serve_args": {
        (0, 31): "vllm.entrypoints.launchers.cli_args",
        (0, 33): "vllm.entrypoints.common.cli_args",
    },
    "cli_env_setup": {
        (0, 31): "vllm.entrypoints.serve.utils.api_utils",
        (0, 33): "vllm.entrypoints.common.startup",
    },
}
"""What is not in one module in every release line that is known, 0.33 included: the module, from a
release line on. Before the first there is none."""


_RELEASE = re.compile(r"\d+(\.\d+)+(\.?post\d+)?(\+.*)?")
"""What a version of a release looks like; a build may add to it."""


def require_supported_vllm() -> None:
    """Raise UnsupportedError unless the installed vLLM is of a supported minor version."""
    check_version(_installed())


def check_version(version: str) -> None:
    """Raise UnsupportedError unless a version string is of a supported minor version."""
    if minor_of(version) in SUPPORTED_VLLM:
        return
    supported = ", ".join(f"{major}.{minor}.x" for major, minor in SUPPORTED_VLLM)
    raise UnsupportedError(
        f"vLLM {version} is not supported by this release of vllm-pd-plugin; "
        f"install vLLM {supported}, or another release of vllm-pd-plugin"
    )


def minor_of(version: str) -> Minor | None:
    """Return the release line of a version; None where it says none."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def understand_each_other(version: str, other: str) -> bool:
    """Say whether a frontend of one version goes with an engine of the other: the same, or releases
    of lines that say the same. What is no release may say anything."""
    if version == other:
        return True
    if not all(_RELEASE.fullmatch(each) for each in (version, other)):
        return False
    minors = {minor_of(version), minor_of(other)}
    return any(minors <= together for together in SAME_MESSAGES)


def home_of(name: str, minor: Minor) -> str | None:
    """Return the module that has a name of ``MOVED`` in a release line; None where none has."""
    homes = MOVED[name]
    since = max((start for start in homes if start <= minor), default=None)
    return None if since is None else homes[since]


@functools.cache
def moved(name: str) -> Any:
    """Return what the installed vLLM has under a name of ``MOVED``; None where it has no such."""
    version = _installed()
    check_version(version)
    home = home_of(name, minor_of(version) or min(SUPPORTED_VLLM))
    return None if home is None else getattr(importlib.import_module(home), name)


def _installed() -> str:
    from vllm.version import __version__

    return str(__version__)
