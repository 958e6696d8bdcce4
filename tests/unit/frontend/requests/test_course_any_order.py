"""Engines that answer, fail and come back in any order: the client gets the one right answer.

Whatever happens, what was given out is the beginning of the answer: no token is missing, none comes
twice. A request ends once, with its final output or with a reason, and leaves nothing on an engine.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.fakes.answering import DECODE_ENGINES, ENGINES, PREFILL_ENGINES, Answer, AnsweringPool
from tests.fakes.courses import make_request

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import FinishReason

    from vllm_pd_plugin.frontend.requests.course import MAX_ATTEMPTS, Course
    from vllm_pd_plugin.frontend.requests.endings import Ending, Failure
    from vllm_pd_plugin.frontend.routing.choice import Reason, Route, Unroutable

EXTENDED: dict[str, Any] = {}
REGENERATED: dict[str, Any] = {"presence_penalty": 0.5}
REFUSED: dict[str, Any] = {"presence_penalty": 0.5, "temperature": 0.7}
INDEX = st.integers(0, 999)
LAST, MAX_TOKENS = st.sampled_from([9, 6, 4, 1, 0]), st.sampled_from([8, 6, 4, 2, 1])
EVENTS = {
    "compute": 6,
    "deliver": 6,
    "start": 2,
    "come_back": 2,
    "lose": 1,
    "fail": 1,
    "time_out": 0.5,
    "cancel": 0.2,
}
"""What may happen in ``go_on``, and how often."""


class AnyOrder(RuleBasedStateMachine):
    """One request on four engines."""

    sampling: dict[str, Any] = EXTENDED

    @initialize(last=LAST, max_tokens=MAX_TOKENS, index=INDEX)
    def begin(self, last: int, max_tokens: int, index: int) -> None:
        self.answer = Answer(last, max_tokens)
        self.pool = AnsweringPool(self.answer)
        self.is_cancelled = False
        self.is_due = True
        self.seen_retries = 0
        self.course = Course(make_request(max_tokens=max_tokens, **self.sampling), self.pool)
        self.start(index)

    @rule(event=st.sampled_from(list(EVENTS)), index=INDEX)
    def one_thing_happens(self, event: str, index: int) -> None:
        getattr(self, event)(index)

    @rule(seed=st.integers(0, 2**32), num_events=st.integers(10, 30))
    def much_happens(self, seed: int, num_events: int) -> None:
        """Mostly what should."""
        chance = random.Random(seed)
        for event in chance.choices(list(EVENTS), EVENTS.values(), k=num_events):
            self.one_thing_happens(event, chance.randrange(1000))
            self.what_was_given_out_begins_the_answer()
            self.the_final_output_ends_the_whole_answer()
            self.it_ends_once_and_leaves_nothing_behind()
            self.it_never_rests()

    # --- what engines do

    def compute(self, index: int) -> None:
        if working := self.pool.working:
            self.pool.compute(self.course, working[index % len(working)], 1 + index % 3)

    def deliver(self, index: int) -> None:
        if parts := self.pool.with_mail:
            self.pool.deliver(self.course, parts[index % len(parts)])

    def fail(self, index: int) -> None:
        if working := self.pool.working:
            finish = (FinishReason.ABORT, FinishReason.ERROR)[index // 10 % 2]
            self.pool.end(working[index % len(working)], finish)

    def lose(self, index: int) -> None:
        if up := [engine for engine in ENGINES if engine not in self.pool.down]:
            self.pool.lose_engine(self.course, up[index % len(up)])

    def come_back(self, index: int) -> None:
        if down := sorted(self.pool.down):
            self.pool.down.remove(down[index % len(down)])

    # --- what the frontend does

    def start(self, index: int) -> None:
        if self.is_due and not self.course.is_over:
            self.pool.next_route = self._route(index)
            queued, before = len(self.pool.queued), self.course.attempt
            self.course.start()
            if len(self.pool.queued) == queued and not self.course.is_over:
                self.is_due = False
                assert self.course.attempt == before + 1

    def time_out(self, index: int) -> None:
        if legs := self.course.legs:
            self.course.leg_failed(legs[index % len(legs)], Failure.TIMEOUT)

    def cancel(self, index: int) -> None:
        if not self.course.is_over:
            self.is_cancelled = True
            self.course.cancel()

    # --- what holds at any time

    @invariant()
    def what_was_given_out_begins_the_answer(self) -> None:
        tokens = self.pool.tokens
        assert tokens == self.answer.tokens[: len(tokens)]
        assert self.course.sent == tokens
        assert all(output.request_id == "r" for output in self.pool.emitted)

    @invariant()
    def the_final_output_ends_the_whole_answer(self) -> None:
        if self.pool.finish is not None:
            assert self.pool.tokens == self.answer.tokens
            assert self.pool.finish is self.answer.finish
            assert self.course.is_over

    @invariant()
    def it_ends_once_and_leaves_nothing_behind(self) -> None:
        assert self.course.is_over == bool(self.pool.endings)
        assert {leg.id for leg in self.pool.open_legs} == {leg.id for leg in self.course.legs}
        if self.course.is_over:
            assert self.pool.open_legs == []
            self._check_ending()

    @invariant()
    def it_never_rests(self) -> None:
        """Either an engine works for it, or another attempt is due."""
        retries, self.seen_retries = self.seen_retries, len(self.pool.retries)
        assert self.seen_retries <= retries + 1, "one failure leads to two attempts"
        self.is_due = self.is_due or self.seen_retries > retries
        if not self.course.is_over:
            assert self.is_due != bool(self.course.legs)

    def teardown(self) -> None:
        """Without further failures it ends."""
        if not hasattr(self, "course"):
            return
        for _ in range(100):
            if self.course.is_over:
                break
            self.it_never_rests()
            if self.is_due:
                self.pool.down.clear()
                self.start(0)
            for part in self.pool.working:
                self.pool.compute(self.course, part, 1)
            for part in self.pool.with_mail:
                self.pool.deliver(self.course, part)
        assert self.course.is_over, "it never ends"
        self.what_was_given_out_begins_the_answer()
        self.the_final_output_ends_the_whole_answer()
        self.it_ends_once_and_leaves_nothing_behind()

    # --- inside

    def _route(self, index: int) -> Route | Unroutable:
        prefills = [key for key in PREFILL_ENGINES if key not in self.pool.down]
        decodes = [key for key in DECODE_ENGINES if key not in self.pool.down]
        if not decodes:
            return Unroutable.NO_DECODE
        decode = decodes[index % len(decodes)]
        if index % 10 == 9 or not prefills or self.course.max_tokens == 1:
            return Route(None, decode, Reason.SHORT)
        return Route(prefills[index // 2 % len(prefills)], decode, Reason.DISAGGREGATED)

    def _check_ending(self) -> None:
        (ending,) = self.pool.endings
        if ending is None:
            assert self.is_cancelled or self.pool.finish is not None
        elif ending is Ending.ATTEMPTS_EXHAUSTED:
            assert self.course.attempt == MAX_ATTEMPTS
        else:
            assert ending is Ending.NOT_REPLAYABLE
            assert self.sampling is REFUSED
            assert self.pool.tokens
        if ending is not None:
            assert self.pool.finish is None


class Regenerated(AnyOrder):
    sampling = REGENERATED


class Refused(AnyOrder):
    sampling = REFUSED


# Without shrinking, which takes minutes and cannot shorten what comes from a seed.
for machine in (AnyOrder, Regenerated, Refused):
    machine.TestCase.settings = settings(
        max_examples=300, stateful_step_count=4, deadline=None, phases=[Phase.generate]
    )
TestWhateverHappensTheClientGetsTheOneRightAnswer = AnyOrder.TestCase
TestWhateverHappensItHoldsOfWhatIsRegenerated = Regenerated.TestCase
TestWhateverHappensItHoldsOfWhatCannotBeReplayed = Refused.TestCase


@pytest.mark.parametrize("machine", [AnyOrder, Regenerated, Refused])
def test_while_nothing_goes_wrong_every_answer_is_complete(machine: type[AnyOrder]) -> None:
    """The machines above would be content with a course that gives every request up."""
    for seed in range(30):
        world, chance = machine(), random.Random(seed)
        world.begin(chance.randrange(10), chance.randint(1, 8), chance.randrange(1000))
        while not world.course.is_over:
            chance.choice([world.compute, world.deliver])(chance.randrange(1000))
        assert world.pool.tokens == world.answer.tokens
        assert world.pool.endings == [None]
        assert world.course.attempt == 1
        world.it_ends_once_and_leaves_nothing_behind()
