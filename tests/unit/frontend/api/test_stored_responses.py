"""Responses that are stored by one of several workers."""

from __future__ import annotations

import asyncio
import itertools
import json
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.api.stored_responses import Holder, ToHolder, taking_from_workers


class Worker:
    """One that keeps what it has made. lost: set when a client has left a stream."""

    def __init__(self, holder: Holder) -> None:
        self.holder = holder
        self.kept: dict[str, str] = {}
        self.seen: list[Request] = []
        self.bodies: list[bytes] = []
        self.lost = asyncio.Event()
        routes = [
            Route("/v1/responses", self.create, methods=["POST"]),
            Route("/v1/responses/render", self.other, methods=["POST"]),
            Route("/v1/responses/{id}", self.retrieve),
            Route("/v1/responses/{id}/cancel", self.cancel, methods=["POST"]),
            Route("/{path:path}", self.other, methods=["GET", "POST"]),
        ]
        self.app = Starlette(routes=routes)
        self.app.add_middleware(ToHolder, holder=holder)
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://frontend"
        )

    async def create(self, request: Request) -> Response:
        self.seen.append(request)
        self.bodies.append(await request.body())
        try:
            body = json.loads(self.bodies[-1])
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            return PlainTextResponse("no request", 400)
        before = body.get("previous_response_id")
        if before is not None and before not in self.kept:
            return PlainTextResponse("not found", 404)
        self.kept[body["request_id"]] = body["input"]
        return JSONResponse({"id": body["request_id"], "worker": self.holder.number})

    async def retrieve(self, request: Request) -> Response:
        self.seen.append(request)
        found = self.kept.get(request.path_params["id"])
        if found is None:
            return PlainTextResponse("not found", 404)
        if request.query_params.get("stream") == "true":
            return StreamingResponse(self.stream(), media_type="text/event-stream")
        return PlainTextResponse(found, headers={"x-of": str(self.holder.number)})

    async def stream(self) -> AsyncIterator[bytes]:
        try:
            yield b"data: 1\n\n"
            await asyncio.Event().wait()
        finally:
            self.lost.set()

    async def cancel(self, request: Request) -> Response:
        return PlainTextResponse("cancelled" if request.path_params["id"] in self.kept else "no")

    async def other(self, request: Request) -> Response:
        return PlainTextResponse(f"other of {self.holder.number}")

    async def make(self, **body: Any) -> httpx.Response:
        return await self.client.post("/v1/responses", json={"input": "x", **body})


Story = Callable[[list[Worker]], Coroutine[Any, Any, None]]


def run(folder: Path, story: Story, num_up: int = 3) -> None:
    """Let a story happen among three workers, of which so many can be reached by others."""

    async def tell() -> None:
        workers = [Worker(Holder(number, 3, folder)) for number in range(3)]
        async with AsyncExitStack() as stack:
            for worker in workers[:num_up]:
                await stack.enter_async_context(taking_from_workers(worker.app, worker.holder))
            await story(workers)

    asyncio.run(asyncio.wait_for(tell(), 30))


def test_a_response_is_found_by_whichever_worker_is_asked(tmp_path: Path) -> None:
    async def story(workers: list[Worker]) -> None:
        for maker, asked in itertools.product(workers, workers):
            made = (await maker.make()).json()
            assert made["worker"] == maker.holder.number  # no request goes further than it must
            assert made["id"].startswith("resp_")
            found = await asked.client.get(f"/v1/responses/{made['id']}")
            assert (found.status_code, found.text) == (200, "x")
            assert found.headers["x-of"] == str(maker.holder.number)
            ended = await asked.client.post(f"/v1/responses/{made['id']}/cancel")
            assert ended.text == "cancelled"

    run(tmp_path, story)


def test_a_response_goes_on_where_the_one_before_is_kept(tmp_path: Path) -> None:
    async def story(workers: list[Worker]) -> None:
        first = (await workers[0].make()).json()["id"]
        second = (await workers[1].make(previous_response_id=first)).json()
        assert second["worker"] == 0
        third = (await workers[2].make(previous_response_id=second["id"])).json()
        assert third["worker"] == 0
        assert workers[1].kept == workers[2].kept == {}

    run(tmp_path, story)


def test_an_id_that_a_client_has_chosen_is_found_too(tmp_path: Path) -> None:
    async def story(workers: list[Worker]) -> None:
        for number in range(12):
            made = await workers[number % 3].make(request_id=f"mine-{number}")
            assert made.json()["id"] == f"mine-{number}"
            found = await workers[(number + 1) % 3].client.get(f"/v1/responses/mine-{number}")
            assert found.text == "x"
        assert all(worker.kept for worker in workers)

    run(tmp_path, story)


def test_an_id_that_was_chosen_for_another_worker_than_the_response_before_is_refused(
    tmp_path: Path,
) -> None:
    async def story(workers: list[Worker]) -> None:
        before = (await workers[0].make()).json()["id"]
        holder = workers[0].holder
        same, other = (
            next(f"n{n}" for n in range(99) if (holder.holder_of(f"n{n}") == 0) is is_own)
            for is_own in (True, False)
        )
        made = await workers[1].make(previous_response_id=before, request_id=same)
        assert made.json() == {"id": same, "worker": 0}
        refused = await workers[1].make(previous_response_id=before, request_id=other)
        assert refused.status_code == 400
        assert "leave request_id out" in refused.json()["error"]["message"]

    run(tmp_path, story)


@pytest.mark.parametrize("asked", range(3))
def test_what_nobody_has_made_is_not_found(tmp_path: Path, asked: int) -> None:
    async def story(workers: list[Worker]) -> None:
        for number in range(6):
            answer = await workers[asked].client.get(f"/v1/responses/resp_{number}")
            assert answer.status_code == 404
            answer = await workers[asked].make(previous_response_id=f"resp_{number}")
            assert answer.status_code == 404

    run(tmp_path, story)


def test_a_worker_that_is_not_there_is_said(tmp_path: Path) -> None:
    async def story(workers: list[Worker]) -> None:
        for number in range(9):
            name = f"resp_{number}"
            answer = await workers[0].client.get(f"/v1/responses/{name}")
            lost = workers[0].holder.holder_of(name) == 2
            assert answer.status_code == (503 if lost else 404)

    run(tmp_path, story, num_up=2)


def test_what_was_handed_on_is_not_handed_on_again(tmp_path: Path) -> None:
    """Were two of different minds, a request would go round for ever."""

    async def story(workers: list[Worker]) -> None:
        name = next(f"n{n}" for n in range(99) if workers[0].holder.holder_of(f"n{n}") == 1)
        async with taking_from_workers(workers[2].app, Holder(1, 3, tmp_path)):
            answer = await workers[0].client.get(f"/v1/responses/{name}")
        assert answer.status_code == 404
        assert len(workers[2].seen) == 1

    run(tmp_path, story, num_up=1)


def test_the_other_worker_gets_what_the_client_has_sent(tmp_path: Path) -> None:
    async def story(workers: list[Worker]) -> None:
        made = (await workers[1].make(input="\U0001f600 \u00e9")).json()["id"]
        headers = {"Authorization": "Bearer K", "X-SLO-Class": "batch"}
        path = f"/v1/responses/{made}?stream=false&starting_after=3"
        assert (await workers[0].client.get(path, headers=headers)).text == "\U0001f600 \u00e9"
        [_, seen] = workers[1].seen
        assert seen.headers["authorization"] == "Bearer K"
        assert seen.headers["x-slo-class"] == "batch"
        assert seen.query_params["starting_after"] == "3"

    run(tmp_path, story)


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b'"x"', b"[" * 100_000])
def test_a_body_that_is_none_is_vllm_s_to_refuse(tmp_path: Path, body: bytes) -> None:
    async def story(workers: list[Worker]) -> None:
        answer = await workers[0].client.post("/v1/responses", content=body)
        assert (answer.status_code, answer.text) == (400, "no request")
        assert workers[0].bodies == [body]

    run(tmp_path, story)


def test_other_paths_are_answered_here(tmp_path: Path) -> None:
    async def story(workers: list[Worker]) -> None:
        for path in ("/v1/responses/render", "/v1/completions", "/v1/responses/a/b/cancel"):
            assert (await workers[0].client.post(path)).text == "other of 0"

    run(tmp_path, story)


def test_a_client_that_leaves_ends_what_another_worker_does_for_it(tmp_path: Path) -> None:
    async def story(workers: list[Worker]) -> None:
        made = (await workers[1].make()).json()["id"]
        got: asyncio.Queue[Any] = asyncio.Queue()
        gone = asyncio.Event()
        scope = {
            "type": "http", "method": "GET", "path": f"/v1/responses/{made}", "headers": [],
            "query_string": b"stream=true", "root_path": "", "http_version": "1.1",
        }  # fmt: skip

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            got.put_nowait(message)

        asked: Any = workers[0].app(scope, receive, send)
        task = asyncio.create_task(asked)
        assert (await got.get())["status"] == 200
        assert (await got.get())["body"] == b"data: 1\n\n"
        gone.set()
        await task
        await workers[1].lost.wait()

    run(tmp_path, story)


def test_a_worker_takes_the_place_of_one_that_was_killed(tmp_path: Path) -> None:
    holder = Holder.parse("1/3", tmp_path)
    holder.socket_of(1).touch()

    async def story(workers: list[Worker]) -> None:
        made = (await workers[1].make()).json()["id"]
        assert (await workers[0].client.get(f"/v1/responses/{made}")).text == "x"

    run(tmp_path, story)
