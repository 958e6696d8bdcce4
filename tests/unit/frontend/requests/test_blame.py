"""Whose fault it is that an attempt has failed."""

from __future__ import annotations

import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.requests.blame import Blame, Fault, blame_for, fault_of
    from vllm_pd_plugin.frontend.requests.endings import Failure
    from vllm_pd_plugin.frontend.requests.legs import Leg, LegKind

PREFILL, DECODE, WHOLE = LegKind.PREFILL, LegKind.DECODE, LegKind.WHOLE
FAILED, TIMEOUT = Failure.REQUEST_FAILED, Failure.TIMEOUT


def leg(kind: LegKind, has_output: bool = False) -> Leg:
    return Leg("r-1", "p" if kind is PREFILL else "d", kind, 100, 0.0, has_output)


@pytest.mark.parametrize("kind", list(LegKind))
@pytest.mark.parametrize("failure", [Failure.ENGINE_LOST, Failure.ENGINE_STOPPED])
@pytest.mark.parametrize("has_output", [True, False])
def test_that_an_engine_goes_is_no_failure_of_it(
    kind: LegKind, failure: Failure, has_output: bool
) -> None:
    assert fault_of(failure, kind, has_output) is Fault.NOBODY
    found = blame_for(failure, leg(kind, has_output), "p", False)
    assert (found.counts_for, found.ends_handoff) == (None, False)


@pytest.mark.parametrize("failure", [FAILED, TIMEOUT])
def test_a_handoff_that_fails_counts_against_the_pair_and_against_neither_engine(
    failure: Failure,
) -> None:
    assert blame_for(failure, leg(DECODE), "p", False) == Blame(
        failure, ("d", "p"), ("p", "d"), ends_handoff=True
    )


@pytest.mark.parametrize("failure", [FAILED, TIMEOUT])
def test_an_answer_that_breaks_off_is_its_engine_s_fault(failure: Failure) -> None:
    assert blame_for(failure, leg(DECODE, True), "p", False) == Blame(failure, ("d",), "d")


@pytest.mark.parametrize("failure", [FAILED, TIMEOUT])
@pytest.mark.parametrize("has_output", [True, False])
def test_what_one_engine_does_alone_is_its_own_fault(failure: Failure, has_output: bool) -> None:
    found = blame_for(failure, leg(WHOLE, has_output), None, False)
    assert found == Blame(failure, ("d",), "d")


def test_a_prompt_that_cannot_be_computed_is_the_prefill_engine_s_fault_and_ends_the_handoff() -> (
    None
):
    found = blame_for(FAILED, leg(PREFILL), "p", False)
    assert found == Blame(FAILED, ("p",), "p", ends_handoff=True)


def test_a_handoff_of_what_the_prefill_engine_could_not_compute_is_not_the_pair_s_fault() -> None:
    found = blame_for(FAILED, leg(DECODE), "p", True)
    assert found == Blame(FAILED, ("p",), "p", ends_handoff=True)


def test_every_failure_is_in_the_table() -> None:
    for failure in Failure:
        for kind in LegKind:
            for has_output in (True, False):
                assert isinstance(fault_of(failure, kind, has_output), Fault)
