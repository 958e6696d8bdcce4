"""What unit tests share. Hypothesis draws the same examples at every run: what was green stays
green."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.fakes.producer import Producer

settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture
def producer() -> Producer:
    return Producer()
