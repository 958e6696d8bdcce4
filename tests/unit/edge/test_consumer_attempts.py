"""How far a request that fetches is, and each of its attempts: the tables, and how one gets along
them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping

import pytest

from vllm_pd_plugin.edge.consumer_request import (
    ATTEMPTS,
    STAGES,
    Attempt,
    AttemptState,
    ConsumingRequest,
    Stage,
)
from vllm_pd_plugin.errors import ParamsError, Reason
from vllm_pd_plugin.ids import Incarnation
from vllm_pd_plugin.protocol.events import Lost, Offered

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.fakes.consumer import TOKENS, Consumer, FakeRequest, new_source


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Stage, Stage]]:
    """The steps of requests, in order."""
    made: list[tuple[Stage, Stage]] = []
    follow = ConsumingRequest.follow

    def note(consuming: ConsumingRequest, stage: Stage) -> None:
        made.append((consuming.stage, stage))
        follow(consuming, stage)

    monkeypatch.setattr(ConsumingRequest, "follow", note)
    return made


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[AttemptState, AttemptState]]:
    """The steps of attempts, in order."""
    made: list[tuple[AttemptState, AttemptState]] = []
    follow = Attempt.follow

    def note(attempt: Attempt, state: AttemptState) -> None:
        made.append((attempt.state, state))
        follow(attempt, state)

    monkeypatch.setattr(Attempt, "follow", note)
    return made


def lose(consumer: Consumer) -> None:
    consumer.requests.lost(Lost("r", Reason.PEER_UNREACHABLE, "silence"))


def follow_and_lose_the_leader(consumer: Consumer) -> None:
    source = new_source()
    leader = consumer.add("leader", source)
    follower = consumer.add("r", source)
    consumer.requests.break_off(follower)  # type: ignore[arg-type]
    consumer.requests.finish(leader.request_id)


def abort(consumer: Consumer) -> None:
    consumer.fetching()
    consumer.requests.finish("r")


def abort_and_fail(consumer: Consumer) -> None:
    request = consumer.fetching()
    consumer.requests.finish("r")
    consumer.collect(request, Reason.ABORTED)


def fail(consumer: Consumer) -> None:
    consumer.add()
    lose(consumer)


def fail_twice(consumer: Consumer) -> None:
    request = consumer.add()
    lose(consumer)
    consumer.requests.refuse(request, 1)  # type: ignore[arg-type]


WAYS: dict[tuple[Stage, Stage], Callable[[Consumer], None]] = {
    (Stage.FOLLOWING, Stage.FAILED): follow_and_lose_the_leader,
    (Stage.TRYING, Stage.FINISHED): abort,
    (Stage.TRYING, Stage.FAILED): fail,
    (Stage.FINISHED, Stage.FAILED): abort_and_fail,
    (Stage.FAILED, Stage.FAILED): fail_twice,
}


def pairs(table: Mapping[Stage, frozenset[Stage]]) -> Iterator[tuple[Stage, Stage]]:
    return ((state, after) for state, follows in table.items() for after in follows)


def test_every_step_of_a_request_is_made(stages: list[tuple[Stage, Stage]]) -> None:
    assert set(WAYS) == set(pairs(STAGES))
    for step, go in WAYS.items():
        stages.clear()
        go(Consumer())
        assert stages[-1] == step


def offer(consumer: Consumer) -> None:
    consumer.offer(consumer.add())


def offer_and_lose(consumer: Consumer) -> None:
    offer(consumer)
    lose(consumer)


def fetch(consumer: Consumer) -> None:
    consumer.fetching()


def fetch_and_fail(consumer: Consumer) -> None:
    consumer.collect(consumer.fetching(), Reason.READ_FAILED)


ATTEMPT_WAYS: dict[tuple[AttemptState, AttemptState], Callable[[Consumer], None]] = {
    (AttemptState.WANTED, AttemptState.OFFERED): offer,
    (AttemptState.WANTED, AttemptState.ENDED): fail,
    (AttemptState.OFFERED, AttemptState.FETCHING): fetch,
    (AttemptState.OFFERED, AttemptState.ENDED): offer_and_lose,
    (AttemptState.FETCHING, AttemptState.ENDED): fetch_and_fail,
}


def test_every_step_of_an_attempt_is_made(
    attempts: list[tuple[AttemptState, AttemptState]],
) -> None:
    steps = {(state, after) for state, follows in ATTEMPTS.items() for after in follows}
    assert set(ATTEMPT_WAYS) == steps
    for step, go in ATTEMPT_WAYS.items():
        attempts.clear()
        go(Consumer())
        assert attempts[-1] == step


@pytest.mark.parametrize("state", AttemptState)
@pytest.mark.parametrize("after", AttemptState)
def test_an_attempt_takes_no_other_step(state: AttemptState, after: AttemptState) -> None:
    attempt = Attempt(new_source(), 0, True, state)
    if after in ATTEMPTS[state]:
        attempt.follow(after)
        assert attempt.state is after
    else:
        with pytest.raises(AssertionError):
            attempt.follow(after)


def test_each_source_is_an_attempt_that_ends_with_a_reason() -> None:
    consumer = Consumer()
    first = new_source()
    second = dataclasses.replace(first, address=("127.0.0.1", 7001))
    request = consumer.fetching("r", first, second)
    consuming = consumer.requests._open["r"]
    one = consuming.attempt
    consumer.fail_on_a_rank(request, Reason.READ_FAILED, attempt=0)
    other = consuming.attempt
    assert one is not None
    assert other is not None
    assert (one.state, one.reason) == (AttemptState.ENDED, Reason.READ_FAILED)
    assert (one.number, one.is_last) == (0, False)
    assert (other.state, other.source) == (AttemptState.WANTED, second)
    assert (other.number, other.is_last) == (1, True)
    consumer.requests.lost(Lost("r", Reason.CANCELLED, "no more"))
    assert (other.state, other.reason) == (AttemptState.ENDED, Reason.CANCELLED)
    assert consuming.stage is Stage.FAILED


def test_a_request_with_bad_parameters_attempts_nothing() -> None:
    consumer = Consumer()
    request = FakeRequest("r", [1, 2])
    consumer.requests.add_failed(request, ParamsError("nonsense"))  # type: ignore[arg-type]
    assert consumer.requests._open["r"].attempt is None


@pytest.mark.parametrize("go", [fail, fetch, follow_and_lose_the_leader])
def test_an_offer_that_is_not_waited_for_changes_nothing(go: Callable[[Consumer], None]) -> None:
    """It may come when the request has failed already, and must not bring it back."""
    consumer = Consumer()
    go(consumer)
    consuming = consumer.requests._open["r"]
    before = consuming.stage, consuming.num_tokens
    consumer.requests.offered(Offered("r", new_source(), TOKENS - 1, b"another prompt"))
    assert (consuming.stage, consuming.num_tokens) == before
    assert "prompt_mismatch" not in consumer.stats.data["failures"]


def test_what_is_told_late_of_one_source_does_not_end_the_attempt_at_the_next() -> None:
    """A rank says so at the same time, and may be heard first."""
    consumer = Consumer()
    first = new_source()
    second = dataclasses.replace(first, address=("127.0.0.1", 7001))
    request = consumer.fetching("r", first, second)
    consumer.fail_on_a_rank(request, Reason.PRODUCER_ENDED, attempt=0)
    attempt = consumer.requests._open["r"].attempt
    assert attempt is not None
    of_boot = dataclasses.replace(first, incarnation=Incarnation("1" * 16))
    consumer.requests.lost(Lost("r", Reason.PRODUCER_ENDED, "refused", of_boot))
    assert (attempt.source, attempt.state) == (second, AttemptState.WANTED)
    consumer.requests.lost(Lost("r", Reason.PRODUCER_ENDED, "refused", second))
    assert attempt.state is AttemptState.ENDED


@pytest.mark.parametrize(
    "order", [(Reason.KV_CHANGED, Reason.CANCELLED), (Reason.CANCELLED, Reason.KV_CHANGED)]
)
def test_kv_of_other_weights_is_not_used_whatever_else_is_said_of_its_source(
    order: tuple[Reason, Reason],
) -> None:
    consumer = Consumer()
    consumer.fetching()
    for reason in order:
        consumer.requests.lost(Lost("r", reason, "said"))
    attempt = consumer.requests._open["r"].attempt
    assert attempt is not None
    assert attempt.is_void
    assert consumer.requests.take_orders().cancels == {"r": Reason.KV_CHANGED}
