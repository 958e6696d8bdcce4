"""What is said of a handoff, by how it went."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest

from tests.fakes.courses import D, P
from tests.fakes.engine_core import describe
from tests.fakes.engines import make_kv
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.frontend.doctor.fetches import Fetches
from vllm_pd_plugin.frontend.doctor.findings import Finding, wrong

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import FinishReason

    from vllm_pd_plugin.frontend.doctor import judgement
    from vllm_pd_plugin.frontend.doctor.witness import Answer, Part
    from vllm_pd_plugin.frontend.requests.endings import Ending
    from vllm_pd_plugin.frontend.requests.legs import LegKind
    from vllm_pd_plugin.frontend.routing.choice import Reason as RouteReason
    from vllm_pd_plugin.frontend.routing.choice import Route

HANDED_OFF = Route(P, D, RouteReason.DISAGGREGATED)
AGAIN = Route(None, D, RouteReason.HANDOFF_FAILED)
TOKENS = [11, 12, 13, 14]
FETCHED = Fetches(2**24, 2**24, 3, 0.018, 1, Counter(raw=1))


def answer(**changes: Any) -> Answer:
    """A request that was handed off, and all went well; with some of it changed."""
    prefill = Part([10.0], 0.002, 0.12, 513, 0, FinishReason.LENGTH)
    decode = Part([10.03, 10.04, 10.06], 0.0, 0.0, 513, 512, FinishReason.LENGTH)
    fields: dict[str, Any] = {
        "tokens": list(TOKENS),
        "likeliest": [{token: -0.5, 99: -0.55, 98: -3.0} for token in TOKENS],
        "routes": [HANDED_OFF],
        "parts": {LegKind.PREFILL: prefill, LegKind.DECODE: decode},
        "seconds": 0.2,
    }
    return Answer(**fields | changes)


def failed(*reasons: Reason) -> Fetches:
    return Fetches(failures=Counter(reasons))


def test_a_finding_is_one_line_whatever_it_says() -> None:
    assert str(Finding("KV", "all of it", 0.0123)) == "ok    KV                    12 ms  all of it"
    line = str(wrong("P over HTTP", "nobody\n  is there"))
    assert line == "FAIL  P over HTTP                  nobody is there"


def test_a_handoff_that_went_well_says_what_each_part_took() -> None:
    found = judgement.judge_handoff(answer(), FETCHED)
    assert found.is_right
    assert found.seconds == 0.2
    assert found.text == (
        "prompt 120 ms on P (and 2 ms in its queue), next token 30 ms later from D, "
        "then 15 ms a step"
    )


def test_times_that_an_engine_does_not_say_are_not_invented() -> None:
    found = judgement.judge_handoff(
        answer(parts={LegKind.PREFILL: Part(), LegKind.DECODE: Part([1.0])}), None
    )
    assert found.text == "prompt ? on P, then ? a step"


FAILURES = [
    (answer(routes=[HANDED_OFF, AGAIN]), failed(Reason.READ_FAILED), "read_failed"),
    (answer(routes=[HANDED_OFF, AGAIN]), failed(Reason.READ_FAILED), "ports that UCX uses"),
    (
        answer(routes=[HANDED_OFF, AGAIN]),
        failed(Reason.PEER_UNREACHABLE),
        "peer_unreachable as the reason; let D's machine reach P's control channel",
    ),
    (answer(routes=[HANDED_OFF, AGAIN]), failed(Reason.INTERNAL), "docs/metrics.md"),
    (answer(routes=[HANDED_OFF, AGAIN]), None, "D's log says more"),
    (answer(routes=[HANDED_OFF, AGAIN]), Fetches(), "D's log says more"),
    (answer(routes=[AGAIN]), FETCHED, "does not hand it off (handoff_failed)"),
    (answer(routes=[], is_late=True), FETCHED, "the engines are full"),
    (answer(ending=Ending.REFUSED, refusal="too long"), FETCHED, "refuses it: too long"),
    (answer(ending=Ending.ATTEMPTS_EXHAUSTED), FETCHED, "(attempts_exhausted)"),
    (
        answer(parts={LegKind.PREFILL: Part(finish=FinishReason.ERROR)}),
        FETCHED,
        "P has ended the prompt (error); look into P's log",
    ),
    (answer(is_late=True, parts={}), FETCHED, "P has not computed the prompt in time"),
    (
        answer(is_late=True, parts={LegKind.PREFILL: Part([1.0])}),
        Fetches(),
        "D has not got its KV in time; the network stands still or is slow",
    ),
    (
        answer(is_late=True, parts={LegKind.PREFILL: Part([1.0])}),
        failed(Reason.PEER_UNREACHABLE),
        "D has not got its KV in time; D gives peer_unreachable",
    ),
]


@pytest.mark.parametrize(("went", "fetched", "words"), FAILURES)
def test_a_handoff_that_failed_says_why_and_what_to_do(
    went: Answer, fetched: Fetches | None, words: str
) -> None:
    found = judgement.judge_handoff(went, fetched)
    assert not found.is_right
    assert words in found.text
    assert len(str(found).splitlines()) == 1


@pytest.mark.parametrize("reason", Reason)
def test_there_is_something_to_do_about_every_reason(reason: Reason) -> None:
    found = judgement.judge_handoff(answer(routes=[HANDED_OFF, AGAIN]), failed(reason))
    assert not found.is_right
    assert f"D gives {reason} as the reason; " in found.text
    assert not found.text.endswith("; ")


def test_kv_that_came_is_counted_in_tokens_and_bytes() -> None:
    found = judgement.judge_kv(answer(), FETCHED)
    assert found.is_right
    assert found.text == "512 of 513 prompt tokens came from P: 16.0 MiB in 3 reads, raw"
    assert found.seconds == 0.018


def test_what_others_had_fetched_meanwhile_is_not_taken_for_this_handoffs() -> None:
    found = judgement.judge_kv(answer(), Fetches(2**24, 2**24, 3, 0.04, 2, Counter(raw=2)))
    assert found.text.endswith("(all that D has fetched meanwhile, over 2 ranks or handoffs)")
    assert found.seconds == 0.02


@pytest.mark.parametrize("fetched", [None, Fetches()])
def test_bytes_that_nobody_has_counted_are_not_invented(fetched: Fetches | None) -> None:
    found = judgement.judge_kv(answer(), fetched)
    assert found.is_right
    assert found.text.endswith("how many bytes, D's /metrics does not say")
    assert found.seconds is None


def test_kv_that_was_computed_anew_is_wrong_though_the_answer_is_right() -> None:
    """With kv_load_failure_policy recompute an engine hides a handoff that fails."""
    went = answer()
    went.parts[LegKind.DECODE].external_tokens = 0
    found = judgement.judge_kv(went, failed(Reason.FETCH_TIMEOUT))
    assert not found.is_right
    assert "D has computed the prompt by itself; D gives fetch_timeout" in found.text


def test_an_engine_that_does_not_say_where_kv_came_from_is_not_believed() -> None:
    went = answer()
    went.parts[LegKind.DECODE].external_tokens = None
    assert not judgement.judge_kv(went, FETCHED).is_right


def test_equal_tokens_are_right() -> None:
    found = judgement.judge_tokens(answer(), answer())
    assert found.is_right
    assert found.text == "all 4 are those of D by itself"


@pytest.mark.parametrize(
    ("token", "is_right", "words"),
    [
        (99, True, "the first 2 are those of D by itself; the next is another by rounding"),
        (98, False, "after the handoff D computes another token 3"),
        (7, False, "integrity: digest"),
    ],
)
def test_another_token_is_right_only_where_it_is_as_likely(
    token: int, is_right: bool, words: str
) -> None:
    found = judgement.judge_tokens(answer(), answer(tokens=[11, 12, token, 14]))
    assert found.is_right is is_right
    assert words in found.text


def test_another_first_token_is_what_p_computes() -> None:
    found = judgement.judge_tokens(answer(), answer(tokens=[7, 12, 13, 14]))
    assert not found.is_right
    assert found.text.startswith("P computes another token 1 than D by itself")


def test_engines_that_a_frontend_would_use_together_are_alike() -> None:
    engine = describe()
    found = judgement.judge_alike({"P": "", "D": ""}, engine, engine)
    assert found.is_right
    assert found.text == "Model, weights sampled:1"


def test_an_engine_that_a_frontend_would_not_use_is_named_with_its_reason() -> None:
    problems = {"P": "it was started with --kv-role decode", "D": ""}
    found = judgement.judge_alike(problems, describe(), describe())
    assert not found.is_right
    assert found.text == "P: it was started with --kv-role decode"


def test_blocks_of_another_size_are_named_before_a_handoff_fails_for_them() -> None:
    found = judgement.judge_alike({}, describe(block_tokens=64), describe())
    assert not found.is_right
    assert "P has blocks of 64 tokens, D of 16; give both the same --block-size" in found.text


@pytest.mark.parametrize(("kv_cache_dtype", "shown"), [("auto", "bfloat16"), ("fp8", "fp8")])
def test_an_engine_is_described_by_what_counts_for_a_handoff(
    kv_cache_dtype: str, shown: str
) -> None:
    engine = describe(role="prefill", kv=make_kv(kv_cache_dtype=kv_cache_dtype))
    text = f"model, role prefill, KV {shown} in blocks of 16 tokens, vLLM 0.32.0"
    assert judgement.describe(engine) == text


def test_d_by_itself_is_wrong_where_it_does_not_answer() -> None:
    found = judgement.judge_alone(answer(ending=Ending.DEADLINE), 513)
    assert not found.is_right
    assert "(deadline); look into D's log" in found.text
    assert not judgement.judge_alone(answer(is_late=True), 513).is_right
    right = judgement.judge_alone(answer(), 513)
    assert right.is_right
    assert right.text == "513 prompt tokens computed, 4 given"
