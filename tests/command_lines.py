"""Runs many command lines of ``vllm`` and ``vllm-pd``, each in a fork of one process that has
imported vLLM.

    python -m tests.command_lines < CASES > OUTCOMES

CASES: JSON, a list of words for each. OUTCOMES: ``[status, text]`` for each; text is all that it
printed. Words before the program set its environment, as a shell has it: ``NAME=VALUE vllm-pd up``.
What a user starts imports vLLM itself: ten seconds a time.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from vllm.entrypoints.cli.main import main as vllm_main

from vllm_pd_plugin import cli
from vllm_pd_plugin.frontend import commands  # noqa: F401 to be there in each fork
from vllm_pd_plugin.frontend.doctor import command  # noqa: F401


def outcome(words: Sequence[str]) -> tuple[int, str]:
    """Run a command line to its end."""
    with tempfile.NamedTemporaryFile() as printed:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                status = _run(words)
            finally:
                if sys.exc_info()[0] is not None:
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), Path(printed.name).read_text()


def _run(words: Sequence[str]) -> int:
    settings = [word for word in itertools.takewhile(lambda word: "=" in word, words)]
    os.environ.update(setting.split("=", 1) for setting in settings)
    sys.argv = list(words[len(settings) :])
    try:
        if sys.argv[0] == "vllm-pd":
            return cli.main()
        vllm_main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    json.dump([outcome(words) for words in cases], sys.stdout)
