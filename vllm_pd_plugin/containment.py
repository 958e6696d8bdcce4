"""Where a fault ends: with the item that it belongs to.

A thread has several duties, and most of them concern many items: peers, handoffs, fetches,
messages. Whatever one of these raises, the duties after it are done, and the items beside it are
attended to. This is the one place of the engine process that catches everything.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0
"""How long a duty that has failed rests before it is tried again."""

_LOG_INTERVAL_S = 1.0

T = TypeVar("T")
Item = TypeVar("Item")
Otherwise = TypeVar("Otherwise")


class Containment:
    """What one owner guards. Owned by one thread.

    faults: how many were caught. Each duty's are logged with their traceback, one a second at the
        most.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.faults = 0
        self._name = name
        self._clock = clock
        self._logged_at: dict[str, float] = {}

    def run(self, duty: str, act: Callable[[], T], otherwise: Otherwise) -> T | Otherwise:
        """Return what ``act`` returns, or ``otherwise`` when it raises."""
        try:
            return act()
        except Exception as error:  # noqa: BLE001  see the module
            self._note(duty, error)
            return otherwise

    def each(
        self,
        duty: str,
        items: Iterable[Item],
        act: Callable[[Item], object],
        give_up: Callable[[Item], object] | None = None,
    ) -> None:
        """Attend to each item; one that raises is given up, and the next is attended to."""
        for item in list(items):
            try:
                act(item)
            except Exception as error:  # noqa: BLE001  see the module
                self._note(duty, error)
                if give_up is not None:
                    self.run(f"{duty}: giving up", partial(give_up, item), None)

    def _note(self, duty: str, error: Exception) -> None:
        self.faults += 1
        now = self._clock()
        if now >= self._logged_at.get(duty, -_LOG_INTERVAL_S) + _LOG_INTERVAL_S:
            self._logged_at[duty] = now
            text = "%s: a fault in %s, which ends there"
            logger.error(text, self._name, duty, exc_info=error)
