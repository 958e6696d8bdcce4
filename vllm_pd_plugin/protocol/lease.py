"""A lease: how long something is held for somebody who has gone silent."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Lease:
    """Runs out ``duration_s`` after its last renewal; times are seconds of a monotonic clock."""

    duration_s: float
    renewed_at: float

    @property
    def deadline(self) -> float:
        return self.renewed_at + self.duration_s

    def renewed(self, now: float) -> Lease:
        """Return the lease renewed at ``now``; a clock that steps back never shortens it."""
        return dataclasses.replace(self, renewed_at=max(now, self.renewed_at))

    def has_expired(self, now: float) -> bool:
        return now >= self.deadline
