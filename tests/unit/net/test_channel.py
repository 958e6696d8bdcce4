"""The real channel: real sockets on loopback, real threads."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import zmq

from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.net.channel import CurveKeys, Dealer, Listener, Loop

T = TypeVar("T")

KEYS = CurveKeys.derive("the key of this cluster")
OTHER_KEYS = CurveKeys.derive("the key of another cluster")
PATIENCE_S = 10.0
"""How long something may take that is to happen; nothing waits so long when all is well."""
REFUSALS = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
)


class Engine:
    """A loop with a listener and links, and what they have heard."""

    def __init__(self, keys: CurveKeys | None, on_turn: Callable[[], float | None]) -> None:
        self.keys = keys
        self.turns = 0
        self._on_turn = on_turn
        self.loop = Loop("test", self._turn)
        self.requests: queue.Queue[list[bytes]] = queue.Queue()
        self.replies: queue.Queue[list[bytes]] = queue.Queue()
        self.listener = Listener(self.loop, ("127.0.0.1", 0), keys, self._receive)
        self.loop.start()

    def on_thread(self, function: Callable[[], T]) -> T:
        """Run on the loop's thread, and wait for what it returns."""
        results: queue.Queue[T] = queue.Queue()
        self.loop.call(lambda: results.put(function()))
        return results.get(timeout=PATIENCE_S)

    def link(self, port: int, keys: CurveKeys | None = None) -> Dealer:
        address = ("127.0.0.1", port)
        return self.on_thread(lambda: Dealer(self.loop, address, keys, self.replies.put))

    def send(self, link: Dealer, *frames: bytes) -> None:
        self.loop.call(lambda: link.send(list(frames)))

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Wait at the end until the listener has turned somebody away."""
        socket = self.listener._socket
        monitor = self.on_thread(lambda: socket.get_monitor_socket(REFUSALS))
        try:
            yield
            assert monitor.poll(round(PATIENCE_S * 1000)), "nobody was turned away"
        finally:
            self.on_thread(socket.disable_monitor)
            monitor.close(linger=0)

    def _turn(self) -> float | None:
        self.turns += 1
        return self._on_turn()

    def _receive(self, who: bytes, frames: list[bytes]) -> None:
        self.requests.put(frames)
        self.listener.send(who, [b"re", *frames])


MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make(
        keys: CurveKeys | None = None, on_turn: Callable[[], float | None] = lambda: None
    ) -> Engine:
        engines.append(Engine(keys, on_turn))
        return engines[-1]

    yield make
    for engine in engines:
        engine.loop.close()


# --- keys ------------------------------------------------------------------------------------


def test_the_same_cluster_key_gives_the_same_pairs() -> None:
    assert CurveKeys.derive("the key of this cluster") == KEYS
    secrets = {KEYS.server_secret, KEYS.client_secret}
    secrets |= {OTHER_KEYS.server_secret, OTHER_KEYS.client_secret}
    assert len(secrets) == 4


def test_secrets_are_never_shown() -> None:
    assert KEYS.server_secret.decode() not in repr(KEYS)
    assert KEYS.client_secret.decode() not in repr(KEYS)


@pytest.mark.parametrize("keys", [None, KEYS], ids=["without a key", "with a key"])
def test_engines_of_one_cluster_talk(make_engine: MakeEngine, keys: CurveKeys | None) -> None:
    here, there = make_engine(keys), make_engine(keys)
    link = here.link(there.listener.port, keys)
    here.send(link, b"header", b"\x00body\xff")
    assert there.requests.get(timeout=PATIENCE_S) == [b"header", b"\x00body\xff"]
    assert here.replies.get(timeout=PATIENCE_S) == [b"re", b"header", b"\x00body\xff"]


STRANGERS = {
    "with another key": OTHER_KEYS,
    "without a key": None,
    "that knows the server's public key only": CurveKeys(
        KEYS.server_public, b"", OTHER_KEYS.client_public, OTHER_KEYS.client_secret
    ),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_nothing_arrives_from_a_stranger(make_engine: MakeEngine, stranger: str) -> None:
    there, here = make_engine(KEYS), make_engine()
    with there.refusing():
        here.send(here.link(there.listener.port, STRANGERS[stranger]), b"from a stranger")
    friend = here.link(there.listener.port, KEYS)
    here.send(friend, b"from a friend")
    assert there.requests.get(timeout=PATIENCE_S) == [b"from a friend"]
    assert there.requests.empty()


def test_nothing_is_said_in_clear_to_a_listener_without_a_key(make_engine: MakeEngine) -> None:
    there, here = make_engine(), make_engine()
    with there.refusing():
        here.send(here.link(there.listener.port, KEYS), b"a secret")
    assert there.requests.empty()


# --- listening and linking -------------------------------------------------------------------


def test_port_0_picks_a_free_one(make_engine: MakeEngine) -> None:
    ports = {make_engine().listener.port for _ in range(2)}
    assert len(ports) == 2
    assert 0 not in ports


def test_a_port_in_use_is_refused_by_name(make_engine: MakeEngine) -> None:
    port = make_engine().listener.port
    loop = Loop("second", lambda: None)
    try:
        with pytest.raises(ConfigError) as caught:
            Listener(loop, ("127.0.0.1", port), None, lambda *_: None)
    finally:
        loop.close()
    assert f"port={port}" in str(caught.value)
    assert "host='127.0.0.1'" in str(caught.value)
    assert "set port to a free one" in str(caught.value)


def test_a_host_that_is_not_of_this_machine_is_refused_by_name() -> None:
    loop = Loop("nowhere", lambda: None)
    try:
        with pytest.raises(ConfigError, match=r"host='192\.0\.2\.1' port=0"):
            Listener(loop, ("192.0.2.1", 0), None, lambda *_: None)
    finally:
        loop.close()


def test_many_messages_arrive_in_order(make_engine: MakeEngine) -> None:
    here, there = make_engine(), make_engine()
    link = here.link(there.listener.port)
    expected = [str(number).encode() for number in range(1000)]
    for frame in expected:
        here.send(link, frame)
    assert [there.requests.get(timeout=PATIENCE_S) for _ in expected] == [[f] for f in expected]


def test_a_message_waits_for_a_listener_that_comes_later(make_engine: MakeEngine) -> None:
    here = make_engine()
    loop = Loop("late", lambda: None)
    port = Listener(loop, ("127.0.0.1", 0), None, lambda *_: None).port
    loop.close()
    link = here.link(port)
    here.send(link, b"early")
    late, requests = Loop("late", lambda: None), queue.Queue[list[bytes]]()
    Listener(late, ("127.0.0.1", port), None, lambda _, frames: requests.put(frames))
    late.start()
    try:
        assert requests.get(timeout=PATIENCE_S) == [b"early"]
    finally:
        late.close()


def test_an_answer_to_nobody_is_dropped(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.on_thread(lambda: engine.listener.send(b"nobody", [b"hello"]))
    assert engine.on_thread(lambda: "alive") == "alive"


def test_a_closed_link_hears_nothing_more(make_engine: MakeEngine) -> None:
    here, there = make_engine(), make_engine()
    closed, other = here.link(there.listener.port), here.link(there.listener.port)
    here.on_thread(closed.close)
    here.send(other, b"hello")
    assert here.replies.get(timeout=PATIENCE_S) == [b"re", b"hello"]


def test_a_link_may_be_closed_by_the_message_that_it_brings(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = make_engine(), make_engine()
    links: list[Dealer] = []
    closed = threading.Event()

    def close(_: list[bytes]) -> None:
        links[0].close()
        closed.set()

    def connect() -> Dealer:
        return Dealer(here.loop, ("127.0.0.1", there.listener.port), None, close)

    links.append(here.on_thread(connect))
    here.send(links[0], b"hello")
    assert closed.wait(PATIENCE_S)
    assert here.on_thread(lambda: "alive") == "alive"
    assert "unexpected error" not in caplog.text


# --- the loop --------------------------------------------------------------------------------


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
