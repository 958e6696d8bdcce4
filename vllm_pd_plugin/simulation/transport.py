"""Reads between the memories of simulated engines: bytes move when a read ends, or late."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

from vllm_pd_plugin.net.transport import PeerName, ReadHandle, ReadPlan, ReadState
from vllm_pd_plugin.simulation.clock import Act, Process


@dataclasses.dataclass(frozen=True, slots=True)
class ReadFate:
    """What becomes of a read.

    seconds: until it ends. early: the share of it that has moved at half that time.
    fails: it ends badly, after that share.
    late_s: the rest of one that failed is written all the same, after so long, as long as the peer
        was not removed.
    corrupts: one byte of it changes on the way.
    """

    seconds: float
    early: float = 0.0
    fails: bool = False
    late_s: float | None = None
    corrupts: bool = False


class Fabric:
    """What connects transports.

    fate(reader, peer): of a read. refuse(peer): raises PeerError where one cannot be connected to.
    """

    def __init__(
        self,
        fate: Callable[[PeerName, PeerName], ReadFate],
        refuse: Callable[[PeerName], None] = lambda peer: None,
    ) -> None:
        self.fate = fate
        self.refuse = refuse
        self.transports: dict[PeerName, SimulatedTransport] = {}


@dataclasses.dataclass(slots=True, eq=False)
class _Read:
    peer: PeerName
    plan: ReadPlan
    fate: ReadFate
    state: ReadState = ReadState.PENDING
    moved: int = 0


class SimulatedTransport:
    """``net.transport.Transport``; wake: called when there is something to poll."""

    max_read_bytes = 2**20

    def __init__(self, name: str, process: Process, fabric: Fabric, wake: Act) -> None:
        self.name = PeerName(name)
        self._process = process
        self._fabric = fabric
        self._wake = wake
        self._spans: list[tuple[int, int]] = []
        self._peers: set[PeerName] = set()
        self._reads: dict[ReadHandle, _Read] = {}
        self._writing: list[_Read] = []
        """Reads that may still write, whether or not anybody holds a handle."""
        self._num_posted = 0

    @property
    def num_open(self) -> int:
        """Reads that were not released."""
        return len(self._reads)

    @property
    def may_write(self) -> bool:
        return bool(self._writing)

    def register(self, spans: Sequence[tuple[int, int]]) -> bytes:
        self._spans = list(spans)
        self._fabric.transports[self.name] = self
        return self.name.encode()

    def add_peer(self, metadata: bytes, beside: PeerName | None = None) -> PeerName:
        peer = PeerName(metadata.decode())
        self._fabric.refuse(peer)
        self._peers.add(peer)
        return peer

    def remove_peer(self, peer: PeerName) -> None:
        self._peers.discard(peer)
        self._writing = [read for read in self._writing if read.peer != peer]

    def post_read(self, peer: PeerName, plan: ReadPlan) -> ReadHandle:
        assert peer in self._peers, "a read from a peer that was removed"
        for address, size in zip(plan.local.tolist(), plan.num_bytes.tolist(), strict=True):
            assert self.covers(address, size), "a read outside of local memory"
        self._num_posted += 1
        handle, read = (
            ReadHandle(self._num_posted),
            _Read(peer, plan, self._fabric.fate(self.name, peer)),
        )
        self._reads[handle] = read
        self._writing.append(read)
        if read.fate.early:
            self._process.after(read.fate.seconds / 2, partial(self._move_early, read))
        self._process.after(read.fate.seconds, partial(self._end, read))
        return handle

    def poll_read(self, handle: ReadHandle) -> ReadState:
        return self._reads[handle].state

    def release_read(self, handle: ReadHandle) -> None:
        del self._reads[handle]

    def progress(self) -> None:
        """Whoever reads from here needs no help of this side."""

    def close(self) -> None:
        self._writing.clear()
        self._fabric.transports.pop(self.name, None)

    def covers(self, address: int, size: int) -> bool:
        return any(s <= address and address + size <= s + length for s, length in self._spans)

    def _move_early(self, read: _Read) -> None:
        self._move(read, int(read.plan.num_descriptors * read.fate.early))

    def _end(self, read: _Read) -> None:
        if read not in self._writing:
            return
        self._move_early(read)
        if not read.fate.fails and self._move(read, read.plan.num_descriptors):
            read.state = ReadState.DONE
            self._writing.remove(read)
            if read.fate.corrupts:
                place = ctypes.c_uint8.from_address(int(read.plan.local[-1]))
                place.value ^= 0x55
        else:
            read.state = ReadState.FAILED
            if read.fate.late_s is None:
                self._writing.remove(read)
            else:
                self._process.after(read.fate.late_s, partial(self._write_late, read))
        self._wake()

    def _write_late(self, read: _Read) -> None:
        if read in self._writing:
            self._move(read, read.plan.num_descriptors)
            self._writing.remove(read)

    def _move(self, read: _Read, end: int) -> bool:
        """Copy what was not copied before; False where the other side is gone."""
        if read not in self._writing:
            return False
        remote = self._fabric.transports.get(read.peer)
        plan = read.plan
        for index in range(read.moved, end):
            there, size = int(plan.remote[index]), int(plan.num_bytes[index])
            if remote is None or not remote.covers(there, size):
                return False
            ctypes.memmove(int(plan.local[index]), there, size)
            read.moved = index + 1
        return True
