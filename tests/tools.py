"""What the tests need that pip does not install: skipped without it, but not where all is there."""

from __future__ import annotations

import os

import pytest

REQUIRED = "PD_TEST_TOOLS"
"""Environment: ``required`` fails what would be skipped; ``.ci/run`` sets it."""


def needs(is_there: bool, what: str) -> pytest.MarkDecorator:
    """Skip where ``what`` is missing; or fail, see ``REQUIRED``.

    Raises:
        pytest.UsageError: it is missing, and all tools are required.
    """
    reason = f"{what} is missing; see `make tools` and `make setup`"
    if not is_there and os.environ.get(REQUIRED) == "required":
        raise pytest.UsageError(reason)
    return pytest.mark.skipif(not is_there, reason=reason)
