"""What a client may say in headers of its own, checked before anything is done for it."""

from __future__ import annotations

from collections.abc import Collection
from http import HTTPStatus
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from vllm_pd_plugin.frontend.api.errors import error_answer
from vllm_pd_plugin.frontend.requests.context import SLO_HEADER, TIMEOUT_HEADER, parse_timeout

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


class CheckHeaders:
    """Answers 400 to a request with a header that would else be passed over.

    classes: of requests that there are.
    """

    def __init__(self, app: ASGIApp, classes: Collection[str]) -> None:
        self._app = app
        self._classes = classes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            headers = Headers(scope=scope)
            for name, problem in (
                (SLO_HEADER, problem_of_class(headers.get(SLO_HEADER), self._classes)),
                (TIMEOUT_HEADER, problem_of_timeout(headers.get(TIMEOUT_HEADER))),
            ):
                if problem is not None:
                    answer = error_answer(HTTPStatus.BAD_REQUEST, f"{name}: {problem}", name)
                    await answer(scope, receive, send)
                    return
        await self._app(scope, receive, send)


def problem_of_class(value: str | None, classes: Collection[str]) -> str | None:
    """Say what is wrong with the class that a client asks for; None if nothing is."""
    if value is None or value in classes:
        return None
    return f"there is no class {value[:80]!r}; allowed are {', '.join(sorted(classes))}"


def problem_of_timeout(value: str | None) -> str | None:
    """Say what is wrong with the time that a client gives; None if nothing is."""
    try:
        parse_timeout(value)
    except ValueError as error:
        return str(error)
    return None
