"""An engine that serves frontends, and a frontend that has attached to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.engine_core import FakeFrontend, ServingEngine


@pytest.fixture
def engine() -> Iterator[ServingEngine]:
    engine = ServingEngine()
    yield engine
    engine.server.close()


@pytest.fixture
def frontend(engine: ServingEngine) -> FakeFrontend:
    """One that has attached."""
    frontend = engine.frontend()
    frontend.attach()
    frontend.received.clear()
    frontend.payloads.clear()
    return frontend
