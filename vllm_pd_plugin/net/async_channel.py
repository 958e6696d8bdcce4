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


def new_context() -> Context:
    """Return what connections are made from; to be closed with ``close_context``."""
    return zmq.Context(io_threads=1)


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
        # A descriptor tells of changes only, from the first look on.
        self._loop.call_soon(self._drain)
        self._loop.call_soon(self._watch)

    def send(self, frames: list[bytes]) -> bool:
        """Send a message; False when the engine does not read and its queue is full."""
        if self._socket.closed:
            return False
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        # Sending may eat the event that announces a message: the descriptor tells of changes only.
        self._loop.call_soon(self._drain)
        return True

    def receive(self) -> None:
        """Hand over what has arrived, now."""
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

    def _drain(self) -> None:
        while not self._socket.closed:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_message(frames)

    def _watch(self) -> None:
        if self._socket.closed:
            return
        with contextlib.suppress(zmq.Again):
            self._monitor.recv_multipart(zmq.NOBLOCK)
            self._drain()  # what had arrived before it was lost
            self._on_disconnect()
