"""What one stage has found so far, on disk at every moment: a stage may die."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RUNNING, PASSED, FAILED, NOT_TRIED = "running", "passed", "failed", "not tried"
_SHOWN_FAILURES = 20


class NotTriedError(Exception):
    """A stage cannot be tried here; the text says why."""


class Notes:
    """Written to a JSON file whenever something is added.

    device: ``cuda``, or ``cpu`` for the stand-in.
    work: a folder for what stages build and pass on.
    found: what is written.
    """

    def __init__(self, path: Path, device: str, work: Path) -> None:
        self.device = device
        self.work = work
        self._path = path
        self.found: dict[str, Any] = {"outcome": RUNNING, "checks": 0, "failures": []}
        self._num_failures = 0
        self._write()

    @property
    def is_stand_in(self) -> bool:
        return self.device == "cpu"

    def note(self, **found: Any) -> None:
        """Add to what is known."""
        self.found |= found
        self._write()

    def fact(self, name: str, text: str) -> None:
        """Add what the page is to say."""
        self.found.setdefault("facts", {})[name] = text
        self._write()

    def skip(self, name: str, why: str) -> None:
        """Name something that could not be tried."""
        self.found.setdefault("not_tried", {})[name] = why
        self._write()

    def check(self, is_right: bool, what: str) -> None:
        """Count a check; ``what`` says what is wrong where it is not right."""
        self.found["checks"] += 1
        if not is_right:
            self._num_failures += 1
            self.found["num_failures"] = self._num_failures
            self.found["failures"] = [*self.found["failures"], what][:_SHOWN_FAILURES]
            self._write()

    def finish(self, not_tried: str = "") -> bool:
        """Write the outcome; return whether the stage has not failed."""
        outcome = FAILED if self._num_failures else NOT_TRIED if not_tried else PASSED
        if not_tried:
            self.found["reason"] = not_tried
        self.note(outcome=outcome)
        return outcome != FAILED

    def _write(self) -> None:
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1))
        os.replace(part, self._path)
