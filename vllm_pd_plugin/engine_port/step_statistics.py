"""Which steps' statistics an engine's API server is told, of those that are for frontends.

It publishes them as metrics, and has nothing else to do while frontends use the engine: it need not
be woken at every step only to set the same gauges anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats

_EVERY_S = 0.25
_NO_COUNTS = SchedulerStats()
_LATER_GAUGES = ("num_kv_fetch_reqs_by_stage",)
"""Which vLLM 0.31 does not have."""


class StepStatistics:
    """Owned by the engine's own thread. clock: in seconds, of any origin."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._told_at = clock() - _EVERY_S

    def are_due(self, stats: SchedulerStats) -> bool:
        """Return whether to pass a step's statistics on; then they count as told.

        What counts something always is, and so is the last step before an engine falls idle.
        """
        now = self._clock()
        busy = stats.num_running_reqs + stats.num_waiting_reqs + stats.num_skipped_waiting_reqs
        if now < self._told_at + _EVERY_S and busy and not _counts(stats):
            return False
        self._told_at = now
        return True


def _counts(stats: SchedulerStats) -> bool:
    """Whether there is more in it than gauges, which the next step tells anew."""
    external = stats.connector_prefix_cache_stats
    rest = dataclasses.replace(
        stats,
        num_running_reqs=0,
        num_waiting_reqs=0,
        num_skipped_waiting_reqs=0,
        kv_cache_usage=0.0,
        connector_prefix_cache_stats=None if external == PrefixCacheStats() else external,
        **{name: {} for name in _LATER_GAUGES if hasattr(stats, name)},
    )
    return bool(rest != _NO_COUNTS)
