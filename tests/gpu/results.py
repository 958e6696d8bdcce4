"""What all stages have found: as JSON, and as a page to read; rewritten after each."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.gpu.notes import PASSED
from tests.gpu.runner import Stage

STAND_IN = "**A rehearsal with CPU memory in the place of a GPU: nothing here was seen on a GPU.**"


class Results:
    """``gpu.json`` and ``gpu.md`` in a folder. device: ``cuda`` or ``cpu``."""

    def __init__(self, folder: Path, device: str) -> None:
        self._folder = folder
        self._device = device
        self._stages: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def add(self, stage: Stage, found: dict[str, Any]) -> None:
        self._stages[stage.name] = {"about": stage.about, "required": stage.is_required, **found}
        self._write()

    def _write(self) -> None:
        everything = {"device": self._device, "stages": self._stages}
        _replace(self._folder / "gpu.json", json.dumps(everything, indent=1) + "\n")
        _replace(self._folder / "gpu.md", page(self._device, self._stages))


def page(device: str, stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what was found as Markdown."""
    parts = ["# Checks on a GPU" if device == "cuda" else f"# Checks on a GPU\n\n{STAND_IN}"]
    lines = [
        [name, found["about"], found["outcome"], str(found.get("checks", 0)), f"{found['seconds']}"]
        for name, found in stages.items()
    ]
    parts.append(table(("stage", "what", "outcome", "checks", "s"), lines))
    for name, found in stages.items():
        said = [f"- {text}" for text in _remarks(found)]
        if said:
            parts.append("\n".join([f"## {name}", "", *said]))
    rates = stages.get("speed", {}).get("rates", [])
    if rates:
        parts.append("## Rates\n\n" + rate_table(rates))
    return "\n\n".join(parts) + "\n"


def _remarks(found: Mapping[str, Any]) -> list[str]:
    said = []
    if found["outcome"] != PASSED and "reason" in found:
        said.append(f"{found['outcome']}: {found['reason']}")
    said += [f"not tried: {name}: {why}" for name, why in found.get("not_tried", {}).items()]
    said += [f"wrong: {' '.join(text.split())}" for text in found.get("failures", [])]
    said += [f"{name}: {value}" for name, value in found.get("facts", {}).items()]
    return said


def rate_table(rates: Sequence[Mapping[str, Any]]) -> str:
    """GB of KV a second; beside it how much a copy on the device moves, and their ratio."""
    lines = [
        [
            row["op"], row["codec"], row["dtype"], row["cache"], str(row["block_bytes"]),
            _spread(row["gb_per_s"]), _spread(row["copy_gb_per_s"]), f"{row['to_copy']:.2f}",
        ]
        for row in rates
    ]  # fmt: skip
    head = ("op", "codec", "dtype", "cache", "block bytes", "GB/s", "copy GB/s", "÷ copy")
    return table(head, lines)


def _spread(values: Sequence[float]) -> str:
    low, median, high = values
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)
