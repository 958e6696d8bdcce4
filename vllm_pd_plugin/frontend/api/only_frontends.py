"""Middleware of engines that serve frontends only, on an address that others can reach.

vLLM's own API key guards some of its paths. A frontend needs none of them: it asks where the
control channel is, and that has a key of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

from vllm_pd_plugin.engine_port.messages import DESCRIPTION_PATH

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = {DESCRIPTION_PATH, "/health", "/metrics", "/metrics/"}


class OnlyFrontends:
    """Answers 403 on every path but those that frontends and monitoring need."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") in OPEN_PATHS:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            answer = JSONResponse({"error": "this engine serves frontends only"}, 403)
            await answer(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})
