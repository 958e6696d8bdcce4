"""Circuit breakers: whom requests are spared for a while after failures in a row.

There is one for each engine, and one for each pair of engines between which handoffs have failed.
While a pair's is open the decode engine computes prompts by itself; the engines themselves are as
good as any.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection

from vllm_pd_plugin.frontend.requests.endings import Failure
from vllm_pd_plugin.frontend.routing.choice import EngineKey, Pair
from vllm_pd_plugin.ids import RequestId

logger = logging.getLogger(__name__)

_FAILURES_TO_OPEN = 3
_COOL_DOWN_S = 5.0
_LONGEST_COOL_DOWN_S = 60.0


@dataclasses.dataclass(slots=True, eq=False)
class Breaker:
    """Counts failures in a row. Some of them open it for a while; then it is half open: one request
    is let through, and no other before that has failed or worked. Each that fails doubles the time.
    """

    _failures: int = 0
    _open_until: float = 0.0
    _cool_down_s: float = _COOL_DOWN_S
    _probe: RequestId | None = None

    @property
    def is_open(self) -> bool:
        """Whether it is open or half open."""
        return self._failures >= _FAILURES_TO_OPEN

    def admits(self, now: float) -> bool:
        """Say whether a request may come through now."""
        return not self.is_open or (now >= self._open_until and self._probe is None)

    def opens_in(self, now: float) -> float:
        """Return after how many seconds one is let through again."""
        return max(0.0, self._open_until - now)

    def began(self, leg: RequestId, now: float) -> None:
        """A request has been let through."""
        if self.is_open and now >= self._open_until and self._probe is None:
            self._probe = leg

    def left(self, leg: RequestId) -> None:
        """A request is over, for whatever reason."""
        if self._probe == leg:
            self._probe = None

    def failed(self, now: float) -> bool:
        """Count a failure; say whether it has opened the breaker."""
        if self.is_open:
            if now < self._open_until:
                return False  # it was begun before
            self._cool_down_s = min(2 * self._cool_down_s, _LONGEST_COOL_DOWN_S)
            self._open_until = now + self._cool_down_s
            return False
        self._failures += 1
        if self.is_open:
            self._open_until = now + self._cool_down_s
        return self.is_open

    def worked(self) -> bool:
        """Close it; say whether it was open."""
        was_open = self.is_open
        self._failures, self._open_until, self._probe = 0, 0.0, None
        self._cool_down_s = _COOL_DOWN_S
        return was_open


@dataclasses.dataclass(slots=True, eq=False)
class PairBreakers:
    """Those of pairs of a prefill and a decode engine, as far as a handoff has failed between them.

    on_opened: takes what has opened one.
    """

    clock: Callable[[], float]
    on_opened: Callable[[Failure], None]
    _breakers: dict[Pair, Breaker] = dataclasses.field(default_factory=dict)
    _begun: dict[RequestId, Breaker] = dataclasses.field(default_factory=dict)

    @property
    def num_open(self) -> int:
        return sum(breaker.is_open for breaker in self._breakers.values())

    def __contains__(self, pair: object) -> bool:
        """Say whether nothing is handed off between a pair now."""
        breaker = self._breakers.get(pair) if self._breakers else None  # type: ignore[call-overload]
        return breaker is not None and not breaker.admits(self.clock())

    def began(self, pair: Pair, leg: RequestId) -> None:
        if breaker := self._breakers.get(pair):
            breaker.began(leg, self.clock())
            self._begun[leg] = breaker

    def left(self, leg: RequestId) -> None:
        if breaker := self._begun.pop(leg, None):
            breaker.left(leg)

    def failed(self, pair: Pair, failure: Failure) -> None:
        """A handoff has failed."""
        breaker = self._breakers.setdefault(pair, Breaker())
        if breaker.failed(self.clock()):
            self.on_opened(failure)
            text = (
                "handoffs from %s to %s fail (%s): %s computes its prompts itself, and one is "
                "tried again in %.0f s"
            )
            seconds = breaker.opens_in(self.clock())
            logger.error(text, *pair, failure, pair[1], seconds)

    def worked(self, pair: Pair) -> None:
        """KV was handed over."""
        if (breaker := self._breakers.pop(pair, None)) and breaker.worked():
            logger.info("handoffs from %s to %s work again", *pair)

    def forget(self, engine: EngineKey) -> None:
        """Another engine runs in its place, or none."""
        for pair in [pair for pair in self._breakers if engine in pair]:
            del self._breakers[pair]

    def retain(self, engines: Collection[EngineKey]) -> None:
        """Forget all pairs with an engine that is not among these."""
        there = frozenset(engines) if self._breakers else frozenset()
        for pair in [pair for pair in self._breakers if not there.issuperset(pair)]:
            del self._breakers[pair]

    def problem(self, engine: EngineKey) -> str:
        """Say which handoffs to an engine are not tried now; empty where all are."""
        now = self.clock()
        found = [(p[0], b) for p, b in self._breakers.items() if p[1] == engine and b.is_open]
        if not found:
            return ""
        names = ", ".join(sorted(key for key, _ in found))
        seconds = min(breaker.opens_in(now) for _, breaker in found)
        return f"handoffs from {names} fail; the next is tried in {seconds:.0f} s"
