"""A few cases of every op, for tools that make everything slow.

compute-sanitizer --tool memcheck python -m tests.gpu.few_ops --work build/gpu
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

from tests.gpu import cases
from tests.gpu.build import library_in
from tests.gpu.head_cases import moving_heads
from tests.gpu.kernels import Kernels
from tests.gpu.ops import Ops, coding_errors, head_errors, moving_errors

EVERY = 7
"""Types, layouts and encodings come by in turn; seven is no divisor of how many there are."""


def wrong(ops: Ops, device: torch.device) -> list[str]:
    """Return what is wrong in every seventh case."""
    found = []
    for moving in itertools.islice(cases.moving(1), 0, None, EVERY):
        found += moving_errors(ops, moving, device)
    for coding in itertools.islice(cases.coding(1), 0, None, EVERY):
        found += coding_errors(ops, coding, device)
    for heads in itertools.islice(moving_heads(1), 0, None, EVERY):
        found += head_errors(ops, heads, device)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    found = wrong(Kernels(library_in(args.work)), torch.device("cuda"))
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
