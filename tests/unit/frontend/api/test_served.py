"""Who has served a request, in the headers of its answer and in the log."""

from __future__ import annotations

import asyncio
import logging
import warnings
import weakref
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route as HttpRoute
from starlette.testclient import TestClient

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.api.served import SayRoute, headers_of, note
    from vllm_pd_plugin.frontend.routing.choice import Reason, Route

P, D, E = "http://p:1", "http://d:1", "http://e:1"
HANDED_OFF = Route(P, D, Reason.DISAGGREGATED)
LOCAL = Route(None, E, Reason.SHORT)


def underway(route: Route | None, attempt: int = 1, name: str = "r") -> Any:
    return SimpleNamespace(course=SimpleNamespace(route=route, attempt=attempt, id=name))


def app_of(endpoint: Any) -> Starlette:
    app = Starlette(routes=[HttpRoute("/{path:path}", endpoint, methods=["GET", "POST"])])
    app.add_middleware(SayRoute)
    return app


def client_of(endpoint: Any) -> TestClient:
    return TestClient(app_of(endpoint))


def test_an_answer_says_which_engines_it_is_of() -> None:
    async def answer(request: Request) -> Response:
        note(underway(HANDED_OFF, attempt=2))
        return PlainTextResponse("yes", headers={"x-other": "kept"})

    got = client_of(answer).post("/v1/completions")
    said = {name: got.headers[name] for name in got.headers if name.startswith("x-")}
    assert said == {
        "x-other": "kept",
        "x-pd-route": "disaggregated",
        "x-pd-prefill-engine": P,
        "x-pd-decode-engine": D,
        "x-pd-attempts": "2",
    }
    assert got.text == "yes"


def test_a_stream_is_routed_when_it_is_read_and_says_it_all_the_same() -> None:
    async def events() -> AsyncIterator[str]:
        await asyncio.sleep(0)
        note(underway(LOCAL))
        yield "one,"
        yield "two"

    async def answer(request: Request) -> Response:
        return StreamingResponse(events())

    got = client_of(answer).post("/v1/completions")
    assert got.headers["x-pd-route"] == "short"
    assert got.headers["x-pd-prefill-engine"] == got.headers["x-pd-decode-engine"] == E
    assert got.text == "one,two"


def test_what_is_no_request_to_engines_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def answer(request: Request) -> Response:
        note(underway(None))
        note(None)
        return Response(status_code=204)

    with caplog.at_level(logging.INFO):
        got = client_of(answer).get("/health")
    assert got.status_code == 204
    assert not [name for name in got.headers if name.startswith("x-pd")]
    assert not [r for r in caplog.records if r.name.endswith("served")]


def test_requests_that_go_on_at_once_are_told_apart() -> None:
    async def story() -> list[str]:
        both = asyncio.Barrier(2)

        async def answer(request: Request) -> Response:
            await both.wait()
            note(underway(HANDED_OFF if request.url.path == "/long" else LOCAL))
            await both.wait()
            return PlainTextResponse("yes")

        transport = httpx.ASGITransport(app_of(answer))
        async with httpx.AsyncClient(transport=transport, base_url="http://f") as client:
            got = await asyncio.gather(client.get("/long"), client.get("/short"))
        return [each.headers["x-pd-decode-engine"] for each in got]

    assert asyncio.run(story()) == [D, E]


def test_several_choices_name_each_engine_once() -> None:
    served = [underway(HANDED_OFF), underway(LOCAL, 3), underway(HANDED_OFF)]
    assert headers_of(served) == {
        "x-pd-route": "disaggregated,short",
        "x-pd-prefill-engine": f"{P},{E}",
        "x-pd-decode-engine": f"{D},{E}",
        "x-pd-attempts": "3",
    }


def test_the_log_has_a_line_with_its_route_for_each(caplog: pytest.LogCaptureFixture) -> None:
    async def answer(request: Request) -> Response:
        note(underway(HANDED_OFF, name="cmpl-1"))
        return PlainTextResponse("no", 503)

    with caplog.at_level(logging.INFO):
        client_of(answer).post("/v1/completions")
    (line,) = [r.getMessage() for r in caplog.records if r.name.endswith("served")]
    assert line == (
        f"POST /v1/completions 503 route=disaggregated prefill-engine={P} decode-engine={D} "
        "attempts=1 ids=cmpl-1"
    )


def test_where_nobody_asks_nothing_is_kept() -> None:
    class Noted:
        course = underway(HANDED_OFF).course

    begun: Any = Noted()
    is_kept = weakref.ref(begun)
    note(begun)  # outside of the middleware
    del begun
    assert is_kept() is None
