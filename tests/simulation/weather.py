"""What becomes of messages and of reads, while it lasts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tests.simulation.plan import CALM, Weather
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.ids import Address
from vllm_pd_plugin.net.transport import PeerName
from vllm_pd_plugin.simulation.transport import ReadFate

_HANGS_S = 60.0


class Elements:
    """num_faults: how often something has gone wrong. num_raised: those that a library raised."""

    def __init__(self, weather: Weather, chance: random.Random, clock: Callable[[], float]) -> None:
        self.num_faults = self.num_raised = 0
        self.weather = weather
        self._chance = chance
        self._clock = clock
        self._outages: dict[Address, float] = {}
        self._reads: dict[tuple[str, str], float] = {}
        """Until when reads go wrong, by how and by the reader's name."""
        self._refused: dict[str, float] = {}
        self._raises: set[str] = set()

    def calm(self) -> None:
        """Nothing goes wrong any more."""
        self.weather = CALM
        self._outages.clear()
        self._reads.clear()
        self._refused.clear()
        self._raises.clear()

    def lose_messages(self, address: Address, seconds: float) -> None:
        self._outages[address] = self._clock() + seconds

    def spoil_reads(self, kind: str, reader: str, seconds: float) -> None:
        """kind: ``slow``, ``hanging``, ``failing``, ``late`` or ``corrupt``."""
        self._reads[kind, reader] = self._clock() + seconds

    def raise_once(self, reader: str) -> None:
        """Let a foreign library raise what nobody expects."""
        self._raises.add(reader)

    def refuse(self, peer: str, seconds: float) -> None:
        self._refused[peer] = self._clock() + seconds

    # --- asked by the network and by transports ----------------------------------------------

    def of_message(self, address: Address, frames: list[bytes]) -> Sequence[float]:
        chance, weather = self._chance, self.weather
        seconds = 0.0002 + 0.0006 * chance.random()
        if self._outages and self._outages.get(address, 0.0) > self._clock():
            self.num_faults += 1
            return ()
        if not (weather.lost or weather.twice or weather.late):
            return (seconds,)
        roll = chance.random()
        if roll < weather.lost:
            self.num_faults += 1
            return ()
        if roll < weather.lost + weather.twice:
            self.num_faults += 1
            return (seconds, seconds + chance.choice([0.0, 0.01, 0.3]))
        if roll < weather.lost + weather.twice + weather.late:
            seconds += chance.choice([0.02, 0.1, 0.4])
        return (seconds,)

    def of_read(self, reader: PeerName, peer: PeerName) -> ReadFate:
        chance, name = self._chance, reader.split("/")[0]
        seconds = self.weather.read_s * (0.1 + chance.random())
        early = chance.choice([0.0, 0.0, 0.5])
        if name in self._raises:
            self._raises.discard(name)
            self.num_faults += 1
            self.num_raised += 1
            raise RuntimeError("what nobody expects")
        if not self._reads:
            return ReadFate(seconds, early)
        now = self._clock()
        kinds = [kind for (kind, who), until in self._reads.items() if who == name and until > now]
        if not kinds or chance.random() < 0.3:
            return ReadFate(seconds, early)
        self.num_faults += 1
        match chance.choice(kinds):
            case "slow":
                return ReadFate(chance.choice([0.1, 0.5, 1.5]), early)
            case "hanging":
                return ReadFate(chance.choice([2.0, _HANGS_S]), early)
            case "failing":
                return ReadFate(seconds, early, fails=True)
            case "late":
                late_s = chance.choice([0.01, 0.1, 0.5])
                return ReadFate(seconds, early, fails=True, late_s=late_s)
            case _:
                return ReadFate(seconds, early, corrupts=True)

    def of_connection(self, peer: PeerName) -> None:
        if self._refused.get(peer.split("/")[0], 0.0) > self._clock():
            self.num_faults += 1
            raise PeerError(Reason.NOT_REGISTERED, "no memory is registered for it")
