"""What the control path costs as prompts, layers, ranks, peers and open handoffs grow.

Each case is timed in this checkout and in a git worktree of an older commit, one after the other,
several times. Sockets are not opened, so that it is the package's own time; the case of scattered
blocks reads with NIXL within one process.

    python -m benchmarks.control --json benchmarks/results/control.json
    python -m benchmarks.control --before HEAD~1
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import output, program
from benchmarks.common.statistics import median, quartiles
from tests.engine import say

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(__file__).with_name("cases.py")
BEFORE = "e83b495"
"""Before the control path was looked at for what grows."""

Row = dict[str, Any]


class NoBaseline(Exception):
    """There is no checkout of the older commit, or the cases do not run in it."""


def main() -> int:
    parser = program.parser("control", __doc__)
    parser.add_argument(
        "--before", default=BEFORE, metavar="COMMIT", help="what to compare with (%(default)s)"
    )
    parser.add_argument("--repeat", type=int, default=5, help="times of each (%(default)s)")
    args = parser.parse_args()
    if args.repeat < 1:
        parser.error("--repeat must be 1 or more")
    return program.run(lambda stack: run(args, stack))


def run(args: argparse.Namespace, stack: ExitStack) -> int:
    """Measure, print and write. ``stack`` gets what ends it all."""
    facts = [*output.machine(), f"Before: {args.before}. Repetitions: {args.repeat}, interleaved."]
    try:
        before = stack.enter_context(worktree(args.before))
        samples: dict[str, list[Row]] = {}
        for number in range(args.repeat):
            for arm, folder in (("before", before), ("after", ROOT)):
                for row in measure(folder):
                    samples.setdefault(row["case"], []).append({"arm": arm, **row})
            say(f"repetition {number + 1} of {args.repeat}")
    except NoBaseline as error:
        say(f"given up: {error}")
        return program.GIVEN_UP
    rows = [summary(case, found) for case, found in samples.items()]
    tables = [("The control path", table(rows))]
    print(output.as_text(tables, facts))
    if args.json:
        output.write(args.json, rows, tables, facts)
    return 0


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Check a commit out beside this one, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "before"
        git("worktree", "add", "--detach", str(path), commit)
        try:
            yield path
        finally:
            git("worktree", "remove", "--force", str(path))


def git(*words: str) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if done.returncode:
        raise NoBaseline(f"git {' '.join(words)}: {done.stderr.strip()}")


def measure(folder: Path) -> list[Row]:
    """Run the cases with a checkout's package and fakes."""
    done = subprocess.run(
        [sys.executable, str(CASES)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "NIXL_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise NoBaseline(f"the cases do not run in {folder}:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def summary(case: str, samples: list[Row]) -> Row:
    """Return one row: medians and quartiles in milliseconds, and messages."""
    row: Row = {"case": case, "n": sum(sample["arm"] == "after" for sample in samples)}
    for arm in ("before", "after"):
        found = [sample for sample in samples if sample["arm"] == arm]
        times = [sample["ms"] for sample in found]
        row[f"{arm}_ms"] = round(median(times), 4)
        row[f"{arm}_quartiles_ms"] = [round(value, 4) for value in quartiles(times)]
        row[f"{arm}_messages"] = found[0]["messages"]
        if "stretches" in found[0]:
            row[f"{arm}_stretches"] = found[0]["stretches"]
    row["messages"] = row["after_messages"]
    return row


def table(rows: list[Row]) -> str:
    head = ("case", "before, ms", "after, ms", "quartiles", "messages before", "after")
    lines = []
    for row in rows:
        low, high = row["after_quartiles_ms"]
        lines.append(
            [
                row["case"],
                f"{row['before_ms']:.3g}",
                f"{row['after_ms']:.3g}",
                f"{low:.3g} to {high:.3g}",
                f"{row['before_messages']:.0f}",
                f"{row['after_messages']:.0f}",
            ]
        )
    return output.markdown(head, lines)


if __name__ == "__main__":
    sys.exit(main())
