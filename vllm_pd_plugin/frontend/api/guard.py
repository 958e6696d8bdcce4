"""Who has no API key gets nothing that costs: middleware before all of vLLM's own.

vLLM asks for its key under a few prefixes only (``/v1`` and some more): what else generates or
tokenises (``/invocations``, ``/tokenize``, ``/generative_scoring``) is open beside it. Here a path
is closed unless it is named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from vllm_pd_plugin.frontend.api.probes import PROXY_PATH

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

OPEN_TO_READ = {
    "/health", PROXY_PATH, "/ping", "/load", "/version", "/metrics", "/metrics/",
    "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json",
}  # fmt: skip
"""What monitoring asks for, and the description of the API."""
OPEN_TO_POST = {"/ping"}
ADMIN_PREFIX = "/pd/v1/"
"""All of it asks for the admin key."""


class NeedsKey(AuthenticationMiddleware):
    """Answers 401 to whoever does not send one of ``tokens`` as a bearer token."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _is_open(scope) or self.verify_token(_headers(scope)):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            answer = JSONResponse({"error": "Unauthorized"}, 401, {"WWW-Authenticate": "Bearer"})
            await answer(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})


def _is_open(scope: Scope) -> bool:
    if scope["type"] != "http":
        return False
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    match scope["method"]:
        case "OPTIONS":  # a browser asks before it sends a key
            return True
        case "GET" | "HEAD" if path in OPEN_TO_READ:
            return True
        case "POST" if path in OPEN_TO_POST:
            return True
        case _:
            return path.startswith(ADMIN_PREFIX)


def _headers(scope: Scope) -> Headers:
    return Headers(scope=scope)
