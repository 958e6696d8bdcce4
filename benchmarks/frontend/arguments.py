"""What `benchmarks.frontend` is asked for, part by part."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common import program
from benchmarks.common.program import some_of, whole_numbers
from benchmarks.frontend.rows import CANNED
from benchmarks.frontend.run import SOAK_SAMPLES, stream_tokens

EXAMPLES = """examples:
  python -m benchmarks.frontend --quick
  python -m benchmarks.frontend --streams 1000 --soak 20000 --json benchmarks/results/frontend.json
  python -m benchmarks.frontend --arms canned --workers 2 --concurrency 64,256
  python -m benchmarks.frontend --arms pdplugin,nixl --requests 400 --repeat 7
  python -m benchmarks.frontend --answers 100 --against ../before --repeat 15 --json FILE
  python -m benchmarks.frontend --answers 40 --against ../before --repeat 24 --arms canned
  python -m benchmarks.frontend --engines 1000 --streams 10000 --json FILE
"""

ARMS = (CANNED, "pdplugin", "nixl")
MAX_CONCURRENCY = 4096
MAX_PROMPT_TOKENS, MAX_STREAM_TOKENS = 2000, 6000
"""Together within tiny-llama's longest context."""
USUAL = {"concurrency": [1, 16, 64, 256], "seconds": 8.0, "repeat": 5, "requests": 400}
QUICK = {"concurrency": [1, 8], "seconds": 2.0, "repeat": 1, "requests": 40}


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Read the command line; ends the program where it asks for what cannot be measured."""
    parser = program.parser("frontend", description)
    parser.epilog = EXAMPLES
    for add in (add_common, add_canned, add_streams, add_soak, add_scale, add_answers, add_path):
        add(parser)
    args = parser.parse_args()
    for option, value in (QUICK if args.quick else USUAL).items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    if (mistake := mistake_in(args)) is not None:
        parser.error(mistake)
    return args


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arms", type=some_of(ARMS), default=list(ARMS), metavar="ARM,...",
        help=f"some of {', '.join(ARMS)} (all)",
    )  # fmt: skip
    parser.add_argument("--repeat", type=int, help="repetitions of each measurement (5)")
    parser.add_argument(
        "--prompt-tokens", type=int, default=128, metavar="N", help="of every prompt (%(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true",
        help="small numbers and one repetition, for what is not given",
    )  # fmt: skip
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the servers' logs here")


def add_canned(parser: argparse.ArgumentParser) -> None:
    part = parser.add_argument_group("over canned engines")
    part.add_argument(
        "--concurrency", type=whole_numbers(1, MAX_CONCURRENCY), metavar="N,...",
        help="requests at a time (1,16,64,256)",
    )  # fmt: skip
    part.add_argument("--seconds", type=float, help="of one measurement (8)")
    part.add_argument(
        "--workers", type=int, default=1, metavar="N",
        help="processes of the frontend (%(default)s)",
    )  # fmt: skip


def add_streams(parser: argparse.ArgumentParser) -> None:
    part = parser.add_argument_group("many streams, over canned engines")
    part.add_argument(
        "--streams", type=int, default=0, metavar="N",
        help="also open so many at once (%(default)s: not)",
    )  # fmt: skip
    part.add_argument(
        "--stream-seconds", type=float, default=20.0, metavar="SECONDS",
        help="for how long they are watched (%(default)g)",
    )  # fmt: skip
    part.add_argument(
        "--step-ms", type=float, default=50.0, metavar="MS",
        help="a token of each stream in so many ms (%(default)g)",
    )  # fmt: skip


def add_soak(parser: argparse.ArgumentParser) -> None:
    part = parser.add_argument_group("memory, over canned engines")
    part.add_argument(
        "--soak", type=int, default=0, metavar="N",
        help="also watch it over so many requests (%(default)s: not)",
    )  # fmt: skip


def add_scale(parser: argparse.ArgumentParser) -> None:
    part = parser.add_argument_group("many canned engines")
    part.add_argument("--engines", type=int, metavar="N", help="only: so many with --streams (not)")


def add_answers(parser: argparse.ArgumentParser) -> None:
    part = parser.add_argument_group("CPU of an answer, on real engines or (--arms canned) not")
    part.add_argument(
        "--answers", type=int, metavar="N",
        help="only: of so many answers a turn, beside `vllm serve` (not)",
    )  # fmt: skip
    part.add_argument(
        "--against", type=Path, metavar="FOLDER",
        help="with --answers: also the frontend of another checkout",
    )  # fmt: skip
    part.add_argument(
        "--idle-seconds", type=float, default=60.0, metavar="SECONDS",
        help="with --answers: for how long idle servers are watched (%(default)g)",
    )  # fmt: skip


def add_path(parser: argparse.ArgumentParser) -> None:
    part = parser.add_argument_group("the whole path, on real engines")
    part.add_argument("--requests", type=int, help="in a repetition (400)")
    part.add_argument(
        "--path-concurrency", type=int, default=8, metavar="N",
        help="requests at a time (%(default)s)",
    )  # fmt: skip


def mistake_in(args: argparse.Namespace) -> str | None:
    """Say what cannot be measured; None where all can."""
    counts = (args.repeat, args.workers, args.prompt_tokens, args.requests, args.path_concurrency)
    times = (args.seconds, args.stream_seconds, args.step_ms, args.idle_seconds)
    if min(counts) < 1 or min(times) <= 0:
        return "times must be above 0, numbers 1 or more"
    if args.prompt_tokens > MAX_PROMPT_TOKENS:
        return f"--prompt-tokens must be {MAX_PROMPT_TOKENS} or less"
    if args.answers is not None and args.answers < 1:
        return "--answers must be 1 or more"
    if args.against is not None and not (args.answers and args.against.is_dir()):
        return "--against names a folder, and goes with --answers"
    if args.engines is not None and (args.engines < 2 or args.streams < 1):
        return "--engines must be 2 or more, and --streams 1 or more with it"
    if args.streams < 0 or args.soak < 0 or 0 < args.soak < SOAK_SAMPLES:
        return f"--streams must be 0 or more, --soak 0, or {SOAK_SAMPLES} or more"
    if args.streams and stream_tokens(args.step_ms, args.stream_seconds) > MAX_STREAM_TOKENS:
        return f"a stream would have more than {MAX_STREAM_TOKENS} tokens: raise --step-ms"
    return None
