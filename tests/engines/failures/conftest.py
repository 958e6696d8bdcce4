"""One cluster for all tests of failing handoffs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import (
    running,
)
from tests.engines.failures.cluster import Cluster


@pytest.fixture(scope="package")
def cluster(logs: Path) -> Iterator[Cluster]:
    cluster = Cluster(logs)
    with running(cluster.engines()):
        yield cluster
        cluster.producer.stop()  # perhaps not the one that was started first


@pytest.fixture(autouse=True)
def _living_producer(cluster: Cluster) -> None:
    """A test that failed may have left a dead one."""
    if cluster.producer.process.poll() is not None:
        cluster.restart_producer()
