"""What unit tests share. Hypothesis draws the same examples at every run: what was green stays
green."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.fakes.producer import Producer

settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture
def producer() -> Producer:
    return Producer()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch's threads wait for each other by spinning: where others work too, that is slow."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
