"""What was found, one line for each stage."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One stage. text: what is there; or what is wrong, and what to do.

    seconds: how long it took; None where that says nothing.
    """

    stage: str
    text: str
    seconds: float | None = None
    is_right: bool = True

    def __str__(self) -> str:
        word = "ok" if self.is_right else "FAIL"
        took = "" if self.seconds is None else f"{self.seconds * 1000:.0f} ms"
        return f"{word:<5} {self.stage:<18} {took:>8}  {' '.join(self.text.split())}"


def wrong(stage: str, text: str, seconds: float | None = None) -> Finding:
    """Return what is found where something is wrong."""
    return Finding(stage, text, seconds, is_right=False)
