"""How late a frontend is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vllm_pd_plugin.frontend.lag import Lag

TIMER_S = 0.25


class Loop:
    """Time in which a timer comes again and again, each time late by so much."""

    def __init__(self, *backlogs: Callable[[], float], has_clients: bool = True) -> None:
        self.lag = Lag(*backlogs)
        self.now = 100.0
        if has_clients:
            self.lag.for_client(self.now)

    def turn(self, late_s: float) -> None:
        began_at, self.now = self.now, self.now + TIMER_S + late_s
        self.lag.note(began_at, TIMER_S, self.now)

    def run(self, seconds: float, late_s: float = 0.0) -> float:
        end = self.now + seconds
        while self.now < end:
            self.turn(late_s)
        return self.lag.seconds


def test_a_loop_on_time_has_no_lag() -> None:
    assert Loop().run(60.0) == 0.0


def test_a_lag_that_lasts_is_told_as_it_is() -> None:
    assert Loop().run(60.0, 1.5) == pytest.approx(1.5, rel=0.01)


def test_a_lag_of_two_seconds_makes_one_in_some_seconds() -> None:
    loop = Loop()
    assert loop.run(2.0, 2.0) < 1.0
    assert loop.run(2.5, 2.0) > 1.0


@pytest.mark.parametrize("late_s", [0.5, 1.0, 2.0])
def test_one_pause_is_not_yet_an_overload(late_s: float) -> None:
    loop = Loop()
    loop.turn(late_s)
    assert 0.0 < loop.lag.seconds < 1.0


def test_it_does_not_matter_that_a_loop_that_stands_still_has_fewer_timers() -> None:
    seldom, often = Loop(), Loop()
    for _ in range(4):
        seldom.turn(2.0)
    while often.now < seldom.now:
        often.now += TIMER_S
        often.lag.note(often.now - TIMER_S, TIMER_S - 2.0, often.now)
    assert seldom.lag.seconds == pytest.approx(often.lag.seconds, rel=0.05)


def test_the_longest_pause_is_forgotten_in_some_seconds() -> None:
    loop = Loop()
    loop.turn(300.0)
    assert loop.lag.seconds == pytest.approx(5.0)
    assert loop.run(8.5) < 1.0


def test_what_waits_elsewhere_counts_when_it_waits_longer() -> None:
    waits = {"socket": 0.0, "detokenizer": 0.0}
    loop = Loop(lambda: waits["socket"])
    loop.lag.watch(lambda: waits["detokenizer"])
    for name in waits:
        waits.update(dict.fromkeys(waits, 0.0), **{name: 3.0})
        assert loop.run(60.0, 1.0) == pytest.approx(3.0, rel=0.01)


def test_what_was_before_clients_came_counts_for_nothing() -> None:
    loop = Loop(has_clients=False)
    loop.run(10.0, 1.0)
    assert loop.lag.for_client(loop.now + TIMER_S) == 0.0  # within the turn that comes now
    loop.turn(20.0)
    assert loop.lag.for_client(loop.now) == 0.0
    assert loop.run(60.0, 1.0) == pytest.approx(1.0, rel=0.01)
