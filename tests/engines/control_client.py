"""A bare client of an engine's control channel, to look at its memory or to misbehave."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import zmq

from vllm_pd_plugin.ids import HandoffId, Incarnation, new_incarnation
from vllm_pd_plugin.net.channel import Listener, Loop
from vllm_pd_plugin.protocol import framing, wire


class ControlClient:
    """Speaks to the control channel that ``kv_transfer_params`` name."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._me = new_incarnation()
        self._them = Incarnation(params["remote_incarnation"])
        self.handoff_id = HandoffId(params["remote_handoff_id"])
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 500
        self._socket.connect(f"tcp://{params['remote_host']}:{params['remote_port']}")

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._context.destroy(linger=500)

    def ask(self, message: wire.Request) -> wire.Message:
        """Send a message and return the answer; fails the test when none comes in 10 s."""
        self._socket.send_multipart(framing.encode(message, self._me, self._them))
        assert self._socket.poll(10_000), "the engine does not answer"
        return framing.decode(self._socket.recv_multipart())[1]

    def send_frames(self, frames: list[bytes]) -> None:
        self._socket.send_multipart(frames)


class Forger:
    """Stands where a producer's control channel would be, and describes itself as it is told.

    port: of the channel. welcome: what it answers who introduces itself.
    """

    def __init__(self, welcome: wire.Welcome) -> None:
        self.welcome = welcome
        self.incarnation = new_incarnation()
        self._loop = Loop("forger", lambda: None)
        self._listener = Listener(self._loop, ("127.0.0.1", 0), None, self._receive)
        self.port = self._listener.port
        self._loop.start()

    def __enter__(self) -> Forger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.close()

    def _receive(self, identity: bytes, frames: list[bytes]) -> None:
        header, message = framing.decode(frames)
        if isinstance(message, wire.Hello):
            frames = framing.encode(self.welcome, self.incarnation, header.sender)
            self._listener.send(identity, frames)


def corrupt_handoff(params: Mapping[str, Any], producer_pid: int) -> int:
    """Overwrite the first block of every layer of a handoff, in the producer's memory.

    Returns the number of bytes written. Needs the right to write another process's memory.
    """
    with ControlClient(params) as client:
        welcome = client.ask(wire.Hello("test"))
        assert isinstance(welcome, wire.Welcome)
        state = client.ask(wire.Subscribe(client.handoff_id, 0, 1, (0,)))
        assert isinstance(state, wire.Progress | wire.Seal)
    written = 0
    regions = iter(welcome.ranks[0].regions)
    with open(f"/proc/{producer_pid}/mem", "r+b", buffering=0) as memory:
        for group, table in zip(welcome.kv_cache.groups, state.tables, strict=True):
            block = next(b for b in table.blocks if b != 0)
            for _ in group.layout.layers[0]:
                region = next(regions)
                noise = b"\x3f" * region.block_bytes  # 0.747 as float32: finite, and wrong
                written += os.pwrite(memory.fileno(), noise, region.address(block))
    return written
