"""Runs many command lines of vLLM, each in a fork of one process that has imported it.

    python -m tests.command_lines < CASES > OUTCOMES

CASES: JSON, a list of arguments after ``vllm`` for each. OUTCOMES: ``[status, text]`` for each, and
text is all that it printed. What a user starts imports vLLM itself: ten seconds a time.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from vllm.entrypoints.cli.main import main as vllm_main


def outcome(arguments: Sequence[str]) -> tuple[int, str]:
    """Run ``vllm`` with these arguments to its end."""
    with tempfile.NamedTemporaryFile() as printed:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                status = _run(arguments)
            finally:
                if sys.exc_info()[0] is not None:
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), Path(printed.name).read_text()


def _run(arguments: Sequence[str]) -> int:
    sys.argv = ["vllm", *arguments]
    try:
        vllm_main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    json.dump([outcome(arguments) for arguments in cases], sys.stdout)
