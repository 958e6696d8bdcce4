"""In every process of the tests' engines: importing is made cheaper, and lines of modules are
changed as they are imported.

``PD_TEST_SUBSTITUTE``: JSON, ``{module: {regular expression: new text}}``; each to be found once.
``PD_TEST_DISTRIBUTIONS``: a file with what ``importlib.metadata.packages_distributions`` returns.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any


class Changed(SourceFileLoader):
    """changes: of the source, by what to look for."""

    def __init__(self, name: str, path: str, changes: dict[str, str]) -> None:
        super().__init__(name, path)
        self._changes = changes

    def get_code(self, fullname: str) -> CodeType:
        text = self.get_data(self.path).decode()
        for pattern, new in self._changes.items():
            text, times = re.subn(pattern, new, text)
            assert times == 1, f"{pattern} is {times} times in {self.path}"
        return self.source_to_code(text.encode(), self.path)


class Substitution(MetaPathFinder):
    """wanted: the changes by module."""

    def __init__(self, wanted: dict[str, dict[str, str]]) -> None:
        self._wanted = wanted

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        changes = self._wanted.pop(fullname, None)
        if changes is None:
            return None
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = Changed(fullname, spec.origin, changes)
        return spec


def packages_distributions() -> dict[str, list[str]]:
    """Asked by transformers. Python looks through the files of all packages: a second each time."""
    found: dict[str, list[str]] = json.loads(Path(os.environ["PD_TEST_DISTRIBUTIONS"]).read_text())
    return found


importlib.metadata.packages_distributions = packages_distributions
# Importing vLLM makes millions of objects that stay: looking for others takes a tenth of the time.
gc.set_threshold(100_000, 50, 100)
sys.meta_path.insert(0, Substitution(json.loads(os.environ["PD_TEST_SUBSTITUTE"])))
