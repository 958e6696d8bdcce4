"""Everything that a frontend has under way: courses, their legs, and the engines these are on.

Owned by the event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable

from vllm.v1.engine import (
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
)

from vllm_pd_plugin.frontend.course import Course, Ending, Failure, Leg
from vllm_pd_plugin.frontend.legs import LegKind
from vllm_pd_plugin.frontend.link import Connection, Link
from vllm_pd_plugin.frontend.metrics import FrontendMetrics
from vllm_pd_plugin.frontend.pool import Member, Pool
from vllm_pd_plugin.frontend.prefixes import PrefixIndex
from vllm_pd_plugin.frontend.routing import (
    Chance,
    EngineKey,
    Policy,
    Prompt,
    Role,
    Route,
    Unroutable,
    choose,
)
from vllm_pd_plugin.ids import Address, RequestId
from vllm_pd_plugin.tokens import Blocks, EngineLoad

logger = logging.getLogger(__name__)

_SWEEP_S = 0.25
_MIN_BACKOFF_S, _MAX_BACKOFF_S = 0.05, 0.5
_NEW_OVERHEAD_WEIGHT = 0.1
_REMEMBERED_SESSIONS = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """How long things may take, in seconds.

    request_s: a whole request. first_token_s: one attempt, until its first token.
    stall_s: between two tokens. queue_s: until an engine is up that can take it.
    """

    request_s: float = 3600.0
    first_token_s: float = 300.0
    stall_s: float = 120.0
    queue_s: float = 30.0


@dataclasses.dataclass(slots=True, eq=False)
class _Waiting:
    course: Course
    why: Unroutable
    deadline: float


class Dispatch:
    """The courses of a frontend, and the pool of engines that they are on.

    on_outputs: takes what is for clients, as an engine core would give it out.
    on_failed: takes courses whose clients get no final output.
    """

    def __init__(
        self,
        policy: Policy,
        limits: Limits,
        metrics: FrontendMetrics,
        on_outputs: Callable[[EngineCoreOutputs], None],
        on_failed: Callable[[Course, Ending], None],
    ) -> None:
        self.policy = policy
        self.metrics = metrics
        self._loop = asyncio.get_running_loop()
        self.pool = Pool(self._loop.time)
        self._limits = limits
        self._on_outputs = on_outputs
        self._on_failed = on_failed
        self._courses: dict[RequestId, Course] = {}
        self._legs: dict[RequestId, tuple[Course, Leg]] = {}
        self._last_output: dict[RequestId, float] = {}
        self._waiting: dict[RequestId, _Waiting] = {}
        self._batch: list[EngineCoreOutput] | None = None
        self._turn = 0
        self._handoff_s = 0.0
        self._random = random.Random()
        self._prefixes = PrefixIndex()
        self._sessions: OrderedDict[str, EngineKey] = OrderedDict()
        self._sweeper = self._loop.create_task(self._sweep(), name="sweep")

    def __len__(self) -> int:
        return len(self._courses)

    # --- requests ----------------------------------------------------------------------------

    def add(self, request: EngineCoreRequest) -> None:
        """Begin a request."""
        course = Course(request, self)
        self._courses[course.id] = course
        course.start()

    def abort(self, request_ids: Iterable[RequestId]) -> None:
        """The clients do not want these any more."""
        for request_id in request_ids:
            if course := self._courses.get(request_id):
                course.cancel()

    def serves(self) -> str | None:
        """Return None when a request can be served now, else what is missing."""
        engines = self.pool.usable(set())
        missing = choose(engines, Prompt(1_000_000, 2), self.policy)
        return missing.value if isinstance(missing, Unroutable) else None

    # --- engines -----------------------------------------------------------------------------

    def add_engine(self, url: EngineKey, role: Role, connection: Connection) -> None:
        """Take an engine into the pool; does nothing if it is there."""
        if self.pool.get(url) is None:
            self.pool.add(Member(url, role, Link(url, connection, self)))

    async def remove_engine(self, url: EngineKey) -> None:
        """Take an engine out of the pool; what is under way on it goes on elsewhere."""
        member = self.pool.remove(url)
        self._lose(member)
        await member.link.close()

    async def close(self) -> None:
        self._sweeper.cancel()
        for member in self.pool:
            await member.link.close()

    # --- what links say ----------------------------------------------------------------------

    def attached(self, link: Link, load: EngineLoad) -> None:
        if member := self.pool.get(link.url):
            member.set_load(load)
            member.worked()
            text = "engine %s is there: %s, role %s"
            logger.info(text, link.url, link.description.model, member.role)
            self._start_waiting()

    def loaded(self, link: Link, load: EngineLoad) -> None:
        if member := self.pool.get(link.url):
            member.set_load(load)

    def cached(self, link: Link, changes: Blocks) -> None:
        if self.pool.get(link.url):
            self._prefixes.change(link.url, changes)

    def lost(self, link: Link, why: str) -> None:
        self._prefixes.forget(link.url)
        if member := self.pool.get(link.url):
            self.metrics.engine_lost()
            self._lose(member)

    def gave_out(self, link: Link, outputs: EngineCoreOutputs) -> None:
        """Take the outputs of one step of an engine."""
        member = self.pool.get(link.url)
        batch: list[EngineCoreOutput] = []
        self._batch = batch
        now = self._loop.time()
        for output in outputs.outputs:
            found = self._legs.get(output.request_id)
            if found is None:
                continue
            course, leg = found
            self._last_output[leg.id] = now
            if not leg.has_output and member is not None:
                self._learn(member, course, leg, output, outputs.timestamp)
            _rebase(output, now - outputs.timestamp)
            course.take(leg, output)
        self._batch = None
        self._give(batch)

    def _lose(self, member: Member) -> None:
        courses = [self._legs[leg.id][0] for leg in member.legs]
        handed_off = [
            course
            for course in self._courses.values()
            if course.route and course.route.prefill == member.key
        ]
        for course in dict.fromkeys(courses + handed_off):
            course.engine_lost(member.key)
        member.legs.clear()

    def _learn(
        self, member: Member, course: Course, leg: Leg, output: EngineCoreOutput, given_at: float
    ) -> None:
        """Learn how fast the engine is, from the first output of a leg."""
        stats = output.prefill_stats
        if stats is not None and leg.kind is not LegKind.DECODE:
            for event in output.events or ():
                if event.type == EngineCoreEventType.SCHEDULED:
                    member.computed(stats.num_computed_tokens, given_at - event.timestamp)
        if output.finish_reason is None or output.new_token_ids:
            member.worked()

    # --- what courses ask for ----------------------------------------------------------------

    def now(self) -> float:
        return self._loop.time()

    def route(self, course: Course) -> Route | Unroutable:
        self._turn += 1
        chance = Chance(self._turn, self._random.random(), self._random.random())
        session = course.request.session_id
        prompt = Prompt(
            len(course.prompt),
            course.max_tokens,
            self._prefixes.cached(course.prompt) if _uses_plain_cache(course.request) else {},
            self._sessions.get(session) if session else None,
            needs_whole_prompt=course.params.prompt_logprobs is not None,
        )
        engines = self.pool.usable(course.excluded)
        route = choose(engines, prompt, self.policy, self._handoff_s, chance)
        if isinstance(route, Route):
            self.metrics.routed(route)
            if session:
                self._remember(session, route.decode)
        return route

    def _remember(self, session: str, engine: EngineKey) -> None:
        self._sessions[session] = engine
        self._sessions.move_to_end(session)
        if len(self._sessions) > _REMEMBERED_SESSIONS:
            self._sessions.popitem(last=False)

    def control_address(self, engine: EngineKey) -> tuple[Address, str]:
        link = self.pool[engine].link
        description = link.description
        return (description.control_host, description.control_port), link.incarnation

    def send(self, course: Course, leg: Leg, request: EngineCoreRequest) -> None:
        member = self.pool[leg.engine]
        self._legs[leg.id] = (course, leg)
        member.legs.add(leg)
        self._last_output[leg.id] = leg.started_at
        member.link.add(request)

    def drop(self, leg: Leg, abort: bool) -> None:
        self._legs.pop(leg.id, None)
        self._last_output.pop(leg.id, None)
        if member := self.pool.get(leg.engine):
            member.legs.discard(leg)
            if abort and member.is_up:
                member.link.abort((leg.id,))

    def emit(self, output: EngineCoreOutput) -> None:
        if self._batch is None:
            self._give([output])
        else:
            self._batch.append(output)

    def try_again(self, course: Course, failure: Failure) -> None:
        self.metrics.retried(failure)
        if failure in (Failure.REQUEST_FAILED, Failure.TIMEOUT):
            for key in course.excluded:
                if member := self.pool.get(key):
                    member.failed(self.now())
        most_s = min(_MAX_BACKOFF_S, _MIN_BACKOFF_S * 2 ** (course.attempt - 1))
        self._loop.call_later(self._random.uniform(_MIN_BACKOFF_S, most_s), course.start)

    def queue(self, course: Course, why: Unroutable) -> None:
        if why is Unroutable.NO_PREFILL:
            course.give_up(Ending.NO_ENGINE)
            return
        deadline = self.now() + self._limits.queue_s
        waiting = self._waiting.get(course.id)
        self._waiting[course.id] = _Waiting(course, why, waiting.deadline if waiting else deadline)

    def ended(self, course: Course, ending: Ending | None) -> None:
        self._courses.pop(course.id, None)
        self._waiting.pop(course.id, None)
        if ending is not None:
            self.metrics.failed(ending)
            logger.error("request %s ends without an answer: %s", course.id, ending)
            self._on_failed(course, ending)

    # --- inside ------------------------------------------------------------------------------

    def _give(self, batch: list[EngineCoreOutput]) -> None:
        if batch:
            self._on_outputs(EngineCoreOutputs(outputs=batch))

    def _start_waiting(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for each in waiting.values():
            self._waiting[each.course.id] = each  # keeps its deadline if it must go on waiting
            before = each.course.attempt
            each.course.start()
            if each.course.attempt != before:
                self._waiting.pop(each.course.id, None)

    async def _sweep(self) -> None:
        """End what takes too long."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now, limits = self.now(), self._limits
            for each in list(self._waiting.values()):
                if now >= each.deadline:
                    each.course.give_up(Ending.NO_ENGINE)
            if self._waiting:
                self._start_waiting()
            for course in list(self._courses.values()):
                if now - course.arrived_at > limits.request_s:
                    course.give_up(Ending.DEADLINE)
            for leg_id, (course, leg) in list(self._legs.items()):
                limit = limits.stall_s if leg.has_output else limits.first_token_s
                if now - self._last_output.get(leg_id, now) > limit:
                    course.fail(leg.engine, Failure.TIMEOUT)


def _uses_plain_cache(request: EngineCoreRequest) -> bool:
    """Whether a prompt's KV can be what another prompt with the same text has left behind."""
    return not request.lora_request and not request.cache_salt


def _rebase(output: EngineCoreOutput, offset_s: float) -> None:
    """Move an engine's times to this machine's clock, as if its outputs had taken no time."""
    for event in output.events or ():
        event.timestamp += offset_s
