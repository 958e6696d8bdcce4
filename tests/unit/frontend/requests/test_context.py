"""What headers say of a request, and what a client that is turned away is told."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from starlette.datastructures import Headers

from vllm_pd_plugin.frontend.admission import Gate
from vllm_pd_plugin.frontend.requests.context import (
    ContextMiddleware,
    RequestContext,
    current,
    name_of_session,
    parse_timeout,
    read_context,
)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, RequestContext(None, math.inf)),
        ({"x-slo-class": "batch"}, RequestContext("batch", math.inf)),
        ({"X-Request-Timeout": "1.5"}, RequestContext(None, 1.5)),
        ({"x-request-timeout": "soon"}, RequestContext(None, math.inf)),
    ],
)
def test_headers_are_read_and_a_time_that_nobody_has_checked_fails_nothing(
    headers: dict[str, str], expected: RequestContext
) -> None:
    assert read_context(Headers(headers)) == expected


@pytest.mark.parametrize("text", ["2s", "", "0", "-3", "nan", "inf", "-inf", "1,5", "soon"])
def test_what_is_no_time_is_told_what_is_one(text: str) -> None:
    with pytest.raises(ValueError, match="a number of seconds above 0"):
        parse_timeout(text)


def answer(status: int, own_retry: bytes | None = None) -> tuple[dict[bytes, bytes], Any]:
    """Return the headers of an answer that has come through the middleware, and what the
    application saw."""
    seen: list[RequestContext] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(current())
        headers = [] if own_retry is None else [(b"retry-after", own_retry)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Any:
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"x-slo-class", b"batch")]}
    asyncio.run(ContextMiddleware(app)(scope, receive, send))
    return dict(sent[0]["headers"]), seen[0]


def test_the_application_knows_the_headers_and_nobody_else_does() -> None:
    assert answer(200)[1].slo_class == "batch"
    assert current() == RequestContext()


def test_room_is_given_back_with_the_end_of_a_request_whatever_ends_it() -> None:
    gate = Gate(30.0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        current().room = gate.reserve(("batch", ""), 3)
        assert gate.queued.total() == 3
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(ContextMiddleware(app)({"type": "http", "headers": []}, None, None))  # type: ignore[arg-type]
    assert not gate.queued


@pytest.mark.parametrize("status", [429, 503])
def test_a_client_that_is_turned_away_is_told_when_to_come_again(status: int) -> None:
    assert answer(status)[0] == {b"retry-after": b"1"}
    assert answer(status, own_retry=b"9")[0] == {b"retry-after": b"9"}


@pytest.mark.parametrize("status", [200, 400, 500])
def test_others_are_not(status: int) -> None:
    assert answer(status)[0] == {}


def test_clients_are_told_apart_by_their_keys_which_are_not_kept() -> None:
    named = [
        read_context(Headers(headers)).key
        for headers in ({"authorization": "Bearer a"}, {"x-api-key": "a"}, {"x-api-key": "b"}, {})
    ]
    assert named[0] == named[1] != named[2]
    assert named[3] == ""
    assert all(len(name) == 16 for name in named[:3])


def test_a_session_is_its_client_s_own_however_long_its_name_is() -> None:
    mine, yours = RequestContext(key="mine"), RequestContext(key="yours")
    names = [
        name_of_session(mine, "s"),
        name_of_session(yours, "s"),
        name_of_session(mine, "t" * 1_000_000),
        name_of_session(mine, "\ud800"),
    ]
    assert len(set(names)) == 4
    assert {len(name) for name in names} == {16}
    assert name_of_session(mine, "s") == names[0]
    assert name_of_session(mine, "") == name_of_session(mine, None) == b""
