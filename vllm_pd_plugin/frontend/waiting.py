"""The requests that no engine has got yet, in the order in which they are to begin.

Owned by the event loop. They are looked at when something has happened that may let one begin: an
engine has come, is free, or is another one now. Then as many begin as can, a batch at a time, so
that what engines give out meanwhile is not held up.
"""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable

from vllm_pd_plugin.frontend.requests.course import Course
from vllm_pd_plugin.frontend.requests.endings import Ending
from vllm_pd_plugin.frontend.routing.choice import Unroutable
from vllm_pd_plugin.ids import RequestId

_MOST_BEGUN = 32
_MOST_IN_VAIN = 4
"""In one batch, of those that need the same: what there was no room for, there is none for behind
it."""

Need = tuple[Unroutable, bool]
"""What a request waits for: why it cannot begin, and whether only some engines take it."""
Place = tuple[float, int]
"""Where a request stands in the list: the smallest begins first."""


@dataclasses.dataclass(slots=True, eq=False)
class Waiting:
    """A request that waits. number: tells apart those that have arrived at the same time."""

    course: Course
    why: Unroutable
    deadline: float
    number: int
    num_tokens: int

    @property
    def ending(self) -> Ending:
        """How it ends if it waits for too long."""
        return Ending.OVERLOADED if self.why is Unroutable.FULL else Ending.NO_ENGINE


def place_of(waiting: Waiting) -> Place:
    """Return a request's place: who has arrived first begins first."""
    return waiting.course.arrived_at, waiting.number


def need_of(waiting: Waiting) -> Need:
    """Return what a request has in common with others that wait for the same."""
    return waiting.why, waiting.course.request.lora_request is not None


class WaitingList:
    """start: begins a course, or lets it wait on."""

    def __init__(self, start: Callable[[Course], None]) -> None:
        self._start = start
        self._loop = asyncio.get_running_loop()
        self._ordered: list[Waiting] = []
        self._by_id: dict[RequestId, Waiting] = {}
        self._numbers = itertools.count()
        self._is_called = False
        self.num_tokens = 0
        """How many prompt tokens these requests have."""

    def __len__(self) -> int:
        return len(self._ordered)

    def put(self, course: Course, why: Unroutable, deadline: float) -> None:
        """Let a course wait; one that waits already keeps its place and its deadline."""
        if known := self._by_id.get(course.id):
            known.why = why
        else:
            waiting = Waiting(course, why, deadline, next(self._numbers), len(course.prompt))
            self._by_id[course.id] = waiting
            bisect.insort(self._ordered, waiting, key=place_of)
            self.num_tokens += waiting.num_tokens

    def remove(self, request_id: RequestId) -> None:
        """It has begun, or is over."""
        waiting = self._by_id.pop(request_id, None)
        if waiting is not None:
            del self._ordered[bisect.bisect_left(self._ordered, place_of(waiting), key=place_of)]
            self.num_tokens -= waiting.num_tokens

    def by_ending(self) -> Counter[Ending]:
        """Return how many wait for an engine that is not there, and how many for room."""
        return Counter(waiting.ending for waiting in self._ordered)

    def overdue(self, now: float) -> list[Waiting]:
        """Return those that have waited for too long."""
        return [waiting for waiting in self._ordered if now >= waiting.deadline]

    def wake(self) -> None:
        """Something has happened that may let one begin."""
        if self._ordered and not self._is_called:
            self._is_called = True
            self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        self._is_called = False
        in_vain: Counter[Need] = Counter()
        num_begun = 0
        for waiting in list(self._ordered):
            course = waiting.course
            if self._by_id.get(course.id) is not waiting:
                continue  # another one's end was its own
            if in_vain[need_of(waiting)] == _MOST_IN_VAIN:
                continue
            attempt = course.attempt
            self._start(course)
            if course.attempt != attempt:
                self.remove(course.id)
                num_begun += 1
                if num_begun == _MOST_BEGUN:
                    self.wake()
                    return
            elif not course.is_over:
                in_vain[need_of(waiting)] += 1
