"""Paths of vLLM's API that a frontend has not."""

from __future__ import annotations

import argparse
import warnings

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.entrypoints.launchers.api_server.routers import register_api_routers
    from vllm.entrypoints.pooling.classify.api_router import router as classify_router
    from vllm.entrypoints.pooling.embed.api_router import router as embed_router
    from vllm.entrypoints.pooling.pooling.api_router import router as pooling_router
    from vllm.entrypoints.pooling.scoring.api_router import router as score_router
    from vllm.entrypoints.serve.fault_tolerance.api_router import (
        register_fault_tolerance_api_router,
    )
    from vllm.entrypoints.serve.profile.api_router import router as profile_router
    from vllm.entrypoints.speech_to_text.factories import register_speech_to_text_api_routers

    from vllm_pd_plugin.frontend.api.unserved import (
        OF_ONE_ENGINE,
        OF_ONE_FRONTEND,
        OF_OTHER_MODELS,
        SayUnserved,
        unserved,
    )


@pytest.fixture
def client() -> TestClient:
    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("yes")

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])
    app.add_middleware(SayUnserved, is_alone=True)
    return TestClient(app)


def paths_of(app: FastAPI) -> set[str]:
    there = {getattr(route, "path", "") for route in app.routes}
    return there - {getattr(route, "path", "") for route in FastAPI().routes}


@pytest.fixture(scope="module")
def generating() -> set[str]:
    """Every path of vLLM's own server that generates, with what developers get."""
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_SERVER_DEV_MODE", "1")
    app = FastAPI()
    app.state.args = argparse.Namespace(
        enable_tokenizer_info_endpoint=True, enable_scale_out=True, tokens_only=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        register_api_routers(app.state.args, app, ("generate",), None)
    register_fault_tolerance_api_router(app)
    app.include_router(profile_router)
    patch.undo()
    return paths_of(app)


@pytest.mark.parametrize("path", sorted(OF_ONE_ENGINE))
def test_what_acts_on_an_engine_is_not_implemented_and_says_whom_to_ask(
    client: TestClient, path: str
) -> None:
    for answer in (client.post(path), client.get(path)):
        assert answer.status_code == 501
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("NotImplementedError", 501)
        assert error["message"].startswith(f"{path} acts on one engine")
        assert "ask each engine's own server" in error["message"]


@pytest.mark.parametrize("path", sorted(OF_OTHER_MODELS))
def test_what_other_models_do_is_not_found_and_says_what_there_is(
    client: TestClient, path: str
) -> None:
    answer = client.post(path, json={"model": "M", "input": "x"})
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "NotFoundError"
    assert "generates text" in answer.json()["error"]["message"]


def test_every_such_path_is_one_of_vllm_s(generating: set[str]) -> None:
    """An entry that names nothing would one day name something else."""
    assert generating >= OF_ONE_ENGINE


def test_every_path_of_other_models_is_known() -> None:
    app = FastAPI()
    app.state.args = argparse.Namespace()
    for router in (pooling_router, classify_router, embed_router, score_router):
        app.include_router(router)
    register_speech_to_text_api_routers(app, ("transcription",))
    assert paths_of(app) == set(OF_OTHER_MODELS)


@pytest.mark.parametrize("path", ["/", "/v1/completions", "/v1/models", "/sleepy", "/v1/sleep"])
def test_other_paths_are_let_through(client: TestClient, path: str) -> None:
    assert client.get(path).text == "yes"


def test_below_a_root_path_it_is_the_same(client: TestClient) -> None:
    behind = TestClient(client.app, root_path="/llm")
    assert behind.post("/llm/sleep").status_code == 501
    assert behind.post("/llm/v1/completions").text == "yes"


@pytest.mark.parametrize("path", sorted(OF_ONE_FRONTEND))
def test_adapters_are_loaded_where_there_is_one_frontend_only(path: str) -> None:
    assert unserved(path, is_alone=True) is None
    answer = unserved(path, is_alone=False)
    assert answer is not None
    assert answer.status_code == 501
    assert b"--lora-modules" in answer.body
