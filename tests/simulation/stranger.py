"""Somebody with the cluster's key who asks for what is not theirs to ask."""

from __future__ import annotations

import random

from vllm_pd_plugin.ids import Incarnation
from vllm_pd_plugin.protocol import framing, wire
from vllm_pd_plugin.simulation.clock import Process
from vllm_pd_plugin.simulation.engine import SimulatedEngine
from vllm_pd_plugin.simulation.links import Network, SimulatedLoop

_EVERY_S = 0.02
_NOBODY = Incarnation("feedfacefeedface")


class Stranger:
    """Says to an engine what only its own workers may say, and asks about every handoff."""

    def __init__(self, network: Network, engine: SimulatedEngine, chance: random.Random) -> None:
        self._engine = engine
        process = Process(network.clock)
        self._loop = SimulatedLoop(process, network, lambda: 0.0, "stranger", lambda: None)
        self._loop.start()
        self._channel = self._loop.connect(engine.address, None, lambda frames: None)

    def speak(self, seconds: float) -> None:
        """Begin to, and go on for a while."""
        if seconds > 0 and self._engine.process.is_alive:
            self._say_all()
            self._loop.process.after(_EVERY_S, lambda: self.speak(seconds - _EVERY_S))

    def _say_all(self) -> None:
        latest = self._engine.connector.side.num_announced
        target = self._engine.incarnation
        messages: list[wire.FromConsumer | wire.FromWorker] = [
            wire.Announce(step, rank, 99)
            for step in range(max(1, latest - 3), latest + 1)
            for rank in range(2)
        ]
        for handoff in self._engine.connector.side.handoffs():
            messages += [
                wire.Subscribe(handoff, 7, 8, (7,)),
                wire.Commit(handoff, 0, 7, True),
                wire.Commit(handoff, 5, 0, True),
            ]
        for message in messages:
            self._channel.send(framing.encode(message, _NOBODY, target))
        self._channel.send([b"no", b"message"])
