"""Memory and reads."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence

from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.net.transport import PeerName, ReadHandle, ReadPlan, ReadState


class FakeFabric:
    """What connects ``FakeTransport``s: every transport that is alive, by its name."""

    def __init__(self) -> None:
        self.transports: dict[PeerName, FakeTransport] = {}


@dataclasses.dataclass(slots=True, eq=False)
class _Read:
    peer: PeerName
    plan: ReadPlan
    state: ReadState = ReadState.PENDING
    moved: int = 0
    """Descriptors whose bytes have arrived."""


class FakeTransport:
    """Moves real bytes between arrays of this process.

    holds_reads: a read stays PENDING until ``finish_reads`` or ``fail_reads``; else its first
        poll finishes it.
    failed_reads_write: a FAILED read may still write until its peer is removed, as with RDMA.
    """

    max_read_bytes = 2**20

    def __init__(self, fabric: FakeFabric, name: str) -> None:
        self._fabric = fabric
        self.name = PeerName(name)
        self.spans: list[tuple[int, int]] = []
        self.connected: set[PeerName] = set()
        self.removed: list[PeerName] = []
        self.reads: dict[ReadHandle, _Read] = {}
        self.unfinished: list[_Read] = []
        """Reads that may still write into local memory, whether or not anybody holds a handle."""
        self.released_while_pending = 0
        self.num_posted = 0
        self.num_polls = 0
        self.num_progress = 0
        self.is_closed = False
        self.holds_reads = False
        self.failed_reads_write = False
        self.refuses_reads = False

    # --- the protocol

    def register(self, spans: Sequence[tuple[int, int]]) -> bytes:
        self.spans = list(spans)
        self._fabric.transports[self.name] = self
        return self.name.encode()

    def add_peer(self, metadata: bytes, beside: PeerName | None = None) -> PeerName:
        peer = PeerName(metadata.decode())
        if peer not in self._fabric.transports:
            raise PeerError(Reason.PEER_INCOMPATIBLE, f"no transport is called {peer}")
        assert peer not in self.connected, "a peer was added twice"
        self.connected.add(peer)
        return peer

    def remove_peer(self, peer: PeerName) -> None:
        self.connected.remove(peer)
        self.removed.append(peer)
        self.unfinished = [read for read in self.unfinished if read.peer != peer]

    def post_read(self, peer: PeerName, plan: ReadPlan) -> ReadHandle:
        if peer not in self.connected or self.refuses_reads:
            raise PeerError(Reason.READ_FAILED, f"{peer} cannot be read from")
        for address, size in zip(plan.local, plan.num_bytes, strict=True):
            assert _covers(self.spans, int(address), int(size)), "a read outside local memory"
        self.num_posted += 1
        handle, read = ReadHandle(self.num_posted), _Read(peer, plan)
        self.reads[handle] = read
        self.unfinished.append(read)
        return handle

    def poll_read(self, handle: ReadHandle) -> ReadState:
        self.num_polls += 1
        read = self.reads[handle]
        if read.state is ReadState.PENDING and not self.holds_reads:
            self._finish(read)
        return read.state

    def release_read(self, handle: ReadHandle) -> None:
        read = self.reads.pop(handle)
        if read.state is ReadState.PENDING and read.peer in self.connected:
            self.released_while_pending += 1

    def progress(self) -> None:
        self.num_progress += 1

    def close(self) -> None:
        assert not self.is_closed, "a transport was closed twice"
        self.is_closed = True
        self.unfinished = []
        self._fabric.transports.pop(self.name, None)

    # --- what a test does to it

    def finish_reads(self) -> None:
        """Let every read that is under way end well."""
        for read in self._pending():
            self._finish(read)

    def finish_one(self, index: int) -> None:
        """Let one of the reads that are under way end well; they need not end in order."""
        if pending := self._pending():
            self._finish(pending[index % len(pending)])

    def fail_reads(self) -> None:
        """Let every read that is under way end badly, after its first descriptor."""
        for read in self._pending():
            self._move(read, 1)
            self._fail(read)

    def write_late(self) -> None:
        """Move the bytes of every read that may still write."""
        for read in list(self.unfinished):
            self._move(read, read.plan.num_descriptors)

    def may_write(self, address: int, num_bytes: int) -> bool:
        """Say whether a read that has not ended could still write into a stretch of memory."""
        return any(
            int(start) < address + num_bytes and address < int(start) + int(size)
            for read in self.unfinished
            for start, size in zip(read.plan.local, read.plan.num_bytes, strict=True)
        )

    def _pending(self) -> list[_Read]:
        return [read for read in self.unfinished if read.state is ReadState.PENDING]

    def _finish(self, read: _Read) -> None:
        if self._move(read, read.plan.num_descriptors):
            read.state = ReadState.DONE
            self.unfinished.remove(read)
        else:
            self._fail(read)

    def _fail(self, read: _Read) -> None:
        read.state = ReadState.FAILED
        if not self.failed_reads_write:
            self.unfinished.remove(read)

    def _move(self, read: _Read, num_descriptors: int) -> bool:
        """Copy up to so many descriptors; False when the other side is gone or has no such
        memory."""
        assert read.peer in self.connected, "a read of a removed peer writes"
        plan, end = read.plan, min(read.plan.num_descriptors, read.moved + num_descriptors)
        for index in range(read.moved, end):
            here, there, size = (
                int(column[index]) for column in (plan.local, plan.remote, plan.num_bytes)
            )
            remote = self._fabric.transports.get(read.peer)
            if remote is None or not _covers(remote.spans, there, size):
                return False
            ctypes.memmove(here, there, size)
            read.moved = index + 1
        return True


def _covers(spans: Sequence[tuple[int, int]], address: int, size: int) -> bool:
    return any(start <= address and address + size <= start + length for start, length in spans)
