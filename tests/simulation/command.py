"""What the command does: many seeds on a few processes, or one with its log."""

from __future__ import annotations

import atexit
import gc
import logging
import multiprocessing
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence

_AT_ONCE = 20
_SHOWN_FAILURES = 20
_ALL_IS_REACHED_IN = 10_000
"""Seeds of which all that can be reached must have been."""

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    logging.disable(logging.CRITICAL)
    import torch

    from tests.simulation import coverage
    from tests.simulation.guards import GUARDS
    from tests.simulation.world import Result, run_seed

Batch = tuple[list[Result], Counter[str]]


def run(seeds: range, processes: int, without: str | None) -> int:
    """Run seeds; return the exit status: 0 where all held, or where one failed without a guard."""
    _prepare(without)
    began, results, reached = time.monotonic(), [], Counter[str]()
    failures: list[Result] = []
    for batch, counts in _batches(seeds, processes):
        results += batch
        reached += counts
        failures += [result for result in batch if result.problem]
        if failures and (without or len(failures) >= _SHOWN_FAILURES):
            break
    if without is None:
        print(coverage.table(reached))
        print(_figures(results))
    for result in failures[:1] if without else failures:
        print(f"seed {result.seed}: {result.problem}")
    seconds = time.monotonic() - began
    print(f"{len(results)} seeds in {seconds:.0f} s, {len(failures)} failed")
    if without is not None:
        return int(not failures)
    missing = coverage.missing(reached) if len(seeds) >= _ALL_IS_REACHED_IN else []
    for name in missing:
        print(f"never reached: {name}")
    for name in (surprises := coverage.surprises(reached)):
        print(f"reached, and should not be: {name}")
    return int(bool(failures or missing or surprises))


def run_without_each(seeds: range, processes: int) -> int:
    """Take out one guard after the other; return 0 where each time a seed has failed."""
    unnoticed = []
    for name in GUARDS:
        print(f"without {name}: ", end="", flush=True)
        child = multiprocessing.get_context("fork").Process(
            target=lambda name=name: sys.exit(run(seeds, processes, name))
        )
        child.start()
        child.join()
        if child.exitcode:
            unnoticed.append(name)
    print(f"{len(unnoticed)} of {len(GUARDS)} are not missed: {', '.join(unnoticed) or 'none'}")
    return int(bool(unnoticed))


def replay(seed: int, verbose: bool, without: str | None) -> int:
    _prepare(without)
    result = run_seed(seed, verbose)
    print(*result.log, sep="\n")
    print(f"seed {seed}: {result.problem or 'all held'}; {result.steps} steps, ", end="")
    print(f"{result.requests} requests, {result.faults} faults")
    return int(bool(result.problem) != (without is not None))


def list_guards() -> int:
    for name, take_out in GUARDS.items():
        print(f"{name:20} without it: {take_out.__doc__}")
    return 0


def _prepare(without: str | None) -> None:
    torch.set_num_threads(1)
    coverage.watch()
    if without is not None:
        if without not in GUARDS:
            raise SystemExit(f"{without} is no guard; there are {', '.join(GUARDS)}")
        GUARDS[without]()
    gc.collect()
    gc.freeze()  # what is imported is not looked at again and again
    atexit.register(gc.unfreeze)
    gc.set_threshold(50_000, 20, 100)


def _batches(seeds: range, processes: int) -> Iterator[Batch]:
    chunks = [seeds[start : start + _AT_ONCE] for start in range(0, len(seeds), _AT_ONCE)]
    if processes < 2:
        yield from map(_run_some, chunks)
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap(_run_some, chunks)


def _run_some(seeds: Sequence[int]) -> Batch:
    coverage.reached.clear()
    results = [run_seed(seed) for seed in seeds]
    return results, Counter(coverage.reached)


def _figures(results: Sequence[Result]) -> str:
    steps, requests, faults = (
        statistics.median(getattr(result, name) for result in results)
        for name in ("steps", "requests", "faults")
    )
    return f"medians of a seed: {steps:g} engine steps, {requests:g} requests, {faults:g} faults"
