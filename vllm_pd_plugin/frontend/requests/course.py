"""One request of a client on its way over the engines.

A ``Course`` starts legs on engines, merges what they give out into one stream, and when an engine
is lost goes on elsewhere, so that the client notices nothing but a pause. It owns no connection and
no clock; its ``Dispatcher`` does what it says.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, FinishReason

from vllm_pd_plugin.engine_port.refusals import refusal_of
from vllm_pd_plugin.frontend.requests.attempt import Attempt, Novelty
from vllm_pd_plugin.frontend.requests.blame import Blame, blame_for
from vllm_pd_plugin.frontend.requests.endings import Ending, Failure
from vllm_pd_plugin.frontend.requests.legs import (
    Handoff,
    Leg,
    LegKind,
    Work,
    decode_leg,
    prefill_leg,
    whole_leg,
)
from vllm_pd_plugin.frontend.requests.seeding import Replay, is_seed_safe, replay_of
from vllm_pd_plugin.frontend.requests.siblings import Siblings
from vllm_pd_plugin.frontend.routing.choice import EngineKey, Route, Unroutable
from vllm_pd_plugin.frontend.routing.prefixes import NamedPrompt
from vllm_pd_plugin.ids import RequestId, new_handoff_id

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

    from vllm_pd_plugin.ids import Address

logger = logging.getLogger(__name__)

_FAILURES = {
    FinishReason.ABORT: Failure.ENGINE_STOPPED,
    FinishReason.ERROR: Failure.REQUEST_FAILED,
}
"""What it means when an engine ends a leg so."""
MAX_ATTEMPTS = 4
"""The first one, and a budget of three more."""
MAX_LOST_ENGINES = 2
"""So many engines lost while they worked on the same request are no chance; one may have been."""


class CourseState(enum.Enum):
    WAITING = "waiting"
    """No attempt is under way: for an engine, or for a while after one has failed."""
    UNDERWAY = "under way"
    OVER = "over"


class CourseEvent(enum.Enum):
    BEGUN = "attempt begun"
    FAILED = "attempt failed"
    ENDED = "ended"


TRANSITIONS: Mapping[tuple[CourseState, CourseEvent], CourseState] = {
    (CourseState.WAITING, CourseEvent.BEGUN): CourseState.UNDERWAY,
    (CourseState.UNDERWAY, CourseEvent.FAILED): CourseState.WAITING,
    (CourseState.WAITING, CourseEvent.ENDED): CourseState.OVER,
    (CourseState.UNDERWAY, CourseEvent.ENDED): CourseState.OVER,
}
"""What follows on what; nothing else happens to a course."""


class Dispatcher(Protocol):
    """What a course needs done."""

    def now(self) -> float: ...

    def route(self, course: Course) -> Route | Unroutable:
        """Choose engines; those that the course excludes come last."""

    def control_address(self, engine: EngineKey) -> tuple[Address, str]:
        """Return an engine's control channel and incarnation."""

    def send(self, course: Course, leg: Leg, request: EngineCoreRequest) -> None: ...

    def drop(self, leg: Leg, abort: bool) -> None:
        """A leg is over; ``abort`` tells its engine, which does not know it."""

    def emit(self, output: EngineCoreOutput) -> None:
        """Give an output to the client."""

    def failed(self, blame: Blame) -> None:
        """An attempt has failed; its legs may still be open."""

    def try_again(self, course: Course, failure: Failure) -> None:
        """Call ``course.start`` after a while."""

    def queue(self, course: Course, why: Unroutable) -> None:
        """Call ``course.start`` when an engine has come, or ``course.give_up``."""

    def ended(self, course: Course, ending: Ending | None) -> None:
        """The course is over; an ending says that its client has got no final output."""


class Course:
    """One request on its way.

    sent: the tokens that the client has got.
    excluded: engines that have failed this request.
    session: names the requests that go to the same decode engine; empty if there are none.
    siblings: the parts of the client's request that this is one of.
    to_compute: how many tokens of its prompt are not cached where it goes, as far as is known.
    handoff_failed: it is not handed off any more, but computed where it is decoded.
    refusal: why an engine does not take it; empty as long as none has refused.
    """

    def __init__(self, request: EngineCoreRequest, dispatcher: Dispatcher) -> None:
        assert request.sampling_params is not None
        assert request.prompt_token_ids is not None
        assert request.sampling_params.max_tokens is not None
        self.request = request
        self.params = request.sampling_params
        self.sent: list[int] = []
        self.excluded: set[EngineKey] = set()
        self.handoff_failed = False
        self.refusal = ""
        self.session = b""
        self.siblings = Siblings()
        self.to_compute = len(request.prompt_token_ids)
        self.state = CourseState.WAITING
        self.arrived_at = dispatcher.now()
        self._prompt = NamedPrompt(request.prompt_token_ids)
        self._dispatcher = dispatcher
        self._latest: Attempt | None = None
        """The attempt that is under way, or was the last one; None before the first."""
        self._num_lost_engines = 0
        self._has_started = False

    @property
    def id(self) -> RequestId:
        return self.request.request_id

    @property
    def attempt(self) -> int:
        """Return how many attempts have begun."""
        return self._latest.number if self._latest is not None else 0

    @property
    def route(self) -> Route | None:
        """Return that of the latest attempt."""
        return self._latest.route if self._latest is not None else None

    @property
    def legs(self) -> list[Leg]:
        """Return what is under way."""
        return self._latest.legs if self._latest is not None else []

    @property
    def prefills(self) -> bool:
        """Whether an engine computes the prompt for another one."""
        return self._latest is not None and self._latest.prefills

    @property
    def decodes(self) -> bool:
        """Whether the decode engine has given something out: the handoff is over."""
        return self._latest is not None and self._latest.decodes

    @property
    def is_over(self) -> bool:
        return self.state is CourseState.OVER

    @property
    def named_prompt(self) -> NamedPrompt:
        """Return the prompt of the next attempt."""
        assert self.request.prompt_token_ids is not None
        before = self.request.prompt_token_ids
        more = self.sent if replay_of(self.params) is Replay.EXTEND else []
        if len(self._prompt.tokens) != len(before) + len(more):
            self._prompt = NamedPrompt(before + more)
        return self._prompt

    @property
    def prompt(self) -> list[int]:
        """Return the tokens of that."""
        return self.named_prompt.tokens

    @property
    def max_tokens(self) -> int:
        """Return how many tokens the next attempt may give."""
        assert self.params.max_tokens is not None
        extends = replay_of(self.params) is Replay.EXTEND
        return self.params.max_tokens - (len(self.sent) if extends else 0)

    # --- starting ----------------------------------------------------------------------------

    def start(self) -> None:
        """Begin an attempt."""
        if self.is_over:
            return
        if self.sent and replay_of(self.params) is Replay.REFUSE:
            self._end(Ending.NOT_REPLAYABLE)
            return
        route = self._dispatcher.route(self)
        if isinstance(route, Unroutable):
            self._dispatcher.queue(self, route)
            return
        seeds = route.prefill is not None and is_seed_safe(self.params)
        repeats = replay_of(self.params) is Replay.REGENERATE
        attempt = Attempt(self.attempt + 1, route, seeds, len(self.sent) if repeats else 0)
        self._follow(CourseEvent.BEGUN)
        self._latest = attempt
        work = Work(self.request, self.prompt, self.max_tokens)
        if route.prefill is None:
            self._start(attempt, LegKind.WHOLE, route.decode, work, None)
            return
        address, incarnation = self._dispatcher.control_address(route.prefill)
        handoff = Handoff(new_handoff_id(), address, incarnation, seeds)
        self._start(attempt, LegKind.PREFILL, route.prefill, work, handoff)
        if attempt.prefills:  # else it was lost as it was sent
            self._start(attempt, LegKind.DECODE, route.decode, work, handoff)

    def _start(
        self,
        attempt: Attempt,
        kind: LegKind,
        engine: EngineKey,
        work: Work,
        handoff: Handoff | None,
    ) -> None:
        leg_id = f"{self.id}-{attempt.number}{kind[0]}"
        leg = Leg(leg_id, engine, kind, len(work.prompt), self._dispatcher.now())
        leg.uncached = self.to_compute
        attempt.begin(leg)
        if handoff is None:
            request = whole_leg(work, leg_id)
        elif kind is LegKind.PREFILL:
            request = prefill_leg(work, leg_id, handoff)
        else:
            request = decode_leg(work, leg_id, handoff)
        self._dispatcher.send(self, leg, request)

    # --- what engines give out ---------------------------------------------------------------

    def take(self, leg: Leg, output: EngineCoreOutput) -> None:
        """Take one output of a leg."""
        attempt = self._latest
        if attempt is None or not attempt.has(leg):
            return
        # Each token of each stream comes by here: what is rare is asked for where it can be so.
        finish = output.finish_reason
        failure = None if finish is None else _FAILURES.get(finish)
        if failure is None:
            leg.has_output = True
        if finish is not None:
            attempt.end(leg)
            self._dispatcher.drop(leg, abort=False)
        if failure is not None and (refusal := refusal_of(output)) is not None:
            self.refusal = refusal
            self._end(Ending.REFUSED)
        elif leg.kind is LegKind.PREFILL:
            self._take_prefill(attempt, leg, output, failure)
        elif failure is not None:
            self.leg_failed(leg, failure)
        elif attempt.waits_for_token:
            attempt.hold(output)
        else:
            self._emit(attempt, output)

    def _take_prefill(
        self, attempt: Attempt, leg: Leg, output: EngineCoreOutput, failure: Failure | None
    ) -> None:
        attempt.prefill_stats = output.prefill_stats
        if not attempt.seeds:
            # Its token is not used. A failure is the decode engine's to deal with: it may have
            # ended the prefill itself, because it has the KV already.
            attempt.prefill_failed = failure is Failure.REQUEST_FAILED
            if failure is Failure.ENGINE_STOPPED and not attempt.decodes:
                self.leg_failed(leg, failure)
            return
        if failure is not None or not output.new_token_ids:
            self.leg_failed(leg, failure or Failure.REQUEST_FAILED)
            return
        if output.finish_reason is FinishReason.LENGTH and self.max_tokens > 1:
            output.finish_reason = None  # it is only the leg that is at its end
        for each in [output, *attempt.take_held()]:
            self._emit(attempt, each)

    def _emit(self, attempt: Attempt, output: EngineCoreOutput) -> None:
        """Give an output to the client, without what it has got before."""
        if self.is_over:
            return
        if attempt.to_repeat:
            match attempt.cut_known(output, self.sent):
                case Novelty.DIFFERS:
                    self._end(Ending.REPLAY_DIFFERS)
                    return
                case Novelty.NONE:
                    return
        if attempt.prefill_stats is not None and output.prefill_stats is not None:
            # What was cached on the engine that computed the prompt, and not what was handed over.
            output.prefill_stats = attempt.prefill_stats
        self.sent += output.new_token_ids
        output.request_id = self.id
        output.kv_transfer_params = None
        if self._has_started and output.events:
            # When it was queued and scheduled is known of the first leg, and vLLM expects it once.
            output.events = [
                event for event in output.events if event.type == EngineCoreEventType.PREEMPTED
            ]
        self._has_started = True
        self._dispatcher.emit(output)
        if output.finish_reason is not None:
            self._end(None)

    # --- failing and ending ------------------------------------------------------------------

    def engine_lost(self, engine: EngineKey, was_at_work: bool = False) -> None:
        """An engine is gone, or must not be used any more: the legs on it are over.

        was_at_work: it is gone, and this request may be why.
        """
        attempt = self._latest
        if attempt is None:
            return
        blame = Blame(Failure.ENGINE_LOST, (engine,))
        for leg in attempt.legs:
            if leg.engine != engine:
                continue
            if leg.kind is LegKind.PREFILL and not attempt.seeds and attempt.decodes:
                attempt.end(leg)  # the handoff was over
                self._dispatcher.drop(leg, abort=True)
            else:
                # While a prompt is computed elsewhere, the engine that is to decode does nothing.
                waits = leg.kind is LegKind.DECODE and attempt.prefills
                self._num_lost_engines += was_at_work and not waits
                self._fail(attempt, blame)
                return
        if attempt.needs(engine):
            self._fail(attempt, blame)

    def leg_failed(self, leg: Leg, failure: Failure) -> None:
        """A leg has failed, and with it this attempt."""
        if (attempt := self._latest) is not None:
            blame = blame_for(failure, leg, attempt.route.prefill, attempt.prefill_failed)
            self._fail(attempt, blame)

    def _fail(self, attempt: Attempt, blame: Blame) -> None:
        """End what is left of an attempt, and try again."""
        if self.state is not CourseState.UNDERWAY:
            return
        failure = blame.failure
        self._dispatcher.failed(blame)
        self._abort_legs()
        self._follow(CourseEvent.FAILED)
        self.excluded.update(blame.engines)
        self.handoff_failed = self.handoff_failed or blame.ends_handoff
        if self._num_lost_engines >= MAX_LOST_ENGINES:
            self._end(Ending.SUSPECT)
        elif attempt.number >= MAX_ATTEMPTS:
            self._end(Ending.ATTEMPTS_EXHAUSTED)
        elif self.sent and replay_of(self.params) is Replay.REFUSE:
            self._end(Ending.NOT_REPLAYABLE)
        else:
            text = "request %s: %s (%s) in attempt %d; trying again after %d tokens"
            names = ", ".join(blame.engines)
            logger.warning(text, self.id, names, failure, attempt.number, len(self.sent))
            self._dispatcher.try_again(self, failure)

    def give_up(self, ending: Ending) -> None:
        """End without a final output."""
        if not self.is_over:
            self._end(ending)

    def cancel(self) -> None:
        """The client does not want it any more."""
        if not self.is_over:
            self._end(None)

    def _end(self, ending: Ending | None) -> None:
        self._follow(CourseEvent.ENDED)
        self._abort_legs()
        self._dispatcher.ended(self, ending)

    def _abort_legs(self) -> None:
        legs = self._latest.end_all() if self._latest is not None else []
        for leg in legs:
            self._dispatcher.drop(leg, abort=True)

    def _follow(self, event: CourseEvent) -> None:
        self.state = TRANSITIONS[self.state, event]
