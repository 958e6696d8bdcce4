"""Results on disk: a file for each run of a module on an arm, so that a rerun goes on there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.conformance.outcomes import MAX_RUNS, Outcome, Run


class Store:
    """The runs of all modules. A module's folder has its logs, too."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def folder(self, module: str) -> Path:
        made = self._folder / module.removesuffix(".py").replace("/", ".")
        made.mkdir(parents=True, exist_ok=True)
        return made

    def place(self, module: str, arm: str, number: int) -> Path:
        """Return the path of a run's files, without a suffix. number: from 1."""
        return self.folder(module) / f"{arm.replace(' ', '-')}-{number}"

    def runs(self, module: str, arm: str) -> list[Run]:
        found = []
        for number in range(1, MAX_RUNS + 1):
            path = self.place(module, arm, number).with_suffix(".json")
            if not path.exists():
                break
            found.append(_from_json(path.read_text()))
        return found

    def add(self, module: str, arm: str, run: Run) -> None:
        number = len(self.runs(module, arm)) + 1
        path = self.place(module, arm, number).with_suffix(".json")
        path.write_text(_to_json(run))

    def forget(self, module: str) -> None:
        shutil.rmtree(self.folder(module))


def _to_json(run: Run) -> str:
    told = {
        "seconds": run.seconds,
        "trouble": run.trouble,
        "num_servers": run.num_servers,
        "tests": run.tests,
        "messages": run.messages,
    }
    return json.dumps(told, indent=1) + "\n"


def _from_json(text: str) -> Run:
    told = json.loads(text)
    tests = {name: Outcome(outcome) for name, outcome in told["tests"].items()}
    return Run(tests, **{name: told[name] for name in told if name != "tests"})
