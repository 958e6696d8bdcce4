"""What a frontend has under way on one engine, added up."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.pool.work import Share, Work
    from vllm_pd_plugin.frontend.requests.legs import Leg, LegKind


def uncomputed(legs: Iterable[Leg]) -> list[Leg]:
    return [leg for leg in legs if leg.kind is not LegKind.DECODE and not leg.has_output]


def to_compute(legs: Iterable[Leg]) -> int:
    """What is not cached of the prompts that are to be computed."""
    left = [(leg.num_tokens, leg.uncached) for leg in uncomputed(legs)]
    return sum(prompt if uncached is None else uncached for prompt, uncached in left)


def counted(legs: list[Leg]) -> Share:
    """What the sums are, one by one."""
    return Share(
        sum(leg.num_tokens for leg in uncomputed(legs)),
        len(legs),
        sum(leg.num_tokens for leg in legs),
        sum(leg.kind is not LegKind.PREFILL for leg in legs),
    )


@given(
    kinds=st.lists(st.sampled_from(list(LegKind)), min_size=1, max_size=8),
    uncached=st.lists(st.none() | st.integers(1, 10**8), max_size=8),
    events=st.lists(st.tuples(st.sampled_from(["add", "computed", "discard"]), st.integers(0, 7))),
)
def test_the_sums_are_right_whatever_happens_in_whatever_order(
    kinds: list[LegKind], uncached: list[int | None], events: list[tuple[str, int]]
) -> None:
    legs = [Leg(f"r{i}", "e", kind, 10**i, 0.0) for i, kind in enumerate(kinds)]
    for leg, number in zip(legs, uncached, strict=False):
        leg.uncached = number
    work, there = Work(), set[Leg]()
    for what, number in events:
        leg = legs[number % len(legs)]
        if what == "add":
            there.add(leg)
        elif what == "discard":
            there.discard(leg)
        elif leg in there:
            leg.has_output = True
        getattr(work, what)(leg)
        assert set(work) == there
        assert work.share == counted(list(there))
        assert work.to_compute == to_compute(there)
        some = legs[::2]
        assert work.share_without(some) == counted([leg for leg in there if leg not in some])
    work.clear()
    assert (len(work), work.share, work.to_compute) == (0, Share(), 0)


def test_a_prompt_that_was_computed_before_it_was_noted_is_not_to_be_computed() -> None:
    work = Work()
    work.add(Leg("r", "e", LegKind.WHOLE, 100, 0.0, has_output=True))
    assert work.share == Share(0, 1, 100, 1)
