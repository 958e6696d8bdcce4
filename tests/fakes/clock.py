"""Time."""

from __future__ import annotations


class FakeClock:
    """Seconds that pass only when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def rests(wait_s: float | None) -> bool:
    """Whether a turn has left nothing to do but to look, in minutes, whether peers are needed."""
    return wait_s is None or wait_s > 60.0
