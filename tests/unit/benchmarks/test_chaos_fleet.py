"""What the chaos benchmark plans for a fleet, and how it judges: without engines."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from benchmarks.chaos import fleet_account as fleet_account
from benchmarks.chaos.account import Fate, Side
from benchmarks.chaos.fleet_account import Aftermath, Judged, Verdict, deviation
from benchmarks.chaos.fleet_plan import (
    LOCAL_BELOW,
    Sampling,
    Topology,
    plan_kills,
    plan_requests,
    victim,
)
from benchmarks.chaos.stream import Received, ask
from tests.engine import Completion

SEEDS = range(20)


# Plans.


def test_a_topology_says_how_many_engines_there_are_of_each_role() -> None:
    topology = Topology.parse("2p1d")
    assert (str(topology), topology) == ("2P1D", Topology(2, 1))
    assert topology.engines() == {
        "prefill-0": Side.PRODUCER,
        "prefill-1": Side.PRODUCER,
        "decode-0": Side.CONSUMER,
    }


@pytest.mark.parametrize("text", ["", "2P", "0P2D", "2P2D1", "5P4D"])
def test_what_is_no_topology_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no topology"):
        Topology.parse(text)


def test_requests_of_a_fleet_are_of_every_kind_and_follow_from_the_seed() -> None:
    requests = plan_requests(1, 300, 1.5)
    assert requests == plan_requests(1, 300, 1.5) != plan_requests(2, 300, 1.5)
    assert len({request.kind for request in requests}) == 2 * len(Sampling) * 2
    assert all(len(r.arrival.prompt()) < LOCAL_BELOW for r in requests if "short" in r.kind)
    assert any(request.arrival.abort_after_s is not None for request in requests)
    seeds = [r.options()["seed"] for r in requests if r.sampling is Sampling.SEEDED]
    assert len(set(seeds)) == len(seeds) > 0
    assert all("seed" not in r.options() for r in requests if r.sampling is not Sampling.SEEDED)


@pytest.mark.parametrize("seed", SEEDS)
def test_there_is_a_kill_in_each_period(seed: int) -> None:
    kills = plan_kills(seed, 300, 20)
    assert [int(kill.at_s // 20) for kill in kills] == list(range(15))
    assert plan_kills(seed, 300, 20) == kills
    assert plan_kills(seed, 19, 20) == []


def test_the_last_engine_of_a_side_is_spared() -> None:
    sides = Topology(2, 2).engines()
    assert victim(0.0, sides, sides.keys()) == "decode-0"
    assert victim(0.99, sides, sides.keys()) == "prefill-1"
    up = {"prefill-0", "decode-0", "decode-1"}
    assert {victim(chance / 10, sides, up) for chance in range(10)} == {"decode-0", "decode-1"}
    assert victim(0.5, sides, {"prefill-0", "decode-0"}) is None


def test_the_last_engine_of_a_side_is_killed_if_wanted() -> None:
    sides = Topology(2, 2).engines()
    assert victim(0.9, sides, {"prefill-0"}, spares_last=False) == "prefill-0"
    assert victim(0.9, sides, set(), spares_last=False) is None


# Answers.

TOKENS = (1, 2, 3, 4, 5, 6, 7, 8)
LONG = Completion(
    " ".join(map(str, TOKENS)),
    TOKENS,
    (-0.5,) * len(TOKENS),
    tuple({f"token_id:{token}": -0.5} for token in TOKENS),
    "length",
    None,
)


def piece(tokens: Sequence[int], finish_reason: str | None = None) -> dict[str, Any]:
    logprobs = {
        "token_logprobs": [-0.5 for _ in tokens],
        "top_logprobs": [{f"token_id:{token}": -0.5} for token in tokens],
    }
    text = "".join(f" {token}" if token > 1 else "1" for token in tokens)
    choice = {"text": text, "token_ids": list(tokens), "logprobs": logprobs}
    return {"choices": [choice | {"finish_reason": finish_reason}]}


def got(*tokens: int, error: str = "") -> Received:
    received = Received(status=200, error=error)
    received.take(piece(tokens, None if error else "length"))
    return received


def verdict_of(received: Received, fate: Fate = Fate.ENDED) -> Judged:
    return fleet_account.judge(7, "long, greedy, streamed", fate, received, LONG)


@pytest.mark.parametrize(
    ("tokens", "verdict"),
    [
        (TOKENS, Verdict.ANSWERED),
        ((1, 2, 3, 4, 9, 6, 7, 8), Verdict.WRONG),
        ((1, 2, 3, 4, 5, 6, 8), Verdict.WRONG),
        ((1, 2, 3, 4), Verdict.MISSING),
        ((1, 2, 5, 6, 7, 8), Verdict.MISSING),
        ((1, 2, 3, 2, 3, 4, 5, 6, 7, 8), Verdict.DUPLICATED),
        ((1, 2, 3, 2, 3, 4, 5, 6), Verdict.DUPLICATED),
        ((*TOKENS, 8), Verdict.DUPLICATED),
        ((), Verdict.MISSING),
    ],
)
def test_a_whole_answer_is_compared_token_by_token(
    tokens: tuple[int, ...], verdict: Verdict
) -> None:
    assert verdict_of(got(*tokens)).verdict is verdict


def test_equal_tokens_with_other_log_probabilities_are_wrong() -> None:
    received = got(*TOKENS)
    received.logprobs[3] = {"token_id:4": -0.6}
    judged = verdict_of(received)
    assert judged.verdict is Verdict.WRONG
    assert "log-probability" in judged.what


def test_a_client_that_left_must_have_got_the_right_tokens_until_then() -> None:
    assert verdict_of(Received(), Fate.LEFT).verdict is Verdict.LEFT
    assert verdict_of(got(1, 2, 3), Fate.LEFT).verdict is Verdict.LEFT
    assert verdict_of(got(1, 2, 9), Fate.LEFT).verdict is Verdict.WRONG
    assert verdict_of(got(1, 1, 2, 3, 4), Fate.LEFT).verdict is Verdict.DUPLICATED


def test_what_broke_off_or_hangs_says_so_unless_it_was_wrong_before() -> None:
    failed = verdict_of(got(1, 2, error="the engine was lost"))
    assert (failed.verdict, failed.what) == (Verdict.FAILED, "the engine was lost")
    assert verdict_of(got(1, 3, error="the engine was lost")).verdict is Verdict.WRONG
    hung = verdict_of(got(1, 2, error="x"), Fate.HUNG)
    assert (hung.verdict, hung.what) == (Verdict.HUNG, "after 2 of 8 tokens")


def test_equal_tokens_do_not_deviate() -> None:
    assert deviation(TOKENS, TOKENS) is None


def ask_for(body: bytes, status: int = 200, is_streamed: bool = True) -> Received:
    async def once() -> Received:
        received = Received()
        transport = httpx.MockTransport(lambda _: httpx.Response(status, content=body))
        async with httpx.AsyncClient(transport=transport) as client:
            await ask(client, "http://frontend", {"stream": is_streamed}, received)
        return received

    return asyncio.run(once())


def stream_of(*pieces: Any) -> bytes:
    lines = [each if isinstance(each, str) else json.dumps(each) for each in pieces]
    return "".join(f"data: {line}\n\n" for line in lines).encode()


def test_a_stream_is_put_together_again() -> None:
    pieces = piece(TOKENS[:1]), piece(TOKENS[1:5]), piece((), None), piece(TOKENS[5:], "length")
    received = ask_for(stream_of(*pieces, "[DONE]"))
    assert (received.error, received.completion()) == ("", LONG)
    assert len(received.arrivals) == 3


def test_a_stream_that_ends_early_or_with_an_error_has_failed() -> None:
    broken = ask_for(stream_of(piece(TOKENS[:2])))
    assert broken.error == "the stream ended before its end"
    error = {"error": {"message": "several engines failed", "code": 502}}
    told = ask_for(stream_of(piece(TOKENS[:2]), error, "[DONE]"))
    assert told.error == "several engines failed"
    assert verdict_of(told).what == "in its stream: several engines failed"


def test_an_answer_in_one_piece_is_read_and_errors_are_kept() -> None:
    whole = ask_for(json.dumps(piece(TOKENS, "length")).encode(), is_streamed=False)
    assert verdict_of(whole).verdict is Verdict.ANSWERED
    refused = ask_for(b'{"error": {"message": "no engine"}}', status=503)
    assert (refused.status, refused.error) == (503, "HTTP 503: no engine")
    assert ask_for(b"{}", is_streamed=False).error.startswith("malformed answer")


# Rows.

AFTER = Aftermath(
    kills={"decode-0": 2},
    leaked_blocks={"prefill-0": 0, "decode-0": 0},
    came_to_rest=True,
    engine_deaths=0,
    counts={"routes": {"disaggregated": 3}, "retries": {"engine_lost": 2}, "failures": {}},
)


def fleet_row(*verdicts: Verdict, **changed: Any) -> dict[str, Any]:
    judged = [
        Judged(index, "short, seeded, whole", each, "why") for index, each in enumerate(verdicts)
    ]
    streams = [(1.0, [1.5, 1.6, 4.1]), (2.0, []), (3.0, [3.75])]
    after = dataclasses.replace(AFTER, **changed)
    return fleet_account.row("frontend", "2P2D", judged, streams, after)


def test_a_row_of_a_fleet_counts_each_request_once() -> None:
    row = fleet_row(*Verdict)
    assert row["sent"] == sum(row[verdict.value] for verdict in Verdict) == len(Verdict)
    assert (row["retried"], row["longest_pause_s"], row["longest_ttft_s"]) == (2, 2.5, 0.75)
    assert row["failed_reasons"] == {"why": 1}
    assert len(row["differences"]) == 4


def test_a_fleet_is_clean_if_every_client_that_stayed_got_its_answer() -> None:
    assert fleet_account.is_clean(fleet_row(Verdict.ANSWERED, Verdict.LEFT))
    for bad in set(Verdict) - {Verdict.ANSWERED, Verdict.LEFT}:
        assert not fleet_account.is_clean(fleet_row(Verdict.ANSWERED, bad))
    for changed in (
        {"came_to_rest": False},
        {"kills": {}},
        {"engine_deaths": 1},
        {"leaked_blocks": {"prefill-0": 1, "decode-0": 0}},
        {"leaked_blocks": {"prefill-0": 0, "decode-0": None}},
    ):
        assert not fleet_account.is_clean(fleet_row(Verdict.ANSWERED, **changed))
    assert not fleet_account.is_clean(fleet_row())


def test_the_table_of_a_fleet_says_what_is_not_known() -> None:
    router = dataclasses.asdict(AFTER) | {"counts": None}
    rows = [fleet_row(Verdict.ANSWERED, Verdict.FAILED), fleet_row(Verdict.ANSWERED, **router)]
    text = fleet_account.table(rows)
    assert "| frontend | 2 | 1 | 1 | 0 | 0 | 0 | 0 | 0 | 2 | 2.5 | 0.75 | 0 | 0 |" in text
    assert "| frontend | 1 | 1 | 0 | 0 | 0 | 0 | 0 | 0 | unknown |" in text
    assert "- kills: decode-0 2" in text
    assert "- failed: why 1" in text
    assert "- frontend's retries: engine_lost 2" in text


def test_a_frontends_counts_are_read_by_reason() -> None:
    metrics = {
        'pd_frontend_retries_total{reason="engine_lost"}': 3.0,
        'pd_frontend_retries_total{reason="timeout"}': 0.0,
        'pd_frontend_retries_created{reason="engine_lost"}': 1.7e9,
        'pd_frontend_routes_total{reason="disaggregated"}': 9.0,
        'pd_frontend_failures_total{reason="deadline",slo_class="batch"}': 2.0,
        'pd_frontend_failures_total{reason="deadline",slo_class="default"}': 1.0,
        "pd_frontend_engines_lost_total": 2.0,
    }
    assert fleet_account.reason_counts(metrics) == {
        "routes": {"disaggregated": 9},
        "retries": {"engine_lost": 3},
        "failures": {"deadline": 3},
    }
