"""Members that can take the place of one another, of which some are drawn at random.

What a draw costs does not depend on how many there are: a member that is found to have no room is
left out, until something happens on its engine that may have made some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_pd_plugin.frontend.pool.members import Member
    from vllm_pd_plugin.frontend.routing.choice import Engine, EngineKey


class Group:
    """Members of a kind that all prefill, or all decode. random: what draws."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._all: list[Member] = []
        self._ready: list[Member] = []
        """Those that may have room."""
        self._places: dict[EngineKey, int] = {}
        """Where in that list they are."""

    def __iter__(self) -> Iterator[Member]:
        return iter(self._all)

    def add(self, member: Member) -> None:
        """A member is one of these."""
        self._all.append(member)
        self.freed(member)

    def freed(self, member: Member) -> None:
        """One of these may have room again."""
        if member.key not in self._places:
            self._places[member.key] = len(self._ready)
            self._ready.append(member)

    def draw(self, most: int, is_wanted: Callable[[Member], bool]) -> list[Engine]:
        """Return some that have room at random; fewer than so many only if there are no more."""
        drawn: list[Engine] = []
        place = 0
        while place < len(self._ready) and len(drawn) < most:
            number = place + int(self._random.random() * (len(self._ready) - place))
            self._swap(place, number)
            member = self._ready[place]
            if not member.takes_requests or (engine := member.snapshot()).is_full:
                self._leave_out(place)
                continue
            place += 1
            if is_wanted(member):
                drawn.append(engine)
        return drawn

    def some(self, most: int, is_wanted: Callable[[Member], bool]) -> list[Member]:
        """Return some that take requests, whether or not they have room."""
        found: list[Member] = []
        start = int(self._random.random() * len(self._all))
        for number in range(len(self._all)):
            member = self._all[(start + number) % len(self._all)]
            if member.takes_requests and is_wanted(member):
                found.append(member)
                if len(found) == most:
                    break
        return found

    def _swap(self, one: int, other: int) -> None:
        ready = self._ready
        ready[one], ready[other] = ready[other], ready[one]
        self._places[ready[one].key], self._places[ready[other].key] = one, other

    def _leave_out(self, place: int) -> None:
        self._swap(place, len(self._ready) - 1)
        del self._places[self._ready.pop().key]
