"""What an engine on an address that others can reach answers."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from vllm_pd_plugin.engine_port.messages import DESCRIPTION_PATH
from vllm_pd_plugin.frontend.api.only_frontends import OnlyFrontends


@pytest.fixture
def client() -> TestClient:
    async def answer(_: object) -> PlainTextResponse:
        return PlainTextResponse("yes")

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])
    app.add_middleware(OnlyFrontends)
    return TestClient(app)


@pytest.mark.parametrize("path", [DESCRIPTION_PATH, "/health", "/metrics"])
def test_frontends_and_monitoring_get_what_they_need(client: TestClient, path: str) -> None:
    assert client.get(path).text == "yes"


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/invocations", "/tokenize", "/", "/health/x", "//health", "/pd/v1"]
)
def test_nobody_gets_anything_else(client: TestClient, path: str) -> None:
    assert client.post(path).status_code == 403
    assert client.get(path).status_code == 403
