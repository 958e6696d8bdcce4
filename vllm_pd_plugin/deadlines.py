"""When something is due for each of many keys; pure.

To set one, or to take those that are due, costs the logarithm of their number: how much is open
does not matter to a thread that has little to do.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

_FEW = 64


class Deadlines(Generic[Key]):
    """One time for each key.

    A time that is put off, as most are again and again, is only noted: its place in the heap is
    found when it comes up.
    """

    def __init__(self) -> None:
        self._at: dict[Key, float] = {}
        self._queued: dict[Key, float] = {}
        """The earliest place that a key has in the heap; not later than its time."""
        self._heap: list[tuple[float, int, Key]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, key: Key) -> bool:
        return key in self._at

    def set(self, key: Key, at: float) -> None:
        """Make a key due at a time, whatever was set before."""
        self._at[key] = at
        place = self._queued.get(key)
        if place is None or at < place:
            self._push(key, at)

    def remove(self, key: Key) -> None:
        """Forget a key; one that is not known is none."""
        self._at.pop(key, None)
        self._queued.pop(key, None)
        if len(self._heap) > 2 * len(self._at) + _FEW:
            self._heap.clear()
            for other, at in self._at.items():
                self._push(other, at)

    def take(self, now: float) -> list[Key]:
        """Remove and return the keys that are due, the longest overdue first."""
        due: list[Key] = []
        while self._heap and self._heap[0][0] <= now:
            place, _, key = heapq.heappop(self._heap)
            if self._queued.get(key) != place:  # forgotten, or it has an earlier place
                continue
            if (at := self._at[key]) > place:
                self._push(key, at)
                continue
            del self._at[key], self._queued[key]
            due.append(key)
        return due

    def next(self) -> float | None:
        """Return when the next key is due; None when there is none."""
        while self._heap:
            place, _, key = self._heap[0]
            if self._queued.get(key) != place:  # forgotten, or it has an earlier place
                heapq.heappop(self._heap)
            elif self._at[key] > place:
                heapq.heappop(self._heap)
                self._push(key, self._at[key])
            else:
                return place
        return None

    def _push(self, key: Key, at: float) -> None:
        self._queued[key] = at
        heapq.heappush(self._heap, (at, next(self._numbers), key))
