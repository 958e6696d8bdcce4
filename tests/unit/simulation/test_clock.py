"""Simulated time."""

from __future__ import annotations

from vllm_pd_plugin.simulation.clock import Clock, Process


def test_what_is_due_at_one_moment_happens_in_the_order_in_which_it_was_asked_for() -> None:
    clock, happened = Clock(), list[str]()
    clock.after(2.0, lambda: happened.append("last"))
    clock.after(1.0, lambda: happened.append("first"))
    clock.after(1.0, lambda: happened.append("second"))
    clock.run(1.5)
    assert (happened, clock.now) == (["first", "second"], 1.5)
    clock.run(2.0)
    assert happened == ["first", "second", "last"]


def test_a_process_that_was_killed_does_nothing_more() -> None:
    clock, happened = Clock(), list[str]()
    process = Process(clock)
    process.after(1.0, lambda: happened.append("too late"))
    process.kill()
    clock.run(2.0)
    assert happened == []


def test_a_process_that_stands_still_does_everything_later_and_in_its_order() -> None:
    clock, happened = Clock(), list[tuple[str, float]]()
    process = Process(clock)
    process.after(1.0, lambda: happened.append(("first", clock.now)))
    process.after(2.0, lambda: happened.append(("second", clock.now)))
    process.stop(5.0)
    process.after(6.0, lambda: happened.append(("third", clock.now)))
    clock.run(10.0)
    assert happened == [("first", 5.0), ("second", 5.0), ("third", 6.0)]


def test_a_clock_that_jumps_is_ahead_of_the_others_and_wakes_who_waits_by_it() -> None:
    clock, woken = Clock(), list[float]()
    process = Process(clock)
    process.on_jump(lambda: woken.append(process.time()))
    process.jump(30.0)
    clock.run(1.0)
    assert (woken, process.time(), clock.now) == ([30.0], 31.0, 1.0)
