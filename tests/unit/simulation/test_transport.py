"""Simulated reads: bytes move when a read ends, partly before, or late."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_pd_plugin.net.transport import PeerName, ReadPlan, ReadState
from vllm_pd_plugin.simulation.clock import Clock, Process
from vllm_pd_plugin.simulation.transport import Fabric, ReadFate, SimulatedTransport


class Pair:
    """A reader and whoever is read, eight cells each; one read of two descriptors."""

    def __init__(self, fate: ReadFate) -> None:
        self.clock = Clock()
        self.fate = fate
        self.woken: list[float] = []
        fabric = Fabric(lambda reader, peer: self.fate)
        self.here, self.there = np.zeros(8, np.int64), np.arange(1, 9)
        reader = Process(self.clock)
        wake = lambda: self.woken.append(self.clock.now)  # noqa: E731
        self.reader = SimulatedTransport("reader", reader, fabric, wake)
        self.peer = SimulatedTransport("peer", Process(self.clock), fabric, wake)
        self.reader.register([(self.here.ctypes.data, self.here.nbytes)])
        self.name: PeerName = self.reader.add_peer(
            self.peer.register([(self.there.ctypes.data, self.there.nbytes)])
        )
        addresses = np.array([0, 32], np.uint64)
        sizes = np.array([32, 32], np.uint64)
        here, there = (np.uint64(array.ctypes.data) for array in (self.here, self.there))
        plan = ReadPlan(addresses + here, addresses + there, sizes)
        self.handle = self.reader.post_read(self.name, plan)

    @property
    def state(self) -> ReadState:
        return self.reader.poll_read(self.handle)

    def at(self, seconds: float) -> list[int]:
        self.clock.run(seconds)
        found: list[int] = self.here.tolist()
        return found


WHOLE, HALF, NOTHING = [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 0, 0, 0, 0], [0] * 8


def test_bytes_are_those_of_the_moment_when_a_read_ends() -> None:
    pair = Pair(ReadFate(1.0))
    assert pair.at(0.9) == NOTHING
    pair.there[7] = 99
    assert pair.at(1.0) == [*WHOLE[:7], 99]
    assert (pair.state, pair.woken) == (ReadState.DONE, [1.0])


def test_a_part_of_a_read_may_move_before_the_rest() -> None:
    pair = Pair(ReadFate(1.0, early=0.5))
    assert pair.at(0.6) == HALF
    pair.there[:] = 9
    assert pair.at(1.0) == [1, 2, 3, 4, 9, 9, 9, 9]


def test_a_read_that_has_failed_may_write_late() -> None:
    pair = Pair(ReadFate(1.0, early=0.5, fails=True, late_s=1.0))
    assert (pair.at(1.5), pair.state) == (HALF, ReadState.FAILED)
    assert pair.at(2.0) == WHOLE


def test_nothing_is_written_once_the_peer_was_removed() -> None:
    pair = Pair(ReadFate(1.0, early=0.5, fails=True, late_s=1.0))
    pair.at(1.5)
    pair.reader.remove_peer(pair.name)
    assert pair.at(2.0) == HALF


def test_a_read_of_an_engine_that_has_died_fails() -> None:
    pair = Pair(ReadFate(1.0))
    pair.peer.close()
    assert (pair.at(1.0), pair.state) == (NOTHING, ReadState.FAILED)


def test_a_read_outside_of_what_was_registered_is_a_mistake_of_ours() -> None:
    pair = Pair(ReadFate(1.0))
    one = np.array([1], np.uint64)
    with pytest.raises(AssertionError, match="outside"):
        pair.reader.post_read(pair.name, ReadPlan(one, one, one))
