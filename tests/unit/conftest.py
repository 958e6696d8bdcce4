"""What unit tests share. Hypothesis draws the same examples at every run: what was green stays
green."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.fakes.producer import Producer

settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # a machine that does something else, too
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """Whatever one test does to loggers, and what vLLM imports does to them, the next test finds
    what we log."""
    logger = logging.getLogger("vllm_pd_plugin")
    before, logger.parent = logger.parent, logging.getLogger()
    logging.getLogger().setLevel(logging.WARNING)
    yield
    logger.parent = before


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
