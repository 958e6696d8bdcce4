"""A test that is skipped for a missing tool fails where all tools are to be there."""

from __future__ import annotations

import pytest

from tests.tools import REQUIRED, needs


def test_a_missing_tool_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REQUIRED, raising=False)
    assert needs(False, "redis-server").args == (True,)
    assert needs(True, "redis-server").args == (False,)


def test_a_missing_tool_fails_where_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRED, "required")
    with pytest.raises(pytest.UsageError, match="redis-server is missing"):
        needs(False, "redis-server")
    assert needs(True, "redis-server").args == (False,)
