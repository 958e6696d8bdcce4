"""Simulated seconds, and the processes that live in them."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import partial

Act = Callable[[], object]


class Clock:
    """What is to happen, in the order of its time; at one moment, as it was asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Act]] = []
        self._asked = 0

    def __call__(self) -> float:
        return self.now

    @property
    def is_over(self) -> bool:
        """Whether nothing is to happen any more."""
        return not self._due

    def after(self, seconds: float, act: Act) -> None:
        self._asked += 1
        heapq.heappush(self._due, (self.now + max(0.0, seconds), self._asked, act))

    def run(self, until: float) -> None:
        """Let everything happen up to a moment, which is then."""
        due = self._due
        while due and due[0][0] <= until:
            self.now, _, act = heapq.heappop(due)
            act()
        self.now = max(self.now, until)


class Process:
    """What it does happens while it lives, and not before it goes on where it was stopped. Its own
    clock may be ahead of the simulated time, as after a suspension of its machine."""

    def __init__(self, clock: Clock) -> None:
        self.is_alive = True
        self._clock = clock
        self._ahead_s = 0.0
        self._goes_on_at = 0.0
        self._on_jump: list[Act] = []

    def time(self) -> float:
        """Seconds on its own clock."""
        return self._clock.now + self._ahead_s

    def after(self, seconds: float, act: Act) -> None:
        self._clock.after(seconds, partial(self._do, act))

    def _do(self, act: Act) -> None:
        if not self.is_alive:
            return
        if (wait_s := self._goes_on_at - self._clock.now) > 0:
            self.after(wait_s, act)
        else:
            act()

    def on_jump(self, act: Act) -> None:
        """Let something be done whenever its clock has jumped."""
        self._on_jump.append(act)

    def stop(self, seconds: float) -> None:
        """Do nothing for so long."""
        self._goes_on_at = max(self._goes_on_at, self._clock.now + seconds)

    def jump(self, seconds: float) -> None:
        self._ahead_s += seconds
        for act in self._on_jump:
            act()

    def kill(self) -> None:
        self.is_alive = False
