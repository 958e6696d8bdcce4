"""A stretch of memory that pieces of KV are put into, one beside the other; pure."""

from __future__ import annotations

import bisect
from collections.abc import Hashable
from typing import Generic, TypeVar

ALIGNMENT = 256
"""Pieces begin at multiples of it, for the sake of wide loads."""

_PIECES_AT_ONCE = 4


def max_piece_bytes(num_bytes: int) -> int:
    """Return how large a piece may be in so much memory: one fetch has two under way, and should
    not take all of it."""
    return num_bytes // _PIECES_AT_ONCE // ALIGNMENT * ALIGNMENT


class Staging:
    """Which bytes of it are taken: first fit, neighbouring gaps are one."""

    def __init__(self, num_bytes: int) -> None:
        self._gaps: list[tuple[int, int]] = [(0, num_bytes)] if num_bytes else []
        self._taken: dict[int, int] = {}
        self.free_bytes = num_bytes
        self.max_piece_bytes = max_piece_bytes(num_bytes)

    @property
    def taken_bytes(self) -> int:
        return sum(self._taken.values())

    def take(self, num_bytes: int) -> int | None:
        """Return the offset of so many free bytes; None when there are none in one stretch."""
        size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        for index, (start, length) in enumerate(self._gaps):
            if length >= size:
                if length == size:
                    del self._gaps[index]
                else:
                    self._gaps[index] = (start + size, length - size)
                self._taken[start] = size
                self.free_bytes -= size
                return start
        return None

    def give_back(self, offset: int) -> None:
        """Free what ``take`` returned."""
        start, end = offset, offset + self._taken.pop(offset)
        self.free_bytes += end - start
        index = bisect.bisect(self._gaps, (start, 0))
        if index < len(self._gaps) and self._gaps[index][0] == end:
            end += self._gaps.pop(index)[1]
        if index and sum(self._gaps[index - 1]) == start:
            index -= 1
            start = self._gaps.pop(index)[0]
        self._gaps.insert(index, (start, end - start))


Who = TypeVar("Who", bound=Hashable)


class Room(Generic[Who]):
    """A ``Staging`` that is taken from in turn.

    Who finds no room waits, and comes before all who ask later: it need not look again and again,
    and a large piece is not passed by small ones for ever.
    """

    def __init__(self, staging: Staging) -> None:
        self.staging = staging
        self._waiting: dict[Who, None] = {}
        self._may_fit = False
        """Whether there may be room now for the first that waits."""

    @property
    def max_piece_bytes(self) -> int:
        return self.staging.max_piece_bytes

    def take(self, who: Who, num_bytes: int) -> int | None:
        """Return the offset of so many free bytes; None when there are none, or others wait for
        some: ``who`` waits then."""
        offset = None
        if next(iter(self._waiting), who) == who:
            offset = self.staging.take(num_bytes)
        if offset is None:
            self._waiting.setdefault(who)
        else:
            self.leave(who)
        return offset

    def give_back(self, offset: int) -> None:
        """Free what ``take`` returned."""
        self.staging.give_back(offset)
        self._may_fit = True

    def leave(self, who: Who) -> None:
        """It does not wait any more; who is first now may fit where it did not."""
        if who in self._waiting:
            del self._waiting[who]
            self._may_fit = True

    def next_up(self) -> Who | None:
        """Return who is to try again, if there may be room for it; it is not returned again before
        something has changed."""
        if not self._may_fit:
            return None
        self._may_fit = False
        return next(iter(self._waiting), None)
