"""An engine whose weights are changed in place while handoffs are open."""

from __future__ import annotations

import secrets
import threading
import time
import warnings
from collections.abc import Iterator

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.fakes.bare_engine import NUM_BLOCKS, BareEngine, Tracked

PATIENCE_S = 20.0


class Pair:
    """A producer and a consumer."""

    def __init__(self) -> None:
        options = {"lease_s": 2.0}
        self.producer = BareEngine("prefill", **options)
        self.consumer = BareEngine("decode", **options)

    def produce(self, name: str) -> str:
        """Compute a prompt that is to be handed off; return the handoff's id."""
        handoff_id = secrets.token_hex(16)
        params = {"do_remote_decode": True, "handoff_id": handoff_id}
        tracked = self.producer.add(name, list(range(70)), params)
        self.step_until(tracked)
        assert tracked.outcome == "handed off"
        return handoff_id

    def consume(self, name: str, handoff_id: str) -> str:
        """Return how the consumer's request ended."""
        host, port = self.producer.address
        params = {
            "do_remote_prefill": True, "remote_host": host, "remote_port": port,
            "remote_handoff_id": handoff_id,
        }  # fmt: skip
        tracked = self.consumer.add(name, list(range(70)), params)
        self.step_until(tracked)
        return tracked.outcome

    def step_until(self, tracked: Tracked) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not tracked.outcome:
            assert time.monotonic() < deadline
            for engine in (self.producer, self.consumer):
                engine.step()

    def wait_until_free(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        engines = (self.producer, self.consumer)
        while any(engine.free_blocks < NUM_BLOCKS - 1 for engine in engines):
            assert time.monotonic() < deadline
            for engine in engines:
                engine.step()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.consumer.close()
    pair.producer.close()


def test_what_was_computed_before_is_not_taken_after(pair: Pair) -> None:
    assert pair.consume("before", pair.produce("before")) == "fetched"
    open_handoff = pair.produce("open")
    pair.producer.scheduler.weights_change(is_over=False)
    assert pair.consume("open", open_handoff) == "failed"
    pair.wait_until_free()
    pair.producer.scheduler.weights_change(is_over=True)
    # Nor is what is computed with other weights than the consumer's.
    assert pair.consume("after", pair.produce("after")) == "failed"
    pair.wait_until_free()


def test_engines_that_were_changed_alike_hand_off_again(pair: Pair) -> None:
    assert pair.consume("before", pair.produce("before")) == "fetched"
    for engine in (pair.producer, pair.consumer):
        engine.scheduler.weights_change(is_over=False)
        engine.scheduler.weights_change(is_over=True)
    assert pair.consume("after", pair.produce("after")) == "fetched"
    pair.wait_until_free()


@pytest.mark.parametrize("is_reset", [False, True])
def test_what_came_before_is_not_used_however_late_the_control_thread_is(
    pair: Pair, is_reset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    side, goes_on = pair.consumer.scheduler, threading.Event()
    ended: list[str] = []
    take = side.take_abandoned

    def take_and_note() -> tuple[list[str], list[str]]:
        unwanted, hopeless = take()
        ended.extend(unwanted + hopeless)
        return unwanted, hopeless

    monkeypatch.setattr(side, "take_abandoned", take_and_note)
    host, port = pair.producer.address
    params = {"do_remote_prefill": True, "remote_host": host, "remote_port": port}
    params["remote_handoff_id"] = pair.produce("r")
    tracked = pair.consumer.add("r", list(range(70)), params)
    deadline = time.monotonic() + PATIENCE_S
    while not tracked.waits_for_kv:
        assert time.monotonic() < deadline
        pair.consumer.step()
    try:
        side._loop.call(lambda: bool(goes_on.wait(PATIENCE_S)))
        if is_reset:
            side.reset()
        else:
            side.weights_change(is_over=False)
        while "r" not in ended and tracked.outcome != "failed":
            assert time.monotonic() < deadline
            pair.consumer.step()
    finally:
        goes_on.set()
    pair.wait_until_free()
