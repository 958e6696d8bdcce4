"""The loop that a channel runs on: real sockets on loopback, real threads."""

from __future__ import annotations

import logging
import queue
import threading
import time

import pytest
import zmq

from tests.unit.net.conftest import KEYS, PATIENCE_S, MakeEngine
from vllm_pd_plugin.net.channel import Dealer, Listener, Loop


def test_calls_run_on_the_loop_s_thread_in_order(make_engine: MakeEngine) -> None:
    engine = make_engine()
    done: list[int] = []
    for number in range(100):
        engine.loop.call(lambda n=number: done.append(n))  # type: ignore[misc]
    assert engine.on_thread(threading.current_thread).name == "test"
    assert done == list(range(100))


def test_messages_and_turns_run_on_the_loop_s_thread(make_engine: MakeEngine) -> None:
    turned: queue.Queue[str] = queue.Queue()
    engine = make_engine(on_turn=lambda: turned.put(threading.current_thread().name))
    assert turned.get(timeout=PATIENCE_S) == "test"
    heard: queue.Queue[str] = queue.Queue()

    def connect() -> Dealer:
        address = ("127.0.0.1", engine.listener.port)
        return Dealer(
            engine.loop, address, None, lambda _: heard.put(threading.current_thread().name)
        )

    engine.send(engine.on_thread(connect), b"hello")
    assert heard.get(timeout=PATIENCE_S) == "test"


# A preemption is called in before the blocks are overwritten; a commit that was sent after that
# must not be granted because both found the loop busy with other messages.
def test_a_call_runs_before_every_message_that_was_sent_after_it() -> None:
    order: list[bytes] = []
    client: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    done = threading.Event()

    def receive(who: bytes, frames: list[bytes]) -> None:
        order.append(frames[0])
        if frames[0] == b"first":
            loop.call(lambda: order.append(b"call"))
            client.send(b"second")
            time.sleep(0.1)  # it is in the listener's queue by now
        else:
            done.set()

    loop = Loop("test", lambda: None)
    try:
        port = Listener(loop, ("127.0.0.1", 0), None, receive).port
        loop.start()
        client.connect(f"tcp://127.0.0.1:{port}")
        client.send(b"first")
        assert done.wait(PATIENCE_S)
        assert order == [b"first", b"call", b"second"]
    finally:
        loop.close()
        client.close(linger=0)


def test_an_exception_in_a_call_does_not_stop_the_loop(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine()
    with caplog.at_level(logging.ERROR):
        engine.loop.call(lambda: 1 // 0)  # type: ignore[arg-type]
        assert engine.on_thread(lambda: "alive") == "alive"
    assert "a fault in a call" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_an_exception_in_a_turn_does_not_stop_the_loop(make_engine: MakeEngine) -> None:
    engine = make_engine(on_turn=lambda: 1 // 0)
    assert engine.on_thread(lambda: "alive") == "alive"
    assert engine.on_thread(lambda: "still alive") == "still alive"


def test_an_exception_over_a_message_costs_no_other_message(make_engine: MakeEngine) -> None:
    here, there = make_engine(), make_engine()
    replies: queue.Queue[list[bytes]] = queue.Queue()

    def receive(frames: list[bytes]) -> None:
        if frames[1] == b"bad":
            raise ValueError("bad")
        replies.put(frames)

    def connect() -> Dealer:
        return Dealer(here.loop, ("127.0.0.1", there.listener.port), None, receive)

    link = here.on_thread(connect)
    for text in (b"bad", b"good"):
        here.send(link, text)
    assert replies.get(timeout=PATIENCE_S) == [b"re", b"good"]


def test_a_turn_says_when_the_next_is_due(make_engine: MakeEngine) -> None:
    times: queue.Queue[float] = queue.Queue()

    def on_turn() -> float:
        times.put(time.monotonic())
        return 0.05

    make_engine(on_turn=on_turn)
    seen = [times.get(timeout=PATIENCE_S) for _ in range(4)]
    assert all(later - earlier >= 0.045 for earlier, later in zip(seen, seen[1:], strict=False))


def test_a_wait_below_a_millisecond_is_kept(make_engine: MakeEngine) -> None:
    engine = make_engine(on_turn=lambda: 0.0005)
    assert engine.on_thread(lambda: "alive") == "alive"
    before = engine.turns
    threading.Event().wait(0.2)
    assert 0 < engine.turns - before <= 410


def test_the_loop_sleeps_when_idle(make_engine: MakeEngine) -> None:
    engines = [make_engine(KEYS), make_engine()]
    for engine in engines:
        link = engine.link(engine.listener.port, engine.keys)
        engine.send(link, b"hello")
        engine.replies.get(timeout=PATIENCE_S)
    turns = [engine.turns for engine in engines]
    before = time.process_time()
    threading.Event().wait(0.5)
    assert time.process_time() - before < 0.05
    # One turn may still have been due; a loop that spins takes thousands.
    assert all(e.turns - before <= 1 for e, before in zip(engines, turns, strict=True))


def test_a_loop_that_was_never_started_can_be_closed() -> None:
    loop = Loop("idle", lambda: None)
    loop.close()
    loop.close()


def test_a_closed_loop_has_ended_its_thread(make_engine: MakeEngine) -> None:
    engine = make_engine()
    thread = engine.on_thread(threading.current_thread)
    engine.loop.close()
    assert not thread.is_alive()
    assert engine.loop.context.closed


# Its file descriptor may belong to another file by then.
def test_a_call_after_the_end_does_nothing() -> None:
    loop = Loop("ended", lambda: None)
    loop.start()
    loop.close()
    loop.call(lambda: None)


def test_what_was_called_before_the_end_still_runs() -> None:
    busy, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def on_turn() -> None:
        busy.set()
        assert go_on.wait(PATIENCE_S)

    loop = Loop("ending", on_turn)
    loop.start()
    assert busy.wait(PATIENCE_S)
    loop.call(done.set)
    closing = threading.Thread(target=loop.close)
    closing.start()
    deadline = time.monotonic() + PATIENCE_S
    while not loop._stopping and time.monotonic() < deadline:
        closing.join(0.001)
    go_on.set()
    closing.join(PATIENCE_S)
    assert done.is_set()
