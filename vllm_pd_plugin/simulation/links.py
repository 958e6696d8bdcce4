"""Links between engines: what the control channel is over ZeroMQ, on simulated time.

Messages of one connection arrive in order; which are lost, late or come twice is decided by the
``Fate`` that the network was given. A connection outlives its peer: what is sent while nobody
listens reaches whoever listens then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from vllm_pd_plugin.containment import LOOK_AGAIN_S, Containment
from vllm_pd_plugin.ids import Address
from vllm_pd_plugin.net.channel import CurveKeys
from vllm_pd_plugin.simulation.clock import Act, Clock, Process

Fate = Callable[[Address, list[bytes]], Sequence[float]]
"""Seconds that each copy of a message takes, which goes to or comes from an address; none where it
is lost."""

POLL_S = 0.002
"""Who wants to wait for less than that polls something that wakes it in a simulation."""
_MAX_HELD = 10_000
_MAX_ROUNDS = 1000
"""Of a loop, at one moment."""


class Spinning(AssertionError):
    """A thread never rests."""


class Network:
    """Who listens where, and who has connected."""

    def __init__(self, clock: Clock, fate: Fate) -> None:
        self.clock = clock
        self.fate = fate
        self._listeners: dict[Address, SimulatedListener] = {}
        self._dealers: dict[bytes, SimulatedDealer] = {}
        self._held: dict[Address, list[tuple[SimulatedDealer, list[bytes]]]] = {}
        self._num_connections = 0

    def listen(self, listener: SimulatedListener) -> None:
        self._listeners[listener.address] = listener
        for dealer, frames in self._held.pop(listener.address, ()):
            listener.receive(dealer, frames)

    def silence(self, address: Address) -> None:
        """Whoever listened there is gone: what is under way to and from it is lost."""
        self._listeners.pop(address, None)
        self.cut(address)

    def cut(self, address: Address) -> None:
        """Break every connection to an address; each is made anew, and nothing of it is known."""
        for dealer in [d for d in self._dealers.values() if d.address == address]:
            del self._dealers[dealer.identity]
            self._name(dealer)

    def connect(self, dealer: SimulatedDealer) -> None:
        self._name(dealer)

    def disconnect(self, dealer: SimulatedDealer) -> None:
        self._dealers.pop(dealer.identity, None)

    def _name(self, dealer: SimulatedDealer) -> None:
        self._num_connections += 1
        dealer.identity = b"connection-%d" % self._num_connections
        self._dealers[dealer.identity] = dealer

    def send(self, dealer: SimulatedDealer, frames: list[bytes]) -> None:
        identity = dealer.identity
        for copy, seconds in enumerate(self.fate(dealer.address, frames)):
            wait_s = dealer.there.wait_s(self.clock.now, seconds, in_order=copy == 0)
            self.clock.after(wait_s, partial(self._arrive, dealer, identity, frames))

    def _arrive(self, dealer: SimulatedDealer, identity: bytes, frames: list[bytes]) -> None:
        if dealer.identity != identity or dealer.is_closed:
            return
        listener = self._listeners.get(dealer.address)
        if listener is not None:
            listener.receive(dealer, frames)
        elif len(held := self._held.setdefault(dealer.address, [])) < _MAX_HELD:
            held.append((dealer, frames))

    def answer(self, address: Address, identity: bytes, frames: list[bytes]) -> None:
        dealer = self._dealers.get(identity)
        if dealer is None:
            return
        for copy, seconds in enumerate(self.fate(address, frames)):
            wait_s = dealer.back.wait_s(self.clock.now, seconds, in_order=copy == 0)
            self.clock.after(wait_s, partial(self._return, identity, frames))

    def _return(self, identity: bytes, frames: list[bytes]) -> None:
        dealer = self._dealers.get(identity)
        if dealer is not None and not dealer.is_closed:
            dealer.receive(frames)


class _Lane:
    """One direction of a connection."""

    def __init__(self) -> None:
        self._last_at = 0.0

    def wait_s(self, now: float, seconds: float, in_order: bool) -> float:
        """Return when a message arrives: not before those that were sent earlier."""
        at = max(self._last_at, now + seconds)
        if in_order:
            self._last_at = at
        return at - now


class SimulatedLoop:
    """``net.channel.Loop`` on simulated time: calls from other threads before each message, then a
    turn.

    wake_s: how long the thread takes to wake up.
    """

    def __init__(
        self,
        process: Process,
        network: Network,
        wake_s: Callable[[], float],
        name: str,
        on_turn: Callable[[], float | None],
        patience_s: float = 0.1,
    ) -> None:
        """patience_s: how often it looks after what it polls."""
        self.contain = Containment(name)
        self.name = name
        self.process = process
        self._network = network
        self._wake_s = wake_s
        self._on_turn = on_turn
        self._patience_s = patience_s
        self._calls: deque[Act] = deque()
        self._inbox: deque[Act] = deque()
        self._round = 0
        self._due = float("inf")
        self._rounds_now, self._last_at = 0, -1.0
        self._is_running = self._is_closed = False
        process.on_jump(self.wake)

    def start(self) -> None:
        self._is_running = True
        self.wake()

    def close(self) -> None:
        self._is_closed = True

    def call(self, function: Act) -> None:
        if not self._is_closed:
            self._calls.append(function)
            self.wake()

    def receive(self, deliver: Act) -> None:
        self._inbox.append(deliver)
        self.wake()

    def listen(
        self,
        address: Address,
        keys: CurveKeys | None,
        on_message: Callable[[bytes, list[bytes]], None],
    ) -> SimulatedListener:
        return SimulatedListener(self, self._network, address, on_message)

    def connect(
        self,
        address: Address,
        keys: CurveKeys | None,
        on_message: Callable[[list[bytes]], None],
    ) -> SimulatedDealer:
        return SimulatedDealer(self, self._network, address, on_message)

    def wake(self) -> None:
        if self._is_running:
            self._go_round_in(self._wake_s())

    def _go_round_in(self, wait_s: float) -> None:
        due = self._network.clock.now + wait_s
        if due < self._due:
            self._due = due
            self._round += 1
            self.process.after(wait_s, partial(self._go_round, self._round))

    def _go_round(self, number: int) -> None:
        if number != self._round or self._is_closed:
            return
        self._due = float("inf")
        self._look_for_spinning()
        self.run_calls()
        for _ in range(len(self._inbox)):
            deliver = self._inbox.popleft()
            self.before_message()
            self.contain.run("a message", deliver, None)
        wait_s = self.contain.run("a turn", self._on_turn, LOOK_AGAIN_S)
        if self._calls or self._inbox:
            wait_s = 0.0
        if wait_s is not None:
            polls = 0 < wait_s <= POLL_S
            self._go_round_in(self._patience_s if polls else wait_s)

    def _look_for_spinning(self) -> None:
        now = self._network.clock.now
        self._rounds_now = self._rounds_now + 1 if now == self._last_at else 0
        self._last_at = now
        if self._rounds_now > _MAX_ROUNDS:
            raise Spinning(f"{self.name} goes round and round")

    def before_message(self) -> None:
        """What another thread told this one before it let a message out must be known by then."""
        self.run_calls()

    def run_calls(self) -> None:
        while self._calls:
            self.contain.run("a call", self._calls.popleft(), None)


class SimulatedListener:
    """``net.channel.Listener``."""

    def __init__(
        self,
        loop: SimulatedLoop,
        network: Network,
        address: Address,
        on_message: Callable[[bytes, list[bytes]], None],
    ) -> None:
        self.address = address
        self.port = address[1]
        self._loop = loop
        self._network = network
        self._on_message = on_message
        network.listen(self)

    def receive(self, dealer: SimulatedDealer, frames: list[bytes]) -> None:
        self._loop.receive(partial(self._on_message, dealer.identity, frames))

    def send(self, identity: bytes, frames: list[bytes]) -> None:
        self._network.answer(self.address, identity, frames)


class SimulatedDealer:
    """``net.channel.Dealer``; identity: that of its connection, as the listener sees it."""

    def __init__(
        self,
        loop: SimulatedLoop,
        network: Network,
        address: Address,
        on_message: Callable[[list[bytes]], None],
    ) -> None:
        self.address = address
        self.identity = b""
        self.is_closed = False
        self.there, self.back = _Lane(), _Lane()
        self._loop = loop
        self._network = network
        self._on_message = on_message
        network.connect(self)

    def send(self, frames: list[bytes]) -> None:
        self._network.send(self, frames)

    def receive(self, frames: list[bytes]) -> None:
        self._loop.receive(partial(self._take, frames))

    def _take(self, frames: list[bytes]) -> None:
        if not self.is_closed and self._loop.process.is_alive:
            self._on_message(frames)

    def close(self) -> None:
        self.is_closed = True
        self._network.disconnect(self)
