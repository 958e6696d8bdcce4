"""Where a fault ends."""

from __future__ import annotations

import logging

import pytest

from tests.fakes.clock import FakeClock
from vllm_pd_plugin.containment import Containment


def fail(*_: object) -> None:
    raise RuntimeError("a defect")


@pytest.fixture
def contain() -> Containment:
    return Containment("test", FakeClock())


def test_what_goes_well_is_returned(contain: Containment) -> None:
    assert contain.run("adding", lambda: 1 + 1, None) == 2
    assert contain.faults == 0


def test_what_raises_is_replaced_and_counted(contain: Containment) -> None:
    assert contain.run("failing", fail, "instead") == "instead"
    assert contain.faults == 1


def test_an_item_that_raises_is_given_up_and_the_next_is_attended_to(
    contain: Containment,
) -> None:
    seen: list[int] = []
    given_up: list[int] = []

    def act(item: int) -> None:
        seen.append(item)
        if item == 2:
            fail()

    contain.each("items", [1, 2, 3], act, given_up.append)
    assert (seen, given_up, contain.faults) == ([1, 2, 3], [2], 1)


def test_giving_up_may_fail_too(contain: Containment) -> None:
    seen: list[int] = []

    def act(item: int) -> None:
        seen.append(item)
        fail()

    contain.each("items", [1, 2], act, fail)
    assert (seen, contain.faults) == ([1, 2], 4)


def test_items_may_come_and_go_meanwhile(contain: Containment) -> None:
    items = {1: "a", 2: "b"}
    contain.each("items", items, lambda item: items.pop(item))
    assert items == {}


def test_the_end_of_the_process_is_not_a_fault(contain: Containment) -> None:
    def end() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        contain.run("ending", end, None)


def test_a_fault_at_each_turn_is_logged_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    contain = Containment("test", clock)
    with caplog.at_level(logging.ERROR):
        for _ in range(100):
            contain.run("failing", fail, None)
        assert caplog.text.count("test: a fault in failing") == 1
        assert "RuntimeError: a defect" in caplog.text
        contain.run("another", fail, None)
        assert caplog.text.count("test: a fault in") == 2
        clock.advance(1.0)
        contain.run("failing", fail, None)
        assert caplog.text.count("test: a fault in failing") == 2
    assert contain.faults == 102
