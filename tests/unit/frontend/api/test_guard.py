"""What is closed to who has no API key: all but what is named, whatever vLLM has."""

from __future__ import annotations

import argparse
import warnings

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.entrypoints.launchers.api_server.routers import register_api_routers

    from vllm_pd_plugin.frontend.api.guard import ADMIN_PREFIX, OPEN_TO_POST, OPEN_TO_READ, NeedsKey
    from vllm_pd_plugin.frontend.api.probes import PROXY_PATH

KEYED = {"Authorization": "Bearer right"}
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]


@pytest.fixture
def client() -> TestClient:
    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("yes")

    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("yes")
        await socket.close()

    routes = [
        WebSocketRoute("/v1/realtime", talk),
        Route("/{path:path}", answer, methods=[*METHODS, "OPTIONS"]),
    ]
    app = Starlette(routes=routes)
    app.add_middleware(NeedsKey, tokens=["other", "right"])
    return TestClient(app)


@pytest.fixture(scope="module")
def vllm_routes() -> list[tuple[str, str]]:
    """Every method and path of vLLM's own application for generation, with what developers get."""
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_SERVER_DEV_MODE", "1")
    patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    app = FastAPI()
    app.state.args = argparse.Namespace(
        enable_tokenizer_info_endpoint=True, enable_scale_out=True, tokens_only=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        register_api_routers(app.state.args, app, ("generate",), None)
    routes = [(m, r.path) for r in app.routes for m in getattr(r, "methods", None) or ["GET"]]
    patch.undo()
    return routes


def test_nothing_of_vllm_that_takes_a_request_is_open(
    client: TestClient, vllm_routes: list[tuple[str, str]]
) -> None:
    posts = {path for method, path in vllm_routes if method not in ("GET", "HEAD", "OPTIONS")}
    assert {"/invocations", "/tokenize", "/v1/completions", "/generative_scoring"} <= posts
    for path in posts - OPEN_TO_POST:
        assert client.post(path).status_code == 401, path
        assert client.post(path, headers=KEYED).text == "yes"


def test_what_is_open_is_there(vllm_routes: list[tuple[str, str]]) -> None:
    """An entry that names nothing would one day name something else."""
    there = {path for _, path in vllm_routes} | {"/metrics/", PROXY_PATH}
    assert there >= OPEN_TO_POST
    assert there >= OPEN_TO_READ - {"/docs/oauth2-redirect"}


@pytest.mark.parametrize("path", sorted(OPEN_TO_READ))
def test_monitoring_needs_no_key_to_read(client: TestClient, path: str) -> None:
    assert client.get(path).text == "yes"
    assert client.head(path).status_code == 200
    assert client.delete(path).status_code == 401


def test_the_admin_api_has_a_key_of_its_own(client: TestClient) -> None:
    assert client.post(f"{ADMIN_PREFIX}engines").text == "yes"
    assert client.post("/pd/v1").status_code == 401
    assert client.post("/x/pd/v1/engines").status_code == 401


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "path",
    ["/", "/new", "/v1/models", "//health", "/health/", "/HEALTH", "/ping/x", "//invocations"],
)
def test_a_path_that_is_not_named_is_closed(client: TestClient, method: str, path: str) -> None:
    assert client.request(method, f"http://testserver{path}").status_code == 401


@pytest.mark.parametrize("sent", ["Bearer wrong", "Basic right", "right", "Bearer", ""])
def test_another_key_is_none(client: TestClient, sent: str) -> None:
    answer = client.post("/invocations", headers={"Authorization": sent})
    assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})


def test_below_a_root_path_the_same_is_open(client: TestClient) -> None:
    behind = TestClient(client.app, root_path="/llm")
    assert behind.get("/llm/health").text == "yes"
    assert behind.post("/llm/invocations").status_code == 401


def test_a_browser_may_ask_before_it_sends_a_key(client: TestClient) -> None:
    assert client.options("/v1/chat/completions").status_code == 200


def test_a_websocket_needs_a_key_too(client: TestClient) -> None:
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/realtime"):
        pass
    with client.websocket_connect("/v1/realtime", headers=KEYED) as socket:
        assert socket.receive_text() == "yes"
