"""How late a frontend is with what it has to do; owned by its event loop.

Three things make its clients wait, and are looked at four times a second: how much later than it
was to be is a timer of the event loop; how long messages of engines wait in a socket; and how long
outputs wait for the detokenizer. The worst of them counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_MEMORY_S = 5.0
_MOST_S = 5.0


class Lag:
    """seconds: the lag, averaged over the last seconds.

    What has been counts less by a factor of e every 5 s: a pause of 2 s by itself makes 0.7 s of
    it, and a lag of 2 s that lasts 1 s after 3.5 s. More than 5 s count as 5, so that the longest
    pause is forgotten soon after it.

    backlogs: each says for how long, in seconds, something has waited that is to be done at once.
    """

    def __init__(self, *backlogs: Callable[[], float]) -> None:
        self.seconds = 0.0
        self._backlogs = list(backlogs)
        self._begins_at = math.inf

    def watch(self, backlog: Callable[[], float]) -> None:
        """Count what waits there, too."""
        self._backlogs.append(backlog)

    def worst_s(self) -> float:
        """Return for how long the oldest has waited of what waits now."""
        return max((backlog() for backlog in self._backlogs), default=0.0)

    def for_client(self, now: float) -> float:
        """Return it for a client that comes now. What was before the first made nobody wait."""
        self._begins_at = min(self._begins_at, now)
        return self.seconds

    def note(self, began_at: float, sleep_s: float, now: float) -> None:
        """A timer has come that was to sleep for so long. It speaks for all the time that has
        passed: a loop that stands still has fewer timers, not less time."""
        if began_at < self._begins_at:
            return
        passed_s = now - began_at
        late_s = max(passed_s - sleep_s, self.worst_s(), 0.0)
        weight = 1.0 - math.exp(-passed_s / _MEMORY_S)
        self.seconds += weight * (min(late_s, _MOST_S) - self.seconds)
