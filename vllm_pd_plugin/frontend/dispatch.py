"""Everything that a frontend has under way: courses, their legs, and the engines these are on.

Owned by the event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from vllm.v1.engine import (
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
)

from vllm_pd_plugin.codecs.codec import AUTO, Codec
from vllm_pd_plugin.engine_port.link import Connection, Link
from vllm_pd_plugin.engine_port.messages import Blocks, EngineLoad
from vllm_pd_plugin.frontend.keeper import Keeper
from vllm_pd_plugin.frontend.pool.fitness import Requirement
from vllm_pd_plugin.frontend.pool.members import Member, Pool
from vllm_pd_plugin.frontend.pool.membership import Engines
from vllm_pd_plugin.frontend.requests.context import current
from vllm_pd_plugin.frontend.requests.course import Course, Leg
from vllm_pd_plugin.frontend.requests.endings import Ending, Failure
from vllm_pd_plugin.frontend.requests.legs import LegKind
from vllm_pd_plugin.frontend.router import Router
from vllm_pd_plugin.frontend.routing.choice import EngineKey, Policy, Route, Unroutable
from vllm_pd_plugin.frontend.telemetry.metrics import FrontendMetrics, Timeline
from vllm_pd_plugin.frontend.telemetry.tracing import Marks
from vllm_pd_plugin.frontend.underway import Limits, Underway, is_on
from vllm_pd_plugin.ids import Address, RequestId

logger = logging.getLogger(__name__)

_SWEEP_S = 0.25
_MIN_BACKOFF_S, _MAX_BACKOFF_S = 0.05, 0.5


@dataclasses.dataclass(slots=True, eq=False)
class _Waiting:
    course: Course
    why: Unroutable
    deadline: float


class Dispatch:
    """The courses of a frontend, and the pool of engines that they are on.

    on_outputs: takes what is for clients, as an engine core would give it out.
    on_failed: takes courses whose clients get no final output.
    on_over: takes every course when it is over.
    """

    def __init__(
        self,
        policy: Policy,
        limits: Limits,
        metrics: FrontendMetrics,
        on_outputs: Callable[[EngineCoreOutputs], None],
        on_failed: Callable[[Course, Ending], None],
        on_over: Callable[[Underway], None] = lambda underway: None,
    ) -> None:
        self.metrics = metrics
        self._router = Router(policy, metrics)
        self._loop = asyncio.get_running_loop()
        self.pool = Pool(self._loop.time)
        self._keeper = Keeper(self.pool, self._leave)
        self.prefill_may_be_empty = False
        """Whether engines that prefill come when a request waits for one."""
        self._limits = limits
        self._on_outputs = on_outputs
        self._on_failed = on_failed
        self._on_over = on_over
        self._courses: dict[RequestId, Underway] = {}
        self._legs: dict[RequestId, tuple[Underway, Leg]] = {}
        self._last_output: dict[RequestId, float] = {}
        self._waiting: dict[RequestId, _Waiting] = {}
        self._batch: list[EngineCoreOutput] | None = None
        self._random = random.Random()
        self._sweeper = self._loop.create_task(self._sweep(), name="sweep")

    def __len__(self) -> int:
        return len(self._courses)

    @property
    def num_waiting(self) -> int:
        """Return how many requests wait for an engine to come up."""
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Return how many prompt tokens these requests have."""
        return sum(len(each.course.prompt) for each in self._waiting.values())

    # --- requests ----------------------------------------------------------------------------

    def add(self, request: EngineCoreRequest) -> None:
        """Begin a request."""
        context = current()
        course = Course(request, self)
        slo_class = self.metrics.slo_class(context.slo_class)
        self.metrics.arrived()
        now = course.arrived_at
        deadline = now + min(self._limits.request_s, context.timeout_s)
        self._courses[course.id] = Underway(course, Timeline(now, slo_class), Marks(now), deadline)
        self._start(course)

    def abort(self, request_ids: Iterable[RequestId]) -> None:
        """The clients do not want these any more."""
        for request_id in request_ids:
            if underway := self._courses.get(request_id):
                underway.course.cancel()

    def stop(self, request_ids: Iterable[RequestId]) -> None:
        """The clients have got all of their answers to these."""
        for request_id in request_ids:
            if underway := self._courses.get(request_id):
                self.metrics.finished(underway.timeline)
                underway.course.cancel()

    def give_up(self, ending: Ending) -> None:
        """End everything."""
        for underway in list(self._courses.values()):
            underway.course.give_up(ending)

    def serves(self) -> str | None:
        """Return None when a request can be served now, else what is missing."""
        engines = self.pool.usable(set())
        missing = self._router.missing(engines)
        if missing is Unroutable.QUEUE_FOR_PREFILL and self.prefill_may_be_empty:
            return None
        return missing.value if isinstance(missing, Unroutable) else None

    def allowed_codecs(self) -> set[str]:
        """Return the codecs that a client may ask for: every engine that decodes allows them."""
        decodes = [m.link.description for m in self.pool if m.is_up and m.role.decodes]
        allowed = [set(description.codecs) for description in decodes]
        return set.intersection(*allowed) if allowed else {AUTO, *Codec}

    # --- engines -----------------------------------------------------------------------------

    def require(self, requirement: Requirement) -> None:
        """From now on use engines only that meet it."""
        self._keeper.require(requirement)

    def use(self, engines: Engines, connection: Connection) -> None:
        """Make the pool what is wanted; what is under way on an engine that leaves goes on
        elsewhere."""
        self._keeper.use(engines, lambda url: Link(url, connection, self))
        self._start_waiting()

    async def close(self) -> None:
        """End what is under way, and the connections."""
        self._sweeper.cancel()
        self.give_up(Ending.SHUTDOWN)
        await self._keeper.close()

    # --- what links say ----------------------------------------------------------------------

    def attached(self, link: Link, load: EngineLoad) -> None:
        member = self._member(link)
        if member is None:
            return
        is_new, member.kv = member.kv != link.description.kv, link.description.kv
        member.set_load(load)
        member.worked()
        self._keeper.judge()
        if not member.mismatch and is_new:
            text = "engine %s is there: %s, role %s"
            logger.info(text, link.url, link.description.model, member.role)
        self._start_waiting()

    def loaded(self, link: Link, load: EngineLoad) -> None:
        if member := self._member(link):
            member.set_load(load)

    def cached(self, link: Link, changes: Blocks) -> None:
        if self._member(link):
            self._router.prefixes.change(link.url, changes)

    def lost(self, link: Link, why: str) -> None:
        if member := self._member(link):
            self._router.prefixes.forget(link.url)
            self.metrics.engine_lost()
            self._leave(member)
            self._keeper.judge()

    def gave_out(self, link: Link, outputs: EngineCoreOutputs) -> None:
        """Take the outputs of one step of an engine."""
        member = self._member(link)
        batch: list[EngineCoreOutput] = []
        self._batch = batch
        now = self.now()
        try:
            for output in outputs.outputs:
                found = self._legs.get(output.request_id)
                if found is None:
                    continue
                underway, leg = found
                self._last_output[leg.id] = now
                if member is not None:
                    member.tokens_given += len(output.new_token_ids)
                    if not leg.has_output:
                        self._learn(member, underway, leg, output, now, outputs.timestamp)
                _rebase(output, now - outputs.timestamp)
                underway.course.take(leg, output)
        finally:
            self._batch = None
            self._give(batch)

    def _member(self, link: Link) -> Member | None:
        """Return whose link it is; None when another one, or none, is in its place."""
        member = self.pool.get(link.url)
        return member if member is not None and member.link is link else None

    def _leave(self, member: Member) -> None:
        """Let everything that an engine works on go on elsewhere."""
        self._router.prefixes.forget(member.key)
        affected = [underway for underway in self._courses.values() if is_on(underway, member)]
        for underway in affected:
            underway.course.engine_lost(member.key)
        member.legs.clear()

    def _learn(
        self,
        member: Member,
        underway: Underway,
        leg: Leg,
        output: EngineCoreOutput,
        now: float,
        given_at: float,
    ) -> None:
        """Learn how fast the engine is, from the first output of a leg; its times are the
        engine's own."""
        if leg.kind is LegKind.DECODE:
            underway.marks.decoding_at = now
            if underway.marks.prefilled_at:
                seconds = now - underway.marks.prefilled_at
                self.metrics.handed_off(seconds)
                self._router.handed_off(seconds)
        elif output.prefill_stats is not None:
            times = {event.type: event.timestamp for event in output.events or ()}
            scheduled_at = times.get(EngineCoreEventType.SCHEDULED, given_at)
            member.computed(output.prefill_stats.num_computed_tokens, given_at - scheduled_at)
            self.metrics.queued(scheduled_at - times.get(EngineCoreEventType.QUEUED, scheduled_at))
        if leg.kind is LegKind.PREFILL:
            underway.marks.prefilled_at = now
        if output.new_token_ids:
            member.worked()

    # --- what courses ask for ----------------------------------------------------------------

    def now(self) -> float:
        return self._loop.time()

    def route(self, course: Course) -> Route | Unroutable:
        route = self._router.route(course, self.pool.usable(course.excluded))
        if isinstance(route, Route) and (underway := self._courses.get(course.id)):
            underway.marks = Marks(underway.marks.arrived_at, routed_at=self.now())
        return route

    def control_address(self, engine: EngineKey) -> tuple[Address, str]:
        link = self.pool[engine].link
        description = link.description
        return (description.control_host, description.control_port), link.incarnation

    def send(self, course: Course, leg: Leg, request: EngineCoreRequest) -> None:
        member = self.pool[leg.engine]
        try:
            payload = member.link.encode(request)
        except (TypeError, ValueError, OverflowError) as error:
            logger.warning("request %s cannot be sent: %s", course.id, error)
            course.give_up(Ending.UNSENDABLE)
            return
        self._legs[leg.id] = (self._courses[course.id], leg)
        member.legs.add(leg)
        self._last_output[leg.id] = leg.started_at
        member.link.add(leg.id, payload)

    def drop(self, leg: Leg, abort: bool) -> None:
        self._legs.pop(leg.id, None)
        self._last_output.pop(leg.id, None)
        if member := self.pool.get(leg.engine):
            member.legs.discard(leg)
            if abort and member.link.is_attached:
                member.link.abort((leg.id,))

    def emit(self, output: EngineCoreOutput) -> None:
        underway = self._courses[output.request_id]
        if output.new_token_ids:
            self.metrics.gave(underway.timeline, self.now(), len(output.new_token_ids))
        if output.finish_reason is not None:
            self.metrics.finished(underway.timeline)
        if self._batch is None:
            self._give([output])
        else:
            self._batch.append(output)

    def try_again(self, course: Course, engines: Sequence[EngineKey], failure: Failure) -> None:
        self.metrics.retried(failure)
        if failure in (Failure.REQUEST_FAILED, Failure.TIMEOUT):
            for key in engines:
                if member := self.pool.get(key):
                    member.failed(self.now())
        most_s = min(_MAX_BACKOFF_S, _MIN_BACKOFF_S * 2 ** (course.attempt - 1))
        wait_s = self._random.uniform(_MIN_BACKOFF_S, most_s)
        self._loop.call_later(wait_s, self._start, course)

    def queue(self, course: Course, why: Unroutable) -> None:
        if why is Unroutable.NO_PREFILL:
            course.give_up(Ending.NO_ENGINE)
            return
        before = self._waiting.get(course.id)
        deadline = before.deadline if before else self.now() + self._limits.queue_s
        self._waiting[course.id] = _Waiting(course, why, deadline)

    def ended(self, course: Course, ending: Ending | None) -> None:
        underway = self._courses.pop(course.id, None)
        self._waiting.pop(course.id, None)
        if underway is not None:
            self._on_over(underway)
        if ending is not None:
            self.metrics.failed(ending)
            logger.error("request %s ends without an answer: %s", course.id, ending)
            self._on_failed(course, ending)

    # --- inside ------------------------------------------------------------------------------

    def _give(self, batch: list[EngineCoreOutput]) -> None:
        if batch:
            self._on_outputs(EngineCoreOutputs(outputs=batch))

    def _start(self, course: Course) -> None:
        """Start an attempt; a defect in one must not cost the others."""
        try:
            course.start()
        except Exception:
            logger.exception("unexpected error with request %s", course.id)
            course.give_up(Ending.INTERNAL)

    def _start_waiting(self) -> None:
        """Let those begin that have waited for an engine, if they can now."""
        for each in list(self._waiting.values()):
            before = each.course.attempt
            self._start(each.course)
            if each.course.attempt != before:
                self._waiting.pop(each.course.id, None)

    async def _sweep(self) -> None:
        """End what takes too long."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                self._end_overdue(self.now())
                self._keeper.hand_over_drained(self.now())
                self._count()
            except Exception:
                logger.exception("unexpected error in the sweep")

    def _end_overdue(self, now: float) -> None:
        for each in list(self._waiting.values()):
            if now >= each.deadline:
                each.course.give_up(Ending.NO_ENGINE)
        self._start_waiting()
        for underway in list(self._courses.values()):
            if now >= underway.deadline:
                underway.course.give_up(Ending.DEADLINE)
        limits = self._limits
        for leg_id, (underway, leg) in list(self._legs.items()):
            if leg.kind is LegKind.PREFILL and underway.course.decodes:
                continue  # its token was not waited for
            limit = limits.stall_s if leg.has_output else limits.first_token_s
            if now - self._last_output.get(leg_id, now) > limit:
                underway.course.fail([leg.engine], Failure.TIMEOUT)

    def _count(self) -> None:
        ready = [m.role for m in self.pool if m.is_up and not m.is_draining]
        self.metrics.set_engines(Counter(ready))
        self.metrics.set_requests(len(self._courses), len(self._waiting))


def _rebase(output: EngineCoreOutput, offset_s: float) -> None:
    """Move an engine's times to this machine's clock, as if its outputs had taken no time."""
    for event in output.events or ():
        event.timestamp += offset_s
