"""The lists of names, and what they are made of."""

from __future__ import annotations

from pathlib import Path

from tests.vllm_names.wanted import Name, wanted
from vllm_pd_plugin.compat import MOVED, Minor

HERE = Path(__file__).parent


def path_of(minor: Minor) -> Path:
    return HERE / f"{minor[0]}.{minor[1]}.txt"


def listed(minor: Minor) -> set[Name]:
    """Return what a release line has of the names that the package used when the list was made."""
    lines = path_of(minor).read_text().splitlines()
    return {(module, name) for module, name in (line.split(" ", 1) for line in lines)}


def every_wanted() -> set[Name]:
    """Return all names that a list may have: what the package uses, what it may override, and each
    home of what has moved."""
    used, overridden = wanted()
    homes = {(module, name) for name, home in MOVED.items() for module in home.values() if module}
    return used | overridden | homes
