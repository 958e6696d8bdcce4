"""The requests that no engine has got yet."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Coroutine
from typing import Any

from tests.fakes.courses import FakeDispatcher, make_request

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.fakes.links import SkippingLoop
    from vllm_pd_plugin.frontend.requests.course import Course
    from vllm_pd_plugin.frontend.requests.endings import Ending
    from vllm_pd_plugin.frontend.routing.choice import Unroutable
    from vllm_pd_plugin.frontend.waiting import WaitingList

FULL = Unroutable.FULL


class Line:
    """A list, and how many of those in it can begin. begun: which have; tried: how often that was
    found out."""

    def __init__(self) -> None:
        self.room = 0
        self.begun: list[str] = []
        self.tried = 0
        self.dispatcher = FakeDispatcher()
        self.waiting = WaitingList(self._start)

    def put(self, name: str, after_s: float = 1.0, why: Unroutable = FULL) -> Course:
        self.dispatcher.clock.advance(after_s)
        course = Course(make_request(name), self.dispatcher)
        self.waiting.put(course, why, self.dispatcher.clock.now + 30)
        return course

    def _start(self, course: Course) -> None:
        self.tried += 1
        if self.room and not course.id.startswith("special"):
            self.room -= 1
            course.start()
            self.begun.append(course.id)


def run(story: Callable[[Line], Coroutine[Any, Any, None]]) -> None:
    async def tell() -> None:
        await story(Line())

    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(tell())


async def turn() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


def test_who_has_come_first_begins_first() -> None:
    async def story(line: Line) -> None:
        early = Course(make_request("early"), line.dispatcher)
        for name in "abc":
            line.put(name)
        line.waiting.put(early, FULL, 0.0)  # it was on an engine, and is back
        line.room = 3
        line.waiting.wake()
        await turn()
        assert line.begun == ["early", "a", "b"]
        assert len(line.waiting) == 1

    run(story)


def test_nothing_is_tried_before_something_has_happened() -> None:
    async def story(line: Line) -> None:
        for number in range(1000):
            line.put(str(number))
        line.room = 1000
        await asyncio.sleep(10)
        assert line.tried == 0

    run(story)


def test_an_event_costs_a_few_attempts_however_many_wait_and_however_often_it_is_told() -> None:
    async def story(line: Line) -> None:
        for number in range(1000):
            line.put(str(number))
        for _ in range(100):
            line.waiting.wake()
        await turn()
        assert (line.begun, line.tried) == ([], 4)
        line.room = 1
        line.waiting.wake()
        await turn()
        assert (line.begun, line.tried) == (["0"], 4 + 5)

    run(story)


def test_those_that_need_something_else_hold_up_nobody() -> None:
    async def story(line: Line) -> None:
        for number in range(100):
            line.put(f"special-{number}", why=Unroutable.QUEUE_FOR_PREFILL)
        line.put("a")
        line.put("b")
        line.room = 2
        line.waiting.wake()
        await turn()
        assert (line.begun, line.tried) == (["a", "b"], 4 + 2)

    run(story)


def test_why_one_waits_is_what_it_has_found_last() -> None:
    async def story(line: Line) -> None:
        course = line.put("a")
        line.waiting.put(course, Unroutable.NO_DECODE, 1e9)
        [waiting] = line.waiting.overdue(1e12)
        assert waiting.why is Unroutable.NO_DECODE

    run(story)


def test_many_begin_in_batches_between_which_others_have_their_turn() -> None:
    async def story(line: Line) -> None:
        for number in range(1000):
            line.put(str(number))
        line.room = 1000
        line.waiting.wake()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert 0 < len(line.begun) < 100
        await asyncio.sleep(1)
        assert line.begun == [str(number) for number in range(1000)]
        assert (len(line.waiting), line.waiting.num_tokens) == (0, 0)

    run(story)


def test_one_that_is_over_is_not_started() -> None:
    async def story(line: Line) -> None:
        line.put("a")
        line.put("b")
        assert line.waiting.num_tokens == 8
        line.waiting.remove("a")
        line.waiting.remove("a")
        assert line.waiting.num_tokens == 4
        line.room = 5
        line.waiting.wake()
        await turn()
        assert line.begun == ["b"]

    run(story)


def test_one_that_waits_on_keeps_its_place_and_its_deadline() -> None:
    async def story(line: Line) -> None:
        a = line.put("a")
        now = line.dispatcher.clock.now
        line.put("b", 5.0)
        line.waiting.put(a, FULL, now + 1000)
        assert [each.course.id for each in line.waiting.overdue(now + 30)] == ["a"]
        assert [each.course.id for each in line.waiting.overdue(now + 35)] == ["a", "b"]
        line.room = 1
        line.waiting.wake()
        await turn()
        assert line.begun == ["a"]

    run(story)


def test_who_waits_for_room_is_told_from_who_waits_for_an_engine() -> None:
    async def story(line: Line) -> None:
        for name, why in (("a", FULL), ("b", Unroutable.NO_DECODE), ("c", Unroutable.NO_DECODE)):
            line.put(name, why=why)
        line.put("d", why=Unroutable.QUEUE_FOR_PREFILL)
        assert line.waiting.by_ending() == {Ending.OVERLOADED: 1, Ending.NO_ENGINE: 3}
        line.waiting.put(course := line.put("e"), Unroutable.NO_DECODE, 0.0)
        assert line.waiting.by_ending()[Ending.NO_ENGINE] == 4, "it waits for something else now"
        line.waiting.remove(course.id)
        assert line.waiting.by_ending()[Ending.NO_ENGINE] == 3

    run(story)
