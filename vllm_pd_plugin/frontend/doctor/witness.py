"""A frontend's dispatch that remembers how each request went, engine by engine."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from contextlib import suppress

from vllm.v1.engine import (
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)

from vllm_pd_plugin.engine_port.link import Link
from vllm_pd_plugin.frontend.dispatch import Dispatch
from vllm_pd_plugin.frontend.requests.course import Course
from vllm_pd_plugin.frontend.requests.endings import Ending
from vllm_pd_plugin.frontend.requests.legs import Leg, LegKind
from vllm_pd_plugin.frontend.routing.choice import Policy, Route, Unroutable
from vllm_pd_plugin.frontend.telemetry.metrics import FrontendMetrics
from vllm_pd_plugin.frontend.underway import Limits, Underway
from vllm_pd_plugin.ids import RequestId


@dataclasses.dataclass(slots=True)
class Part:
    """What an engine has given out for one kind of leg.

    times: when each output with tokens came here, in seconds. compute_s, queue_s: by the engine's
    clock; None where it does not say. external_tokens: of the prompt, that it got from elsewhere.
    """

    times: list[float] = dataclasses.field(default_factory=list)
    queue_s: float | None = None
    compute_s: float | None = None
    prompt_tokens: int | None = None
    external_tokens: int | None = None
    finish: FinishReason | None = None

    @property
    def step_s(self) -> float | None:
        """Return the mean time from one output to the next."""
        steps = len(self.times) - 1
        return (self.times[-1] - self.times[0]) / steps if steps > 0 else None

    def take(self, output: EngineCoreOutput, given_at: float, now: float) -> None:
        """given_at: by the engine's clock, as are the events."""
        self.finish = output.finish_reason
        stats = output.prefill_stats
        if stats is not None and not self.times:
            self.prompt_tokens = stats.num_prompt_tokens
            self.external_tokens = stats.num_external_cached_tokens
        at = {event.type: event.timestamp for event in output.events or ()}
        scheduled_at = at.get(EngineCoreEventType.SCHEDULED)
        if scheduled_at is not None and not self.times:
            self.compute_s = given_at - scheduled_at
            self.queue_s = scheduled_at - at.get(EngineCoreEventType.QUEUED, scheduled_at)
        if output.new_token_ids:
            self.times.append(now)


@dataclasses.dataclass(slots=True)
class Answer:
    """A request's way, and its answer.

    likeliest: for each token the log-probabilities of it and of those that were likeliest there.
    routes: of each attempt. parts: by the kind of leg. is_late: there was no more time for it.
    ending, refusal: why there is no answer. seconds: how long all of it took.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    likeliest: list[Mapping[int, float]] = dataclasses.field(default_factory=list)
    routes: list[Route] = dataclasses.field(default_factory=list)
    parts: dict[LegKind, Part] = dataclasses.field(default_factory=dict)
    is_late: bool = False
    ending: Ending | None = None
    refusal: str = ""
    seconds: float = 0.0

    @property
    def is_whole(self) -> bool:
        return self.ending is None and not self.is_late

    def part(self, kind: LegKind) -> Part:
        """Return an engine's part; an empty one where it has given nothing out."""
        return self.parts.get(kind, Part())

    def take(self, output: EngineCoreOutput) -> None:
        """Take what a client would get."""
        self.tokens += output.new_token_ids
        if (rows := output.new_logprobs) is not None:
            for ids, logprobs in zip(rows.logprob_token_ids, rows.logprobs, strict=True):
                row = zip(map(int, ids), map(float, logprobs), strict=True)
                self.likeliest.append(dict(row))


class Witness(Dispatch):
    """Asks one request at a time."""

    def __init__(self, policy: Policy, limits: Limits, metrics: FrontendMetrics) -> None:
        super().__init__(policy, limits, metrics, self._to_client, self._unanswered, self._over)
        self._answer = Answer()
        self._request_id: RequestId = ""
        self._is_over = asyncio.Event()

    async def ask(self, request: EngineCoreRequest, deadline: float) -> Answer:
        """Return how a request went; what it got so far where it is not over by the deadline."""
        self._answer = answer = Answer()
        self._request_id = request.request_id
        self._is_over.clear()
        started_at = self.now()
        self.add(request)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._is_over.wait()
        answer.is_late = not self._is_over.is_set()
        answer.seconds = self.now() - started_at
        self.abort([request.request_id])
        return answer

    def route(self, course: Course) -> Route | Unroutable:
        route = super().route(course)
        if isinstance(route, Route):
            self._answer.routes.append(route)
        return route

    def gave_out(self, link: Link, outputs: EngineCoreOutputs) -> None:
        for output in outputs.outputs:
            if (leg := self._leg(output.request_id)) is not None:
                part = self._answer.parts.setdefault(leg.kind, Part())
                part.take(output, outputs.timestamp, self.now())
        super().gave_out(link, outputs)

    def _leg(self, leg_id: RequestId) -> Leg | None:
        """Return the leg that has this id, if it is under way."""
        underway = self.underway(self._request_id)
        legs = [] if underway is None else underway.course.legs
        return next((leg for leg in legs if leg.id == leg_id), None)

    def _to_client(self, outputs: EngineCoreOutputs) -> None:
        for output in outputs.outputs:
            self._answer.take(output)

    def _unanswered(self, course: Course, ending: Ending) -> None:
        self._answer.ending, self._answer.refusal = ending, course.refusal

    def _over(self, underway: Underway) -> None:
        self._is_over.set()
