"""Runs one stage, in a process of its own; ``runner`` starts it.

python -m tests.gpu.stage ops --device cuda --work build/gpu
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from pathlib import Path

from tests.gpu.notes import Notes, NotTriedError

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--device", required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    notes = Notes(args.work / f"{args.name}.json", args.device, args.work)
    return 0 if run(args.name, notes) else 1


def run(name: str, notes: Notes) -> bool:
    """Return whether the stage has not failed; an error of any kind is a failure."""
    try:
        importlib.import_module(f"tests.gpu.{name}").run(notes)
    except NotTriedError as why:
        return notes.finish(str(why))
    except Exception as error:  # noqa: BLE001  (whatever a stage raises is its outcome)
        traceback.print_exc()
        notes.check(False, in_words(error))
    return notes.finish()


def in_words(error: Exception) -> str:
    """Return an error in one line, with the place in this project where it came from."""
    ours = [
        f for f in traceback.extract_tb(error.__traceback__) if ROOT in Path(f.filename).parents
    ]
    place = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}{place}"


if __name__ == "__main__":
    sys.exit(main())
