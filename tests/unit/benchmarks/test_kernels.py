"""What the benchmark of the ops makes of its rates."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.kernels.__main__ import TARGETS, quartiles, targets


def test_a_ratio_is_the_median_of_the_repetitions_ratios_and_within_their_quartiles() -> None:
    """Medians of the rates would make it 2.5."""
    ours, memcpy = [4.0, 5.0, 6.0, 9.0, 1.0], [2.0, 1.0, 2.0, 3.0, 1.0]
    assert quartiles(ours, memcpy) == (1.5, 3.0, 4.0)


def make_row(op: str, to_memcpy: float, **rest: Any) -> dict[str, Any]:
    codec = op.partition(" ")[2] or "raw"
    shown = {"to_memcpy": to_memcpy, "to_memcpy_quartiles": [to_memcpy, to_memcpy]}
    where = {"dtype": "bfloat16", "layout": "rows", "block_bytes": 4096} | rest
    return {"op": op.partition(" ")[0], "codec": codec, **shown, **where}


@pytest.mark.parametrize("op", TARGETS)
def test_the_worst_cell_of_an_op_is_that_of_any_layout(op: str) -> None:
    rows = [make_row(each, 1.0) for each in TARGETS]
    rows += [make_row(op, 0.25, layout="tiles"), make_row(op, 0.5, dtype="float16")]
    rows += [make_row(op, 0.125, block_bytes=2048)]
    (line,) = [line for line in targets(rows).splitlines() if line.startswith(f"| {op} ")]
    assert line.endswith("| 0.25 (0.25 to 0.25) | bfloat16 in tiles, 4096 bytes |")
