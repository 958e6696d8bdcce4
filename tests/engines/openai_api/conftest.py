"""The servers that all tests of the API ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import Engine, running
from tests.engines.conftest import Trio, TrioOf
from tests.engines.openai_api.servers import start_frontends


@pytest.fixture(scope="package")
def trio(trio_of: TrioOf) -> Trio:
    return trio_of("smollm2")


@pytest.fixture(scope="package")
def servers(trio: Trio, logs: Path) -> Iterator[dict[str, Engine]]:
    frontends = start_frontends(trio, logs)
    with running(list(frontends.values())):
        yield {"alone": trio.alone.engine, **frontends}


@pytest.fixture(params=["handed off", "local"])
def frontend(request: pytest.FixtureRequest, servers: dict[str, Engine]) -> Engine:
    return servers[request.param]


@pytest.fixture
def alone(servers: dict[str, Engine]) -> Engine:
    return servers["alone"]
