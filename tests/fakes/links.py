"""Engines as a frontend's dispatch sees them, and an event loop that does not wait."""

from __future__ import annotations

import asyncio
import selectors
import warnings
from collections.abc import Callable
from typing import Any

from tests.fakes.engine_core import describe
from vllm_pd_plugin.ids import Incarnation, RequestId, new_incarnation

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import (
        EngineCoreOutput,
        EngineCoreOutputs,
        EngineCoreRequest,
        FinishReason,
    )

    from vllm_pd_plugin.frontend.pool.members import Member
    from vllm_pd_plugin.frontend.routing.choice import Role


class FakeLink:
    """A connection to an engine that does nothing by itself.

    sent: ids of the requests that it was given, with what was written down of each.
    aborted: ids of those that it was told to end.
    """

    def __init__(self, url: str, is_attached: bool = True, **description: Any) -> None:
        self.url = url
        self.others: tuple[str, ...] = ()
        self.twin: str | None = None
        self.is_attached = is_attached
        self.problem = "" if is_attached else "not there"
        self.description = describe(**description)
        self.incarnation: Incarnation = new_incarnation()
        self.requests: dict[RequestId, EngineCoreRequest] = {}
        self.sent: list[RequestId] = []
        self.aborted: list[RequestId] = []
        self.is_closed = False
        self.behind_s = 0.0
        self.on_encode: Callable[[EngineCoreRequest], None] = lambda request: None

    def encode(self, request: EngineCoreRequest) -> list[bytes]:
        self.on_encode(request)
        self.requests[request.request_id] = request
        return [request.request_id.encode()]

    def add(self, request_id: RequestId, payload: list[bytes]) -> int:
        assert self.is_attached, "a request was sent to an engine that is not there"
        assert payload == [request_id.encode()]
        self.sent.append(request_id)
        return len(self.sent)

    def abort(self, request_ids: tuple[RequestId, ...]) -> None:
        assert self.is_attached, "an engine that is not there was told something"
        self.aborted += request_ids

    async def close(self) -> None:
        self.is_closed = True


def make_member(url: str, role: Role, is_attached: bool = True, **description: Any) -> Member:
    description = {"role": role.value, **description}
    return Member(url, role, FakeLink(url, is_attached, **description))  # type: ignore[arg-type]


def link_of(member: Member) -> FakeLink:
    link: Any = member.link
    assert isinstance(link, FakeLink)
    return link


def outputs_of(*outputs: EngineCoreOutput, timestamp: float = 1.0) -> EngineCoreOutputs:
    """What a step gives out."""
    return EngineCoreOutputs(outputs=list(outputs), timestamp=timestamp)


def output_of(
    request_id: RequestId, *tokens: int, finish: FinishReason | None = None, **more: Any
) -> EngineCoreOutput:
    return EngineCoreOutput(request_id, list(tokens), finish_reason=finish, **more)


class _SkippingSelector(selectors.SelectSelector):
    """Waits for nothing: it says how long it should have."""

    def __init__(self, skip: Callable[[float], None]) -> None:
        super().__init__()
        self._skip = skip

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits for something that never comes"
            self._skip(timeout)
        return ready


class SkippingLoop(asyncio.SelectorEventLoop):
    """Time passes in it only while nothing is to be done, and then all at once."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(_SkippingSelector(self._skip))

    def time(self) -> float:
        return self.now

    def _skip(self, seconds: float) -> None:
        # A timer is due when the time has passed it.
        self.now += max(seconds, 1e-6) if seconds else 0.0
