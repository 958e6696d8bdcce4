"""Say whether two engines gave the same answer: tokens, and log-probabilities within a bound."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from tests.engine import Completion


@dataclasses.dataclass(frozen=True, slots=True)
class Tolerance:
    """How far two answers may be apart.

    logprob: largest difference of a log-probability of the same token, in nats.
    tie: two tokens whose log-probabilities are closer than this in the reference are a tie: in
        low precision either may come first. 0 allows no tie.
    """

    logprob: float
    tie: float = 0.0


FLOAT32 = Tolerance(logprob=2e-3)
BFLOAT16 = Tolerance(logprob=0.25, tie=0.25)


def compare(reference: Completion, answer: Completion, tolerance: Tolerance) -> int:
    """Return the number of ties (0 or 1: after a tie the texts are no longer comparable).

    At every position up to the first different token, both distributions over the most likely
    tokens must agree within ``tolerance.logprob``. A different token is a tie, and no error, only
    where the reference held both tokens for equally likely, within ``tolerance.tie``.

    Raises:
        AssertionError: names the first position that differs, and by how much.
    """
    assert len(answer.token_ids) > 0
    rows = zip(
        reference.token_ids, answer.token_ids, reference.logprobs, answer.logprobs, strict=False
    )
    for position, (expected, got, expected_top, got_top) in enumerate(rows):
        for token in expected_top.keys() & got_top.keys():
            difference = abs(expected_top[token] - got_top[token])
            assert difference <= tolerance.logprob, (
                f"log-probability of {token} at {position} differs by {difference:.3g}, "
                f"allowed is {tolerance.logprob:.3g}"
            )
        if expected != got:
            gap = _gap(expected_top, expected, got)
            assert gap < tolerance.tie, (
                f"token {position} is {got}, expected {expected} (gap {gap}, "
                f"a tie is below {tolerance.tie})"
            )
            return 1
    assert len(answer.token_ids) == len(reference.token_ids)
    assert answer.finish_reason == reference.finish_reason
    assert answer.text == reference.text
    return 0


def _gap(top: Mapping[str, float], expected: int, got: int) -> float:
    """Return how far apart two tokens are; infinity when one is not among the most likely."""
    ours, theirs = top.get(f"token_id:{expected}"), top.get(f"token_id:{got}")
    return math.inf if ours is None or theirs is None else abs(ours - theirs)
