"""What an HTTP request says beside its body: its class, and how long its client waits.

vLLM's API server does not pass these on, so they go by a context variable to where the request is
begun, which is in the same task.
"""

from __future__ import annotations

import contextvars
import dataclasses
import math
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

SLO_HEADER = "x-slo-class"
TIMEOUT_HEADER = "x-request-timeout"
_RETRY_AFTER_S = 1


@dataclasses.dataclass(frozen=True, slots=True)
class RequestContext:
    """slo_class: as the client asks for it. timeout_s: after which it wants no answer any more."""

    slo_class: str | None = None
    timeout_s: float = math.inf


_CURRENT: contextvars.ContextVar[RequestContext] = contextvars.ContextVar("pd_request_context")
_NOTHING = RequestContext()


def current() -> RequestContext:
    """Return what the request says that this task works on."""
    return _CURRENT.get(_NOTHING)


class ContextMiddleware:
    """Reads the headers, and tells a client that is turned away when to come again."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_retry(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (429, 503):
                MutableHeaders(scope=message).setdefault("retry-after", str(_RETRY_AFTER_S))
            await send(message)

        _CURRENT.set(read_context(Headers(scope=scope)))
        await self._app(scope, receive, send_with_retry)


def read_context(headers: Headers) -> RequestContext:
    """Read what is there; a timeout that is no positive number is ignored."""
    try:
        timeout_s = float(headers.get(TIMEOUT_HEADER, ""))
    except ValueError:
        timeout_s = math.inf
    if not timeout_s > 0:
        timeout_s = math.inf
    return RequestContext(headers.get(SLO_HEADER), timeout_s)
