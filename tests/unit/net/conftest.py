"""An engine's end of the real channel, on a thread of its own."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import zmq

from vllm_pd_plugin.net.channel import CurveKeys, Dealer, Listener, Loop

T = TypeVar("T")

KEYS = CurveKeys.derive("the key of this cluster")
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
