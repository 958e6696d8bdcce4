"""What `vllm-pd serve` costs: throughput, latency, CPU and memory of the frontend.

Parts: `canned`, the frontend alone, over engines that answer at once and compute nothing;
`pdplugin` and `nixl`, the whole path on real engines with tiny-llama: CPU a request of everything
that is not an engine core, behind `vllm-pd serve` and behind vllm-router with vLLM's NixlConnector.
On the canned engines also `--streams N` that are open at once, and the memory of `--soak N`
requests. With `--engines N` instead of all that: so many canned engines with `--streams`, each of
which gets a token in two seconds, and how long one choice among them takes. With `--answers N`:
the CPU of an answer and of an idle second, beside `vllm serve`, and beside another checkout's
frontend; with `--arms canned` on canned engines, without `vllm serve`. Needs two cores;
the whole path needs some 10 GB of memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks.common import output, program
from benchmarks.common.client import Prompts
from benchmarks.common.engines import SMALL_FLAGS
from benchmarks.common.processes import Cores
from benchmarks.common.statistics import Row
from benchmarks.frontend.answer_rows import ON_CANNED, ON_ENGINES
from benchmarks.frontend.answers import STEP_MS, Answers, start_over_canned, start_servers
from benchmarks.frontend.arguments import parse_arguments
from benchmarks.frontend.rows import CANNED, NOTES, SCALE, SOAK, STREAMS, tables
from benchmarks.frontend.run import (
    ANSWER_TOKENS,
    SCALE_STEP_MS,
    SOAK_SAMPLES,
    SOAK_WARM_UP,
    Canned,
    WholePath,
    start_site,
)
from benchmarks.goodput.arms import start_arms
from tests import models
from tests.engine import say
from vllm_pd_plugin.frontend.processes.open_files import raise_open_files


def main() -> int:
    args = parse_arguments(__doc__)
    return program.run(lambda stack: measure(args, stack))


def measure(args: argparse.Namespace, stack: ExitStack) -> int:
    """Take each part that is wanted, print and write. ``stack`` gets what ends it all."""
    facts = output.machine()
    folder = args.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
    folder.mkdir(parents=True, exist_ok=True)
    raise_open_files(args.engines or 0)
    rows: list[Row] = []
    for is_wanted, part in (
        ((True, measure_answers),)
        if args.answers
        else ((True, measure_scale),)
        if args.engines
        else (
            (CANNED in args.arms or args.soak, measure_fast),
            (args.streams, measure_streams),
            (set(args.arms) - {CANNED}, measure_whole_path),
        )
    ):
        if not is_wanted:
            continue
        # What one part has started ends before the next one begins, or with everything.
        own = stack.enter_context(ExitStack())
        more_facts = part(args, folder, own, rows.append)
        own.close()
        facts += more_facts
        if args.json:
            output.write(args.json, rows, tables(rows), facts)
    print(output.as_text(tables(rows), facts))
    return 0


Keep = Callable[[Row], None]


def measure_fast(args: argparse.Namespace, folder: Path, stack: ExitStack, keep: Keep) -> list[str]:
    """Measure the frontend over canned engines that are as fast as they can be."""
    say("starting canned engines and a frontend: some 30 s")
    site = start_site(models.tiny_llama(), args.workers, 0.0, folder, stack)
    canned = Canned(site, Prompts(1), args.prompt_tokens)
    facts: list[str] = []
    if CANNED in args.arms:
        for row in canned.closed(args.concurrency, args.seconds, args.repeat):
            keep(row)
        facts += notes(
            CANNED, prompt=args.prompt_tokens, answer=ANSWER_TOKENS, repeat=args.repeat,
            seconds=args.seconds,
        )  # fmt: skip
    if args.soak:
        keep(canned.soak(args.soak))
        facts += notes(SOAK, warm_up=SOAK_WARM_UP, samples=SOAK_SAMPLES + 1)
    return facts


def measure_streams(
    args: argparse.Namespace, folder: Path, stack: ExitStack, keep: Keep
) -> list[str]:
    """Measure the frontend with many streams open, over canned engines that take their time."""
    say(f"starting canned engines and a frontend for {args.streams} streams: some 30 s")
    site = start_site(models.tiny_llama(), args.workers, args.step_ms, folder, stack)
    canned = Canned(site, Prompts(2), args.prompt_tokens)
    keep(canned.streams(args.streams, args.step_ms, args.stream_seconds))
    return notes(STREAMS, step=args.step_ms)


def measure_scale(
    args: argparse.Namespace, folder: Path, stack: ExitStack, keep: Keep
) -> list[str]:
    """Measure the frontend with many engines and streams."""
    say(f"starting {args.engines} canned engines and a frontend for {args.streams} streams")
    site = start_site(models.tiny_llama(), args.workers, SCALE_STEP_MS, folder, stack, args.engines)
    keep(Canned(site, Prompts(4), args.prompt_tokens).scale(args.engines, args.streams))
    return notes(SCALE, step=SCALE_STEP_MS / 1e3)


def measure_answers(
    args: argparse.Namespace, folder: Path, stack: ExitStack, keep: Keep
) -> list[str]:
    """Measure what an answer costs beside one server alone, and another checkout's frontend."""
    is_canned = args.arms == [CANNED]
    say("starting the engines and the frontends: one to five minutes")
    start = start_over_canned if is_canned else start_servers
    answers = Answers(
        start(models.tiny_llama(), args.against, folder, stack), Prompts(5), args.prompt_tokens
    )
    for row in answers.rows(args.answers, args.repeat, args.idle_seconds):
        keep(row)
    note = ON_CANNED if is_canned else ON_ENGINES
    return [
        note.format(
            prompt=args.prompt_tokens, number=args.answers, idle=args.idle_seconds, step=STEP_MS
        )
    ]


def measure_whole_path(
    args: argparse.Namespace, folder: Path, stack: ExitStack, keep: Keep
) -> list[str]:
    """Measure what stands before the engine cores, on real engines."""
    arms = [arm for arm in args.arms if arm != CANNED]
    started = start_arms(arms, models.tiny_llama(), SMALL_FLAGS, folder, stack)
    path = WholePath(started, Prompts(3), args.prompt_tokens, args.path_concurrency)
    for row in path.rows(args.requests, args.repeat):
        keep(row)
    cores = Cores.choose()
    return notes(
        "engines", prompt=args.prompt_tokens, answer=ANSWER_TOKENS, requests=args.requests,
        concurrency=args.path_concurrency, repeat=args.repeat, first=cores.compute,
        second=cores.other,
    )  # fmt: skip


def notes(part: str, **shown: object) -> list[str]:
    return [note.format(**shown) for note in NOTES[part]]


if __name__ == "__main__":
    sys.exit(main())
