"""Try the mapping on many random pairs of engines, and say what they were."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from hypothesis import HealthCheck, given, seed, settings

from tests.mapping.handoff import Pair, check
from tests.mapping.pairs import pairs


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mapping", description=__doc__)
    parser.add_argument("--examples", type=int, default=20_000, help="pairs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of Hypothesis (default: %(default)s)")
    arguments = parser.parse_args()
    seen: Counter[str] = Counter()

    @seed(arguments.seed)
    @settings(
        max_examples=arguments.examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(pairs())
    def try_all(pair: Pair) -> None:
        seen.update(check(pair), pairs=1)

    began_at = time.monotonic()
    try_all()
    for name, count in sorted(seen.items()):
        print(f"{name:20} {count:12,}")
    print(f"{'seconds':20} {time.monotonic() - began_at:12,.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
