"""A frontend's end of an engine's control channel: a socket on asyncio's own loop.

Beside ``channel`` the only module that imports zmq. Messages are handed over in the callback that
finds them, without a task or a thread between: a frontend has thousands of streams on few sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import zmq

from vllm_pd_plugin.ids import Address
from vllm_pd_plugin.net.channel import CurveKeys, configure, endpoint

Context = zmq.Context[zmq.Socket[bytes]]

_POLLIN = int(zmq.POLLIN)
_TURN_S = 0.01
"""So long messages are handed over at a time; then all else in the event loop has its turn."""


DESCRIPTORS_PER_DEALER = 4
"""Of its connection, of the socket, and of both ends of what tells of its loss."""


def new_context() -> Context:
    """Return what connections are made from; to be closed with ``close_context``.

    As many as descriptors allow: each takes three sockets, and ZeroMQ's own limit is 1023.
    """
    context = zmq.Context(io_threads=1)
    context.set(zmq.MAX_SOCKETS, context.get(zmq.SOCKET_LIMIT))
    return context


def close_context(context: Context) -> None:
    context.destroy(linger=0)


class AsyncDealer:
    """One connection to an engine. Everything happens on the event loop that made it.

    on_message: called for each message.
    on_disconnect: called, once, when the connection is lost; ZeroMQ would renew it, but what was
        under way is not repeated.
    """

    def __init__(
        self,
        context: Context,
        address: Address,
        keys: CurveKeys | None,
        on_message: Callable[[list[bytes]], None],
        on_disconnect: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_disconnect = on_disconnect
        self._socket = configure(context.socket(zmq.DEALER))
        if keys is not None:
            self._socket.curve_serverkey = keys.server_public
            self._socket.curve_publickey = keys.client_public
            self._socket.curve_secretkey = keys.client_secret
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(endpoint(address))
        self._descriptors = [int(s.getsockopt(zmq.FD)) for s in (self._socket, self._monitor)]
        self._loop.add_reader(self._descriptors[0], self._drain)
        self._loop.add_reader(self._descriptors[1], self._watch)
        self._full_since: float | None = None
        self._is_lost = self._has_turn = False
        # A descriptor tells of changes only, from the first look on.
        self._drain_soon()
        self._loop.call_soon(self._watch)

    @property
    def behind_s(self) -> float:
        """For how long there have been messages that wait to be handed over: none of those that
        wait is older."""
        return 0.0 if self._full_since is None else self._loop.time() - self._full_since

    def send(self, frames: list[bytes]) -> bool:
        """Send a message; False when the engine does not read and its queue is full."""
        if self._socket.closed:
            return False
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        # Sending may eat the event that announces a message: the descriptor tells of changes only.
        self._drain_soon()
        return True

    def receive(self) -> None:
        """Hand over what has arrived, now; what takes longer than a turn, soon."""
        self._drain()

    def close(self) -> None:
        """Close the socket; idempotent."""
        if self._socket.closed:
            return
        for descriptor in self._descriptors:
            self._loop.remove_reader(descriptor)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    def _drain_soon(self) -> None:
        if not self._has_turn:
            self._has_turn = True
            self._loop.call_soon(self._take_turn)

    def _take_turn(self) -> None:
        self._has_turn = False
        self._drain()

    def _drain(self) -> None:
        """Hand over what has arrived, for one turn."""
        began_at = self._loop.time()
        while self._take_one():
            if self._loop.time() - began_at >= _TURN_S:
                if self._full_since is None:
                    self._full_since = began_at
                self._drain_soon()
                return
        self._full_since = None
        if self._is_lost and not self._socket.closed:
            self._is_lost = False
            self._on_disconnect()

    def _take_one(self) -> bool:
        """Hand a message over; False where there is none.

        It is asked for first: the exception that else says so takes thrice as long.
        """
        if self._socket.closed or not int(self._socket.getsockopt(zmq.EVENTS)) & _POLLIN:
            return False
        self._on_message(self._socket.recv_multipart(zmq.NOBLOCK))
        return True

    def _watch(self) -> None:
        if self._socket.closed:
            return
        with contextlib.suppress(zmq.Again):
            self._monitor.recv_multipart(zmq.NOBLOCK)
            self._is_lost = True
            self._drain()  # first what had arrived before it was lost
