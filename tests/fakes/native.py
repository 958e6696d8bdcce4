"""A process whose native modules do not serve."""

from __future__ import annotations

import pytest

from vllm_pd_plugin.codecs import native, ops


def without_native_ops(patch: pytest.MonkeyPatch, why: str = "they were not built") -> None:
    """Let the references serve until ``patch`` is undone; the warning has not been given yet."""
    gone = native.Missing(why, "build them")
    patch.setattr(native, "missing", lambda on_cuda: gone)
    ops._say_that_the_reference_is_used.cache_clear()
