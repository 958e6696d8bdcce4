"""Who is there: engines that say so again and again, and what frontends see of them; pure.

Nothing in it outlives a restart, and nothing needs to: everybody says everything again within a
second. Until then the roster is not settled, and frontends take nothing away that it does not have.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping

from vllm_pd_plugin.frontend.pool.membership import Engines, Wanted
from vllm_pd_plugin.frontend.routing.choice import EngineKey, Role
from vllm_pd_plugin.ray_serve.demand import (
    Demand,
    Targets,
    decode_need,
    first_duty,
    move,
    prefill_need,
    together,
)

BEAT_S = 0.5
"""How often an engine says that it is there."""
LOOK_S = 0.25
"""How often a frontend looks."""
SILENT_S = 15.0
"""An engine that has not been heard of for so long is not there."""
SETTLE_S = 12.0
"""So long a beat may take that has to find a registry which was started again."""
_MOVE_S = 20.0
"""How long an engine that has moved to the other pool stays there at least."""


@dataclasses.dataclass(frozen=True, slots=True)
class Beat:
    """An engine is there.

    replica: who starts it; another one at the same address is another engine.
    is_flexible: whether the roster says which of the other two roles it has.
    drain_until: set when it is about to end. generation: of the deployment; see ``Wanted``.
    """

    url: EngineKey
    replica: str
    role: Role
    is_flexible: bool = False
    drain_until: float | None = None
    generation: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """engines: that are there. is_settled: whether those that are not in it have really gone."""

    engines: Engines
    is_settled: bool


@dataclasses.dataclass(slots=True)
class _Heard:
    beat: Beat
    at: float


class Roster:
    """clock: seconds that only grow. targets: what pools are sized for."""

    def __init__(self, targets: Targets, clock: Callable[[], float] = time.monotonic) -> None:
        self.targets = targets
        self._clock = clock
        self._began_at = clock()
        self._heard: dict[EngineKey, _Heard] = {}
        self._demands: dict[str, tuple[Demand, float]] = {}
        self._duties: dict[EngineKey, Role] = {}
        self._moved_at = -_MOVE_S

    def beat(self, beat: Beat) -> None:
        """An engine is there; the last one to come at an address is the one that is."""
        self._heard[beat.url] = _Heard(beat, self._clock())

    def leave(self, url: EngineKey, replica: str) -> None:
        """An engine has ended; nothing happens if another one is at its address."""
        heard = self._heard.get(url)
        if heard is not None and heard.beat.replica == replica:
            self._forget(url)

    def look(self, frontend: str, demand: Demand) -> View:
        """A frontend says what it sees, and learns who is there."""
        now = self._clock()
        self._demands[frontend] = (demand, now)
        for url, seen in demand.engines.items():
            # What the registry knew before it was started again.
            if seen.role is not Role.BOTH:
                self._duties.setdefault(url, seen.role)
        return self.view()

    def view(self) -> View:
        """Return who is there."""
        now = self._clock()
        for url, heard in list(self._heard.items()):
            if now - heard.at > SILENT_S:
                self._forget(url)
        if now - self._began_at > SETTLE_S:
            self._duties = {u: role for u, role in self._duties.items() if u in self._heard}
        self._settle_duties(now)
        engines = {
            url: Wanted(self._role(beat), beat.drain_until, beat.generation)
            for url, beat in ((url, heard.beat) for url, heard in self._heard.items())
        }
        return View(engines, now - self._began_at > SETTLE_S)

    def demand(self) -> Demand:
        """Return what all frontends see that have looked lately."""
        now = self._clock()
        self._demands = {
            name: (demand, at)
            for name, (demand, at) in self._demands.items()
            if now - at <= SILENT_S
        }
        return together(demand for demand, _ in self._demands.values())

    def needs(self) -> dict[Role, float]:
        """Return how many engines of each role are needed."""
        demand = self.demand()
        return {
            Role.PREFILL: prefill_need(demand, self.targets),
            Role.DECODE: decode_need(demand, self.targets),
        }

    @property
    def is_deserted(self) -> bool:
        """Whether nobody has been heard of for some time."""
        times = [heard.at for heard in self._heard.values()]
        times += [at for _, at in self._demands.values()]
        return self._clock() - max(times, default=self._began_at) > 6 * SILENT_S

    def _role(self, beat: Beat) -> Role:
        return (
            self._duties[beat.url] if beat.is_flexible and beat.url in self._duties else beat.role
        )

    def _forget(self, url: EngineKey) -> None:
        self._heard.pop(url, None)
        self._duties.pop(url, None)

    def _settle_duties(self, now: float) -> None:
        """Say for which pool each flexible engine works."""
        there = {u: h.beat for u, h in self._heard.items() if h.beat.drain_until is None}
        flexible = [url for url, beat in there.items() if beat.is_flexible]
        if not flexible:
            return
        fixed = _count({u: b.role for u, b in there.items() if not b.is_flexible})
        for url in flexible:
            if url not in self._duties:
                others = {u: role for u, role in self._duties.items() if u in flexible}
                self._duties[url] = first_duty(_count(others, fixed))
        if now - self._began_at <= SETTLE_S or now - self._moved_at < _MOVE_S:
            return
        moved = move({url: self._duties[url] for url in flexible}, fixed, self.needs())
        if moved is not None:
            url, role = moved
            self._duties[url] = role
            self._moved_at = now


def _count(
    roles: Mapping[EngineKey, Role], before: Mapping[Role, int] | None = None
) -> dict[Role, int]:
    counts = dict(before or {})
    for role in roles.values():
        counts[role] = counts.get(role, 0) + 1
    return counts
