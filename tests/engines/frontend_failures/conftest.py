"""One cluster for all tests of a frontend whose engines fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.alone import Alone
from tests.engine import running
from tests.engines.frontend_failures.cluster import Cluster


@pytest.fixture(scope="package")
def cluster(logs: Path, alone_of: Callable[[str], Alone]) -> Iterator[Cluster]:
    cluster = Cluster(logs, alone_of("tiny-llama"))
    with running([cluster.frontend]):
        yield cluster


@pytest.fixture(autouse=True)
def _whole(cluster: Cluster) -> None:
    cluster.wait_until_whole()
