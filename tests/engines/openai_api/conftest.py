"""The servers that all tests of the API ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import Engine, running
from tests.engines.openai_api.servers import Servers


@pytest.fixture(scope="package")
def servers(logs: Path) -> Iterator[dict[str, Engine]]:
    servers = Servers(logs)
    with running([servers.alone, servers.up]):
        local = servers.start_local(logs)
        with running([local]):
            yield {"alone": servers.alone, "handed off": servers.up, "local": local}


@pytest.fixture(params=["handed off", "local"])
def frontend(request: pytest.FixtureRequest, servers: dict[str, Engine]) -> Engine:
    return servers[request.param]


@pytest.fixture
def alone(servers: dict[str, Engine]) -> Engine:
    return servers["alone"]
