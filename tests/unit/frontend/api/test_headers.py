"""Headers of ours that a client misspells."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from vllm_pd_plugin.frontend.api.headers import CheckHeaders


@pytest.fixture
def client() -> TestClient:
    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("yes")

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])
    app.add_middleware(CheckHeaders, classes={"default", "batch"})
    return TestClient(app)


@pytest.mark.parametrize("name", ["default", "batch"])
def test_a_class_that_there_is_is_let_through(client: TestClient, name: str) -> None:
    assert client.post("/v1/completions", headers={"X-SLO-Class": name}).text == "yes"


@pytest.mark.parametrize("name", ["bach", "Batch", "", "batch,default"])
def test_a_class_that_there_is_not_is_refused_and_the_others_are_named(
    client: TestClient, name: str
) -> None:
    answer = client.post("/v1/completions", headers={"X-SLO-Class": name})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"] == (
        f"x-slo-class: there is no class {name!r}; allowed are batch, default"
    )
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", "x-slo-class", 400)


@pytest.mark.parametrize("seconds", ["2", "0.5", " 2.5 ", "1e3"])
def test_a_time_is_let_through(client: TestClient, seconds: str) -> None:
    assert client.post("/", headers={"X-Request-Timeout": seconds}).text == "yes"


@pytest.mark.parametrize("seconds", ["2s", "inf"])
def test_what_is_no_time_is_refused(client: TestClient, seconds: str) -> None:
    answer = client.post("/", headers={"X-Request-Timeout": seconds})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith("x-request-timeout: ")
    assert "a number of seconds above 0" in message


def test_who_only_looks_is_not_bothered(client: TestClient) -> None:
    assert client.get("/health", headers={"X-SLO-Class": "bach"}).text == "yes"


def test_a_long_value_is_not_thrown_back(client: TestClient) -> None:
    answer = client.post("/", headers={"X-SLO-Class": "x" * 5000})
    assert len(answer.content) < 500
