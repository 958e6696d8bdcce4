"""What every benchmark is as a program: its arguments, and its end in good order."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx

from benchmarks.common.client import RequestFailed
from benchmarks.common.network import NetworkError
from tests.engine import EngineError, say

GIVEN_UP, INTERRUPTED = 2, 130


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with ``--json``, which every benchmark has."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the rows to this file, and the tables beside it (same name, .md)",
    )
    return made


def whole_numbers(low: int, high: int) -> Callable[[str], list[int]]:
    """Return a parser of a comma list of numbers in that range."""

    def parse(text: str) -> list[int]:
        parts = text.split(",")
        if not all(part.isdecimal() and low <= int(part) <= high for part in parts):
            raise argparse.ArgumentTypeError(
                f"{text!r}: allowed are whole numbers from {low} to {high}, with commas between"
            )
        return list(dict.fromkeys(map(int, parts)))

    return parse


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a parser of a comma list of known names; the order is that of ``known``."""

    def parse(text: str) -> list[str]:
        parts = text.split(",")
        unknown = [part for part in parts if part not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)}: allowed are {', '.join(known)}, with commas between"
            )
        return [name for name in known if name in parts]

    return parse


def run(body: Callable[[ExitStack], int]) -> int:
    """Run a benchmark and return its exit status: the body's own, 2 for given up, 130 for Ctrl-C.

    What the body enters into the stack is closed whatever happens, and no further Ctrl-C
    interrupts that: no engine stays behind.
    """
    # Engines in namespaces have addresses that a proxy does not know.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"
    # A shell's background jobs ignore SIGINT, and SIGTERM is to end them as Ctrl-C does: where a
    # loop is running, asyncio turns that into a cancellation.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    stack = ExitStack()
    try:
        return body(stack)
    except (EngineError, NetworkError, RequestFailed, httpx.HTTPError) as error:
        say(f"given up: {str(error) or repr(error)}")
        return GIVEN_UP
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        with suppress(OSError):  # whoever read our output may have gone
            say("stopping everything")
        stack.close()
