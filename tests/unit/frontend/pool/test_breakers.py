"""Circuit breakers of engines, and of pairs of engines."""

from __future__ import annotations

import logging
import warnings

import pytest

from tests.fakes.clock import FakeClock

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.pool.breakers import Breaker, PairBreakers
    from vllm_pd_plugin.frontend.requests.endings import Failure

NOW, COOL_DOWN_S, LONGEST_S = 1000.0, 5.0, 60.0
PAIR, OTHER = ("p", "d"), ("q", "d")


@pytest.fixture
def breaker() -> Breaker:
    return Breaker()


def open_it(breaker: Breaker, now: float = NOW) -> None:
    for _ in range(3):
        breaker.failed(now)


def test_three_failures_one_after_another_open_it(breaker: Breaker) -> None:
    assert [breaker.failed(NOW) for _ in range(2)] == [False, False]
    assert breaker.admits(NOW)
    assert breaker.failed(NOW)
    assert not breaker.admits(NOW)
    assert not breaker.admits(NOW + COOL_DOWN_S - 0.1)
    assert breaker.admits(NOW + COOL_DOWN_S)
    assert breaker.is_open


def test_a_success_closes_it(breaker: Breaker) -> None:
    open_it(breaker)
    assert breaker.worked()
    assert breaker.admits(NOW)
    assert not breaker.is_open
    assert [breaker.failed(NOW) for _ in range(3)] == [False, False, True]
    assert breaker.opens_in(NOW) == COOL_DOWN_S


def test_what_was_begun_before_it_opened_makes_it_no_worse(breaker: Breaker) -> None:
    open_it(breaker)
    assert not any(breaker.failed(NOW + 1) for _ in range(20))
    assert breaker.admits(NOW + COOL_DOWN_S)


def test_half_open_it_lets_one_request_through_at_a_time(breaker: Breaker) -> None:
    open_it(breaker)
    later = NOW + COOL_DOWN_S
    breaker.began("early", NOW)
    assert breaker.admits(later)
    breaker.began("probe", later)
    assert not breaker.admits(later + 100)
    breaker.left("another")
    assert not breaker.admits(later + 100)
    breaker.left("probe")  # its client has gone
    assert breaker.admits(later)


def test_each_that_fails_then_doubles_the_time_up_to_a_minute(breaker: Breaker) -> None:
    open_it(breaker)
    now, waits = NOW, []
    for number in range(6):
        now += breaker.opens_in(now)
        breaker.began(str(number), now)
        assert not breaker.failed(now)
        breaker.left(str(number))
        waits.append(breaker.opens_in(now))
    assert waits == [10, 20, 40, LONGEST_S, LONGEST_S, LONGEST_S]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(NOW)


@pytest.fixture
def opened() -> list[Failure]:
    return []


@pytest.fixture
def pairs(clock: FakeClock, opened: list[Failure]) -> PairBreakers:
    return PairBreakers(clock, opened.append)


def break_it(pairs: PairBreakers, pair: tuple[str, str] = PAIR) -> None:
    for _ in range(3):
        pairs.failed(pair, Failure.REQUEST_FAILED)


def test_a_pair_that_fails_is_blocked_and_no_other(
    pairs: PairBreakers, opened: list[Failure]
) -> None:
    pairs.failed(OTHER, Failure.TIMEOUT)
    break_it(pairs)
    assert (PAIR in pairs, OTHER in pairs) == (True, False)
    assert (pairs.num_open, opened) == (1, [Failure.REQUEST_FAILED])


def test_one_request_tries_a_pair_again(pairs: PairBreakers, clock: FakeClock) -> None:
    break_it(pairs)
    clock.advance(COOL_DOWN_S)
    assert PAIR not in pairs
    pairs.began(PAIR, "probe")
    assert (PAIR in pairs, OTHER in pairs) == (True, False)
    pairs.left("probe")
    assert (PAIR in pairs, pairs.num_open) == (False, 1)
    pairs.worked(PAIR)
    assert pairs.num_open == 0


def test_it_is_logged_once_that_a_pair_fails_and_once_that_it_works(
    pairs: PairBreakers, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    break_it(pairs)
    clock.advance(COOL_DOWN_S)
    pairs.failed(PAIR, Failure.REQUEST_FAILED)
    pairs.worked(PAIR)
    pairs.worked(PAIR)
    pairs.worked(OTHER)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "handoffs from p to d fail (request_failed)",
        "handoffs from p to d work again",
    ]


def test_a_decode_engine_says_what_is_not_handed_to_it(
    pairs: PairBreakers, clock: FakeClock
) -> None:
    break_it(pairs)
    break_it(pairs, OTHER)
    clock.advance(2)
    assert pairs.problem("d") == "handoffs from p, q fail; the next is tried in 3 s"
    assert pairs.problem("p") == ""
    pairs.worked(PAIR)
    assert pairs.problem("d").startswith("handoffs from q fail")


def test_of_an_engine_that_is_another_or_gone_nothing_is_held(pairs: PairBreakers) -> None:
    break_it(pairs)
    break_it(pairs, OTHER)
    pairs.forget("p")
    assert (PAIR in pairs, OTHER in pairs) == (False, True)
    pairs.retain(["d", "q"])
    assert pairs.num_open == 1
    pairs.retain(["d"])
    assert pairs.num_open == 0
