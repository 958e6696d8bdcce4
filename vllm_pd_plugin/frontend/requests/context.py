"""What an HTTP request says beside its body: its class, and how long its client waits.

vLLM's API server does not pass these on, so they go by a context variable to where the request is
begun, which is in the same task.
"""

from __future__ import annotations

import contextvars
import dataclasses
import hashlib
import math
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from vllm_pd_plugin.frontend.admission import Room

SLO_HEADER = "x-slo-class"
TIMEOUT_HEADER = "x-request-timeout"
_KEY_NAME, _SESSION_NAME = 16, 16


@dataclasses.dataclass(slots=True)
class RequestContext:
    """slo_class: as the client asks for it. timeout_s: after which it wants no answer any more.
    key: what its API key is called here, whether or not it is a good one; empty if it has none.
    retry_after_s: when it may come again, should it be turned away; whoever does that knows.
    room: what it was let in for; given back with its end. has_end: whether that will be told.
    """

    slo_class: str | None = None
    timeout_s: float = math.inf
    key: str = ""
    retry_after_s: int = 1
    room: Room | None = None
    has_end: bool = False

    def give_back(self) -> None:
        """Give its room back, where it has any."""
        if self.room is not None:
            self.room.give_back()


_CURRENT: contextvars.ContextVar[RequestContext] = contextvars.ContextVar("pd_request_context")


def current() -> RequestContext:
    """Return what the request says that this task works on."""
    return _CURRENT.get(None) or RequestContext()


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
                MutableHeaders(scope=message).setdefault("retry-after", str(context.retry_after_s))
            await send(message)

        context = read_context(Headers(scope=scope))
        context.has_end = True
        _CURRENT.set(context)
        try:
            await self._app(scope, receive, send_with_retry)
        finally:
            context.give_back()


def read_context(headers: Headers) -> RequestContext:
    """Read what is there.

    A timeout that is none is refused before, with a POST. Nothing else begins a request that one
    could end, and is let through whatever its headers say: it is as if there were none.
    """
    try:
        timeout_s = parse_timeout(headers.get(TIMEOUT_HEADER))
    except ValueError:
        timeout_s = math.inf
    return RequestContext(headers.get(SLO_HEADER), timeout_s, name_of_key(headers))


def parse_timeout(text: str | None) -> float:
    """Return the seconds after which a client wants no answer any more; infinity if it does not
    say. Raises ValueError, which says what is allowed."""
    if text is None:
        return math.inf
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if math.isfinite(seconds) and seconds > 0:
        return seconds
    raise ValueError(
        f"{text[:80]!r} is not a time; allowed is a number of seconds above 0, such as 2.5"
    )


def name_of_key(headers: Headers) -> str:
    """Return a name for a client's API key that does not tell what it is."""
    _, _, token = headers.get("authorization", "").partition(" ")
    key = token or headers.get("x-api-key", "")
    return hashlib.sha256(key.encode()).hexdigest()[:_KEY_NAME] if key else ""


def name_of_session(context: RequestContext, session_id: str | None) -> bytes:
    """Return a short name for a client's session, which is no other client's; empty if the request
    is in none. However long the id is, the name is not."""
    if not session_id:
        return b""
    text = f"{context.key} {session_id}".encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=_SESSION_NAME).digest()
