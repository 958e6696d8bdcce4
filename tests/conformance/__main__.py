"""Run vLLM's own server tests on `vllm serve` and on `vllm-pd up`, and say where they differ.

python -m tests.conformance                     all modules of the plan that have no result yet
python -m tests.conformance --module test_chat  those whose path contains it, again
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import output
from tests import models
from tests.conformance import arms, hub, outcomes, plan, report, source
from tests.conformance.store import Store

WORK = arms.REPO / ".conformance"
PAGE = arms.REPO / "docs" / "conformance.md"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--module", default="", help="part of the path of the modules to run anew")
    parser.add_argument("--json", type=Path, required=True, help="where the results are written")
    args = parser.parse_args(argv)
    chosen = plan.chosen(args.module)
    if not chosen:
        parser.error(f"no module of the plan has {args.module!r} in its path")
    version = source.installed_version()
    try:
        tests = source.fetch(WORK, version)
        packages = source.install_test_packages(WORK)
    except source.SourceError as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 1
    if missing := plan.undecided(tests):
        print(f"conformance: neither in the plan nor left out: {', '.join(missing)}")
        return 1
    # Either way what was started is ended; in a job of the background SIGINT would be ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    site = arms.Site(tests, packages, hub.make(WORK / "home", models.MODELS))
    store = Store(WORK / "results" / version)
    for number, module in enumerate(chosen, 1):
        if args.module:
            store.forget(module.path)
        print(f"[{number}/{len(chosen)}] {module.path}", flush=True)
        complete(module, site, store)
        write(store, args.json)
    return 0


def complete(module: plan.Module, site: arms.Site, store: Store) -> None:
    """Run what a module lacks: each arm once, then what failed until two runs agree."""
    for arm in arms.ARMS:
        if not store.runs(module.path, arm):
            _run(module, arm, site, store, None)
    for _ in range(outcomes.MAX_RUNS - 1):
        found = {arm: store.runs(module.path, arm) for arm in arms.ARMS}
        for arm, tests in outcomes.to_rerun(found).items():
            if tests:
                _run(module, arm, site, store, tests)


def _run(
    module: plan.Module, arm: str, site: arms.Site, store: Store, only: Sequence[str] | None
) -> None:
    number = len(store.runs(module.path, arm)) + 1
    place = store.place(module.path, arm, number)
    run = arms.run(module.path, arm, site, place, module.deadline_s, only)
    store.add(module.path, arm, run)
    counts = {outcome: list(run.tests.values()).count(outcome) for outcome in outcomes.Outcome}
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    print(f"  {arm}, run {number}: {told or run.trouble} ({run.seconds:.0f} s)", flush=True)


def write(store: Store, path: Path) -> None:
    """Write the results of all modules that have run on both arms, of earlier calls too."""
    found = {
        module.path: {arm: store.runs(module.path, arm) for arm in arms.ARMS}
        for module in plan.PLAN
    }
    whole = {module: runs for module, runs in found.items() if all(runs.values())}
    path.write_text(json.dumps(report.rows(whole), indent=2) + "\n")
    facts = "\n".join(f"- {fact}" for fact in output.machine())
    output.write_between(PAGE, "conformance", f"{report.tables(whole, len(plan.PLAN))}\n\n{facts}")


if __name__ == "__main__":
    sys.exit(main())
