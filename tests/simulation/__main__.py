"""Runs seeds of the simulated world: the real state machines of producers and consumers, with
vLLM's own scheduler, on simulated time, links and memory.

  python -m tests.simulation --seeds 20000                   prints what was reached
  python -m tests.simulation --seed 17 --verbose             replays one, with all that happens
  python -m tests.simulation --without commit --seeds 20000  must find a seed that fails, or ends
                                                             with 1
"""

from __future__ import annotations

import argparse
import os
import sys

_HASH_SEED = "PYTHONHASHSEED"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=300, help="how many (300)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (0)")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--verbose", action="store_true", help="print what happens in it")
    parser.add_argument("--processes", type=int, default=2, help="side by side (2)")
    parser.add_argument(
        "--without", metavar="GUARD", help="take a guard of the protocol out; all: one by one"
    )
    parser.add_argument("--guards", action="store_true", help="list them")
    args = parser.parse_args()
    if os.environ.get(_HASH_SEED) != "0":  # the order of sets of names is a part of a seed
        command = [sys.executable, "-m", "tests.simulation", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {_HASH_SEED: "0"})

    from tests.simulation import command as run

    if args.guards:
        return run.list_guards()
    if args.seed is not None:
        return run.replay(args.seed, args.verbose, args.without)
    seeds = range(args.first, args.first + args.seeds)
    if args.without == "all":
        return run.run_without_each(seeds, args.processes)
    return run.run(seeds, args.processes, args.without)


if __name__ == "__main__":
    sys.exit(main())
