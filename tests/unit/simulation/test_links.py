"""Simulated links: what ZeroMQ promises, and no more."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_pd_plugin.ids import Address
from vllm_pd_plugin.simulation.clock import Clock, Process
from vllm_pd_plugin.simulation.links import Network, SimulatedLoop

HERE: Address = ("127.0.0.1", 7000)
MOMENT_S = 0.001


class Pair:
    """A listener that repeats what it hears, and a dealer. delays: of the next messages."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.delays: list[Sequence[float]] = []
        self.network = Network(self.clock, self._fate)
        self.heard: list[tuple[bytes, bytes]] = []
        self.answers: list[bytes] = []
        self.server = Process(self.clock)
        self.server_loop = self.listen(self.server)
        client = self._loop(Process(self.clock))
        self.dealer = client.connect(HERE, None, lambda frames: self.answers.append(frames[0]))

    def listen(self, process: Process) -> SimulatedLoop:
        loop = self._loop(process)

        def hear(identity: bytes, frames: list[bytes]) -> None:
            self.heard.append((identity, frames[0]))
            listener.send(identity, frames)

        listener = loop.listen(HERE, None, hear)
        return loop

    def _loop(self, process: Process) -> SimulatedLoop:
        loop = SimulatedLoop(process, self.network, lambda: 0.0, "loop", lambda: None)
        loop.start()
        return loop

    def _fate(self, address: Address, frames: list[bytes]) -> Sequence[float]:
        return self.delays.pop(0) if self.delays else (MOMENT_S,)

    def say(self, *texts: bytes) -> list[bytes]:
        for text in texts:
            self.dealer.send([text])
        self.clock.run(self.clock.now + 10.0)
        return [text for _, text in self.heard]


def test_messages_of_one_connection_arrive_in_order_however_long_each_takes() -> None:
    pair = Pair()
    pair.delays = [(3.0,), (1.0,), (2.0,)]
    assert pair.say(b"a", b"b", b"c") == [b"a", b"b", b"c"]
    assert pair.answers == [b"a", b"b", b"c"]


def test_a_message_may_be_lost_or_come_twice() -> None:
    pair = Pair()
    pair.delays = [(), (1.0, 2.0)]
    assert pair.say(b"lost", b"twice") == [b"twice", b"twice"]


def test_what_is_sent_while_nobody_listens_reaches_whoever_listens_then() -> None:
    pair = Pair()
    pair.server.kill()
    pair.network.silence(HERE)
    assert pair.say(b"a") == []
    pair.listen(Process(pair.clock))
    assert pair.say(b"b") == [b"a", b"b"]


def test_a_connection_that_breaks_is_another_to_the_listener_and_loses_what_is_under_way() -> None:
    pair = Pair()
    pair.say(b"a")
    pair.dealer.send([b"under way"])
    pair.network.cut(HERE)
    pair.say(b"b")
    (first, said), (second, then) = pair.heard
    assert (said, then) == (b"a", b"b")
    assert first != second


def test_a_loop_runs_the_calls_that_were_made_before_it_handles_a_message() -> None:
    pair, order = Pair(), list[str]()
    loop = pair._loop(Process(pair.clock))

    def first() -> None:
        order.append("message")
        loop.call(lambda: order.append("call"))

    loop.receive(first)
    loop.receive(lambda: order.append("message"))
    pair.clock.run(1.0)
    assert order == ["message", "call", "message"]


def test_a_loop_turns_again_when_it_said_and_at_once_when_it_is_woken() -> None:
    clock, turns = Clock(), list[float]()
    network = Network(clock, lambda address, frames: ())

    def turn() -> float:
        turns.append(clock.now)
        return 2.0

    loop = SimulatedLoop(Process(clock), network, lambda: 0.25, "loop", turn)
    loop.start()
    clock.run(3.0)
    loop.wake()
    clock.run(4.0)
    assert turns == [0.25, 2.25, 3.25]
