"""What is around an engine's two halves: time, threads with their sockets, and fresh ids.

A simulation gives others than the real ones.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Protocol

from vllm_pd_plugin.containment import Containment
from vllm_pd_plugin.ids import (
    Address,
    HandoffId,
    Incarnation,
    new_handoff_id,
    new_incarnation,
)
from vllm_pd_plugin.net.channel import CurveKeys, Loop
from vllm_pd_plugin.protocol.peers import Channel


class EngineListener(Protocol):
    """What an engine needs of ``net.channel.Listener``."""

    @property
    def port(self) -> int: ...

    def send(self, identity: bytes, frames: list[bytes]) -> None: ...


class EngineLoop(Protocol):
    """What an engine needs of ``net.channel.Loop``."""

    @property
    def contain(self) -> Containment: ...

    def start(self) -> None: ...

    def call(self, function: Callable[[], None]) -> None: ...

    def listen(
        self,
        address: Address,
        keys: CurveKeys | None,
        on_message: Callable[[bytes, list[bytes]], None],
    ) -> EngineListener: ...

    def connect(
        self,
        address: Address,
        keys: CurveKeys | None,
        on_message: Callable[[list[bytes]], None],
    ) -> Channel: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Surroundings:
    """make_loop(name, on_turn): see ``net.channel.Loop``."""

    clock: Callable[[], float] = time.monotonic
    make_loop: Callable[[str, Callable[[], float | None]], EngineLoop] = Loop
    new_incarnation: Callable[[], Incarnation] = new_incarnation
    new_handoff_id: Callable[[], HandoffId] = new_handoff_id


REAL = Surroundings()
