"""Who has served an HTTP request: in headers of its answer and in the log (``--say-route``)."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders

from vllm_pd_plugin.frontend.underway import Underway

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

_SERVED: contextvars.ContextVar[list[Underway] | None] = contextvars.ContextVar(
    "pd_served", default=None
)


def note(underway: Underway | None) -> None:
    """Remember what was begun for the HTTP request that this task works on."""
    served = _SERVED.get()
    if served is not None and underway is not None:
        served.append(underway)


class SayRoute:
    """Middleware around all that begins requests.

    The headers of a stream wait for its first event: what it is made of is routed only then.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        served: list[Underway] = []
        _SERVED.set(served)
        start: Message | None = None
        status = 0

        async def send_later(message: Message) -> None:
            nonlocal start, status
            if message["type"] == "http.response.start":
                start, status = message, message["status"]
                return
            if start is not None:
                headers, first, start = MutableHeaders(scope=start), start, None
                headers.update(headers_of(served))
                await send(first)
            await send(message)

        try:
            await self._app(scope, receive, send_later)
        finally:
            if said := headers_of(served):
                fields = " ".join(f"{name[len(_PREFIX) :]}={said[name]}" for name in said)
                ids = ",".join(underway.course.id for underway in served)
                logger.info(
                    "%s %s %d %s ids=%s", scope["method"], scope["path"], status, fields, ids
                )


_PREFIX = "x-pd-"


def headers_of(served: Iterable[Underway]) -> dict[str, str]:
    """Return how requests were routed last, each value once; nothing while none was.

    The engine that computes a prompt is the one that decodes where nothing is handed off.
    """
    routed = [(each.course, each.course.route) for each in served]
    routes = [(course, route) for course, route in routed if route is not None]
    if not routes:
        return {}
    values = {
        "route": [route.reason.value for _, route in routes],
        "prefill-engine": [route.prefill or route.decode for _, route in routes],
        "decode-engine": [route.decode for _, route in routes],
        "attempts": [str(max(course.attempt for course, _ in routes))],
    }
    return {f"{_PREFIX}{name}": ",".join(dict.fromkeys(each)) for name, each in values.items()}
