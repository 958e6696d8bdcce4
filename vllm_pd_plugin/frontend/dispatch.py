"""Everything that a frontend has under way: courses, their legs, and the engines these are on.

Owned by the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest

from vllm_pd_plugin.engine_port.link import Connection, Link
from vllm_pd_plugin.engine_port.messages import Blocks, EngineLoad, State
from vllm_pd_plugin.frontend.admission import NO_ENGINES, Gate, TurnedAway
from vllm_pd_plugin.frontend.keeper import Keeper
from vllm_pd_plugin.frontend.lag import Lag
from vllm_pd_plugin.frontend.learning import Learner, rebase
from vllm_pd_plugin.frontend.overdue import OpenLegs
from vllm_pd_plugin.frontend.pool.breakers import PairBreakers
from vllm_pd_plugin.frontend.pool.fitness import Requirement
from vllm_pd_plugin.frontend.pool.members import Member, Pool
from vllm_pd_plugin.frontend.pool.membership import Engines
from vllm_pd_plugin.frontend.requests.blame import Blame
from vllm_pd_plugin.frontend.requests.context import current, name_of_session
from vllm_pd_plugin.frontend.requests.course import Course
from vllm_pd_plugin.frontend.requests.endings import Ending, Failure
from vllm_pd_plugin.frontend.requests.legs import Leg, LegKind
from vllm_pd_plugin.frontend.router import Router
from vllm_pd_plugin.frontend.routing.choice import EngineKey, Policy, Route, Unroutable
from vllm_pd_plugin.frontend.telemetry.metrics import FrontendMetrics
from vllm_pd_plugin.frontend.telemetry.outcomes import current_request
from vllm_pd_plugin.frontend.telemetry.tracing import Marks
from vllm_pd_plugin.frontend.underway import Limits, Underway
from vllm_pd_plugin.frontend.waiting import WaitingList
from vllm_pd_plugin.ids import Address, RequestId

logger = logging.getLogger(__name__)

_SWEEP_S = 0.25
_BACKOFF_S = 0.05


class Dispatch:
    """The courses of a frontend, and the pool of engines that they are on.

    on_outputs: takes what is for clients, as an engine core would give it out.
    on_failed: takes courses whose clients get no final output.
    on_over: takes every course when it is over. name: see ``Router``.
    """

    def __init__(
        self,
        policy: Policy,
        limits: Limits,
        metrics: FrontendMetrics,
        on_outputs: Callable[[EngineCoreOutputs], None],
        on_failed: Callable[[Course, Ending], None],
        on_over: Callable[[Underway], None] = lambda underway: None,
        name: str = "",
    ) -> None:
        self.metrics = metrics
        self._router = Router(policy, metrics, name)
        self._loop = asyncio.get_running_loop()
        self.pool = Pool(self._loop.time)
        self.pairs = PairBreakers(self._loop.time, metrics.pair_opened)
        self._keeper = Keeper(self.pool, self._leave)
        self._learner = Learner(metrics, self._router, self.pairs)
        self.prefill_may_be_empty = False
        """Whether engines that prefill come when a request waits for one."""
        self._limits = limits
        self._on_outputs = on_outputs
        self._on_failed = on_failed
        self._on_over = on_over
        self._courses: dict[RequestId, Underway] = {}
        self._legs = OpenLegs(limits, self.pool)
        self._waiting = WaitingList(self._start)
        self.gate = Gate(limits.queue_s)
        self.lag = Lag(self.pool.behind_s)
        self._batch: list[EngineCoreOutput] | None = None
        self._random = random.Random()
        self._sweeper = self._loop.create_task(self._sweep(), name="sweep")

    def __len__(self) -> int:
        return len(self._courses)

    @property
    def num_waiting(self) -> int:
        """Return how many requests no engine has got yet."""
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Return how many prompt tokens these requests have."""
        return self._waiting.num_tokens

    # --- requests ----------------------------------------------------------------------------

    def add(self, request: EngineCoreRequest) -> None:
        """Begin a request."""
        context = current()
        course = Course(request, self)
        course.session = name_of_session(context, request.session_id)
        course.siblings = current_request().siblings
        tenant = self.gate.tenant(self.metrics.slo_class(context.slo_class), context.key)
        if is_first := not course.siblings.is_going_on:  # else it is a step of a beam search
            self.gate.joined(tenant)
        now = course.arrived_at
        timeline = self.metrics.begin(now, context.slo_class)
        deadline = now + min(self._limits.request_s, context.timeout_s)
        underway = Underway(course, timeline, Marks(now), deadline, tenant, is_first)
        self._courses[course.id] = underway
        self._start(course)

    def refuse(self, num_new: int) -> TurnedAway | None:
        """Turn a request away that comes now, for so many answers; None if it may come."""
        context, capacity = current(), self.pool.capacity() or NO_ENGINES
        tenant = self.gate.tenant(self.metrics.slo_class(context.slo_class), context.key)
        lag_s = self.lag.for_client(self.now())
        return self.gate.refuse(tenant, num_new, capacity, self.waiting_tokens, lag_s)

    def underway(self, request_id: RequestId) -> Underway | None:
        """Return what is noted of a request, as long as it is under way."""
        return self._courses.get(request_id)

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
        missing = self._router.missing(self.pool.candidates(()))
        if missing is Unroutable.QUEUE_FOR_PREFILL and self.prefill_may_be_empty:
            return None
        return missing.value if isinstance(missing, Unroutable) else None

    # --- engines -----------------------------------------------------------------------------

    def require(self, requirement: Requirement) -> None:
        """From now on use engines only that meet it."""
        self._keeper.require(requirement)

    def use(self, engines: Engines, connection: Connection) -> None:
        """Make the pool what is wanted; what is under way on an engine that leaves goes on
        elsewhere."""
        self._keeper.use(engines, lambda url: Link(url, connection, self))
        self._waiting.wake()

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
        if not member.is_known:  # else only its description is another one
            member.is_known = True
            member.set_load(load)
            member.breaker.worked()
        if member.incarnation != link.incarnation:
            member.incarnation = link.incarnation
            self.pairs.forget(member.key)
        self._keeper.judge()
        if not member.mismatch and is_new:
            text = "engine %s is there: %s, role %s"
            logger.info(text, link.url, link.description.model, member.role)
        self._waiting.wake()

    def loaded(self, link: Link, state: State) -> None:
        if member := self._member(link):
            member.told(state, self.now())
            self._wake_for(member)

    def cached(self, link: Link, changes: Blocks) -> None:
        if self._member(link):
            self._router.prefixes.change(link.url, changes)

    def lost(self, link: Link, why: str) -> None:
        if member := self._member(link):
            member.is_known = False
            self._router.prefixes.forget(link.url)
            self.metrics.engine_lost()
            self._leave(member, member.at_work())
            self._keeper.judge()

    def gave_out(self, link: Link, outputs: EngineCoreOutputs) -> None:
        """Take the outputs of one step of an engine."""
        member = self._member(link)
        batch: list[EngineCoreOutput] = []
        self._batch = batch
        now = self.now()
        try:
            for output in outputs.outputs:
                if found := self._legs.hear(output.request_id, now):
                    underway, leg = found
                    self._take(member, underway, leg, output, now, outputs.timestamp)
        finally:
            self._batch = None
            self._give(batch)

    def _member(self, link: Link) -> Member | None:
        """Return whose link it is; None when another one, or none, is in its place."""
        member = self.pool.get(link.url)
        return member if member is not None and member.link is link else None

    def _take(
        self,
        member: Member | None,
        underway: Underway,
        leg: Leg,
        output: EngineCoreOutput,
        now: float,
        given_at: float,
    ) -> None:
        """Take one output; a defect with one must not cost the others, nor the engine."""
        try:
            if member is not None:
                member.moved_at = now
                member.tokens_given += len(output.new_token_ids)
                if not leg.has_output:
                    member.legs.computed(leg)
                    self._wake_for(member)
                    self._learner.learn(member, underway, leg, output, now, given_at)
            rebase(output, now - given_at)
            underway.course.take(leg, output)
        except Exception:
            logger.exception("unexpected error with an output of request %s", underway.course.id)
            underway.course.give_up(Ending.INTERNAL)

    def _leave(self, member: Member, at_work: Collection[Leg] = ()) -> None:
        """Let everything that an engine works on go on elsewhere.

        at_work: what the engine may have been lost to.
        """
        self._router.prefixes.forget(member.key)
        for course in [underway.course for underway in self._legs.on(member.key)]:
            course.engine_lost(member.key, any(leg in at_work for leg in course.legs))
        member.legs.clear()

    # --- what courses ask for ----------------------------------------------------------------

    def now(self) -> float:
        return self._loop.time()

    def route(self, course: Course) -> Route | Unroutable:
        route = self._router.route(course, self.pool, self.pairs)
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
        self._legs.put(self._courses[course.id], leg)
        if leg.kind is LegKind.DECODE and course.route is not None and course.route.prefill:
            self.pairs.began((course.route.prefill, leg.engine), leg.id)
        member.send(leg, payload)

    def drop(self, leg: Leg, abort: bool) -> None:
        self._legs.remove(leg.id)
        self.pairs.left(leg.id)
        if member := self.pool.get(leg.engine):
            member.legs.discard(leg)
            member.breaker.left(leg.id)
            if abort and member.link.is_attached:
                member.link.abort((leg.id,))
            self._wake_for(member)

    def emit(self, output: EngineCoreOutput) -> None:
        underway = self._courses[output.request_id]
        if output.new_token_ids:
            if underway.is_queued:
                self._leave_queue(underway)
            self.metrics.gave(underway.timeline, self.now(), len(output.new_token_ids))
        if output.finish_reason is not None:
            self.metrics.finished(underway.timeline)
        if self._batch is None:
            self._give([output])
        else:
            self._batch.append(output)

    def failed(self, blame: Blame) -> None:
        if isinstance(blame.counts_for, tuple):
            self.pairs.failed(blame.counts_for, blame.failure)
        elif blame.counts_for is not None and (member := self.pool.get(blame.counts_for)):
            member.breaker.failed(self.now())

    def try_again(self, course: Course, failure: Failure) -> None:
        self.metrics.retried(failure)
        # Full jitter: what was on one engine does not come to another all at once.
        wait_s = self._random.uniform(0.0, _BACKOFF_S * 2**course.attempt)
        self._loop.call_later(wait_s, self._start, course)

    def queue(self, course: Course, why: Unroutable) -> None:
        if why is Unroutable.NO_PREFILL:
            course.give_up(Ending.NO_ENGINE)
            return
        self._waiting.put(course, why, self.now() + self._limits.queue_s)

    def ended(self, course: Course, ending: Ending | None) -> None:
        underway = self._courses.pop(course.id, None)
        self._waiting.remove(course.id)
        if underway is not None:
            self._leave_queue(underway)
            self.metrics.ended(underway.timeline, ending)
        if ending is not None:
            logger.error("request %s ends without an answer: %s", course.id, ending)
            self._on_failed(course, ending)
        if underway is not None:
            self._on_over(underway)

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

    def _wake_for(self, member: Member) -> None:
        """Let waiting requests begin if an engine can take one."""
        if (self._waiting or self.pool.is_large) and self.pool.freed(member):
            self._waiting.wake()

    def _leave_queue(self, underway: Underway) -> None:
        if underway.is_queued:
            underway.is_queued = False
            self.gate.left(underway.tenant)

    async def _sweep(self) -> None:
        """End what takes too long."""
        while True:
            began_at = self.now()
            await asyncio.sleep(_SWEEP_S)
            try:
                self.lag.note(began_at, _SWEEP_S, self.now())
                self._end_overdue(self.now())
                self._keeper.hand_over_drained(self.now())
                self._count()
            except Exception:
                logger.exception("unexpected error in the sweep")

    def _end_overdue(self, now: float) -> None:
        for each in self._waiting.overdue(now):
            each.course.give_up(each.ending)
        self._waiting.wake()  # a circuit breaker may let one through
        for underway in list(self._courses.values()):
            if now >= underway.deadline:
                underway.course.give_up(Ending.DEADLINE)
        for underway, leg in self._legs.overdue(now):
            underway.course.leg_failed(leg, Failure.TIMEOUT)

    def _count(self) -> None:
        ready = [m.role for m in self.pool if m.is_up and not m.is_draining]
        self.metrics.set_engines(Counter(ready))
        queued = sum(len(each.course.prompt) for each in self._courses.values() if each.is_queued)
        self.metrics.set_requests(len(self._courses), self._waiting.by_ending(), queued)
        self.metrics.set_lag(self.lag.seconds)
        self.pairs.retain([member.key for member in self.pool])
        self.metrics.set_open_pairs(self.pairs.num_open)
