"""The control channel over ZeroMQ: one loop thread, one listening socket, one dealer a peer.

With ``async_channel`` the only module that imports zmq. With a cluster key every connection is
CURVE-encrypted and authenticated: both sides derive the same two key pairs from it, and the
listening side accepts no other client key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import zmq
import zmq.auth
from zmq.utils import z85

from vllm_pd_plugin.containment import LOOK_AGAIN_S, Containment
from vllm_pd_plugin.errors import ConfigError, PeerError, Reason
from vllm_pd_plugin.ids import Address
from vllm_pd_plugin.net.hosts import in_url

logger = logging.getLogger(__name__)

_QUEUE_LENGTH = 10_000
_MAX_MESSAGES_PER_TURN = 256
_MAX_SOCKETS = 8192
"""ZeroMQ's own limit is 1023; descriptors run out first (``ulimit -n``)."""
_AFTER_A_FAULT_S = 0.05
_MAX_SLEEP_S = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class CurveKeys:
    """The two key pairs that all engines of a cluster share, Z85-encoded."""

    server_public: bytes
    server_secret: bytes = dataclasses.field(repr=False)
    client_public: bytes
    client_secret: bytes = dataclasses.field(repr=False)

    @classmethod
    def derive(cls, cluster_key: str) -> CurveKeys:
        """Derive both pairs with keyed BLAKE2b; the same key gives the same pairs everywhere."""
        secrets = [
            z85.encode(
                hashlib.blake2b(cluster_key.encode(), digest_size=32, person=purpose).digest()
            )
            for purpose in (b"vllm-pd-server", b"vllm-pd-client")
        ]
        server, client = secrets
        return cls(zmq.curve_public(server), server, zmq.curve_public(client), client)


class Loop:
    """A thread that waits on sockets, timers and calls from other threads, and never spins.

    All callbacks run on the loop's thread. ``on_turn`` runs after every wake-up and returns for
    how many seconds at the most the loop may sleep; None means until something happens.
    """

    def __init__(self, name: str, on_turn: Callable[[], float | None]) -> None:
        self.context = zmq.Context(io_threads=1)
        self.context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
        self.contain = Containment(name)
        self._name = name
        self._on_turn = on_turn
        self._poller = zmq.Poller()
        self._readers: dict[Any, Callable[[], None]] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller.register(self._wake, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._stopping = False
        self._lock = threading.Lock()

    def start(self) -> None:
        self._thread.start()

    def call(self, function: Callable[[], None]) -> None:
        """Run a function on the loop's thread, soon; safe from any thread, no-op after the end."""
        with self._lock:
            if not self._stopping:
                self._calls.append(function)
                # The call is made all the same, when the loop wakes the next time.
                self.contain.run("waking", lambda: os.eventfd_write(self._wake, 1), None)

    def add(self, socket: zmq.Socket[bytes], on_message: Callable[[list[bytes]], None]) -> None:
        """Hand a socket's messages to ``on_message``; on the loop's thread, or before start."""
        self._poller.register(socket, zmq.POLLIN)
        self._readers[socket] = lambda: self._drain(socket, on_message)

    def listen(
        self,
        address: Address,
        keys: CurveKeys | None,
        on_message: Callable[[bytes, list[bytes]], None],
    ) -> Listener:
        """Bind. Raises ConfigError."""
        return Listener(self, address, keys, on_message)

    def connect(
        self,
        address: Address,
        keys: CurveKeys | None,
        on_message: Callable[[list[bytes]], None],
    ) -> Dealer:
        """Raises PeerError."""
        return Dealer(self, address, keys, on_message)

    def remove(self, socket: zmq.Socket[bytes]) -> None:
        self._poller.unregister(socket)
        del self._readers[socket]

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop the thread and close the context; idempotent."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            os.eventfd_write(self._wake, 1)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("%s did not stop within %.0f s", self._name, timeout_s)
            return
        self.context.destroy(linger=0)
        os.close(self._wake)

    def _run(self) -> None:
        timeout_s: float | None = 0.0
        while not self._stopping:
            wait = partial(self._wait, timeout_s)
            ready = self.contain.run("waiting", wait, None)
            if ready is None:  # not at once again: a thread never spins
                self.contain.run("waiting", partial(time.sleep, _AFTER_A_FAULT_S), None)
            self.contain.run("waking up", self._clear_wake, None)
            self._run_calls()
            for socket, _ in ready or ():
                if reader := self._readers.get(socket):
                    self.contain.run("reading", reader, None)
            timeout_s = self.contain.run("a turn", self._on_turn, LOOK_AGAIN_S)
        self._run_calls()  # what was called before the end still runs

    def _wait(self, timeout_s: float | None) -> list[tuple[Any, int]]:
        # A wake-up that was lost (its descriptor could not be written) is made up for soon.
        timeout_s = _MAX_SLEEP_S if timeout_s is None else min(timeout_s, _MAX_SLEEP_S)
        if timeout_s < 0.001:  # below what poll can tell from zero
            time.sleep(max(0.0, timeout_s))
            return self._poller.poll(0)
        return self._poller.poll(math.ceil(timeout_s * 1000))

    def _clear_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _run_calls(self) -> None:
        while self._calls:
            self.contain.run("a call", self._calls.popleft(), None)

    def _drain(self, socket: zmq.Socket[bytes], on_message: Callable[[list[bytes]], None]) -> None:
        for _ in range(_MAX_MESSAGES_PER_TURN):
            if socket not in self._readers:  # a message may lead to the socket being closed
                return
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            # What another thread told this one before it let the message out must be known by now.
            self._run_calls()
            self.contain.run("a message", partial(on_message, frames), None)


class Listener:
    """The listening end: many peers, each with an opaque identity for the answer."""

    def __init__(
        self,
        loop: Loop,
        address: Address,
        keys: CurveKeys | None,
        on_message: Callable[[bytes, list[bytes]], None],
    ) -> None:
        """Bind, or raise ConfigError when the address cannot be bound."""
        self._socket = _socket(loop, zmq.ROUTER)
        if keys is not None:
            self._authenticate(loop, keys)
        host, port = address
        try:
            self._socket.bind(f"tcp://{in_url(host)}:{port or '*'}")
        except zmq.ZMQError as error:
            self._socket.close()
            raise ConfigError(
                f"cannot bind the control channel to host={host!r} port={port}: {error}; "
                "set port to a free one, or to 0 for any"
            ) from error
        endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.port = int(endpoint.rsplit(":", 1)[1])
        loop.add(self._socket, lambda frames: on_message(frames[0], frames[1:]))

    def send(self, identity: bytes, frames: list[bytes]) -> None:
        """Answer a peer; dropped when the peer is gone or does not read."""
        try:
            self._socket.send_multipart([identity, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            logger.warning("an answer was dropped: %s", error)

    def _authenticate(self, loop: Loop, keys: CurveKeys) -> None:
        class _OnlyTheCluster:
            def callback(self, _domain: str, key: bytes) -> bool:
                return key == keys.client_public

        authenticator = zmq.auth.Authenticator(loop.context)
        authenticator.start()
        authenticator.configure_curve_callback("*", credentials_provider=_OnlyTheCluster())
        zap: Any = authenticator.zap_socket

        def answer(frames: list[bytes]) -> None:
            # A coroutine function that never waits: our callback is an ordinary function.
            with contextlib.suppress(StopIteration):
                authenticator.handle_zap_message(frames).send(None)

        loop.add(zap, answer)
        self._socket.curve_server = True
        self._socket.curve_publickey = keys.server_public
        self._socket.curve_secretkey = keys.server_secret


class Dealer:
    """The connecting end: one peer. ZeroMQ reconnects by itself."""

    def __init__(
        self,
        loop: Loop,
        address: Address,
        keys: CurveKeys | None,
        on_message: Callable[[list[bytes]], None],
    ) -> None:
        """Connect. Raises PeerError when there can be no connection: a name that is none, or no
        sockets left."""
        self._loop = loop
        with ExitStack() as on_error:
            try:
                self._socket = _socket(loop, zmq.DEALER)
                on_error.callback(self._socket.close, linger=0)
                if keys is not None:
                    self._socket.curve_serverkey = keys.server_public
                    self._socket.curve_publickey = keys.client_public
                    self._socket.curve_secretkey = keys.client_secret
                self._socket.connect(endpoint(address))
            except zmq.ZMQError as error:
                text = f"there is no connecting to {address[0]}:{address[1]}: {error}"
                raise PeerError(Reason.PEER_UNREACHABLE, text) from error
            loop.add(self._socket, on_message)
            on_error.pop_all()

    def send(self, frames: list[bytes]) -> None:
        """Send to the peer; dropped when its queue is full (a deadline then ends the wait)."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            logger.warning("a message was dropped: %s", error)

    def close(self) -> None:
        self._loop.remove(self._socket)
        self._socket.close(linger=0)


def _socket(loop: Loop, kind: int) -> zmq.Socket[bytes]:
    return configure(loop.context.socket(kind))


def configure(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """Set what all sockets of the control channel have in common."""
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = _QUEUE_LENGTH
    socket.ipv6 = True
    socket.maxmsgsize = 64 * 2**20
    socket.reconnect_ivl_max = 1000
    # A host that has gone without a word does not stay connected for ever.
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle = 60
    socket.tcp_keepalive_intvl = 10
    socket.tcp_keepalive_cnt = 6
    return socket


def endpoint(address: Address) -> str:
    """Return what a socket connects to."""
    host, port = address
    return f"tcp://{in_url(host)}:{port}"
