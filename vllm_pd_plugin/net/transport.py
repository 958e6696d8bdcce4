"""What moves the bytes, as the rest of the package sees it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import NewType, Protocol

import numpy as np
from numpy.typing import NDArray

PeerName = NewType("PeerName", str)
ReadHandle = NewType("ReadHandle", int)


class ReadState(enum.Enum):
    PENDING = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


@dataclasses.dataclass(frozen=True, slots=True)
class ReadPlan:
    """Reads to post; entry i moves ``num_bytes[i]`` from ``remote[i]`` to ``local[i]``.

    All three arrays are ``uint64[num_descriptors]``: addresses, addresses, bytes.
    """

    local: NDArray[np.uint64]
    remote: NDArray[np.uint64]
    num_bytes: NDArray[np.uint64]

    @classmethod
    def together(cls, plans: Sequence[ReadPlan]) -> ReadPlan:
        """Return one plan for the reads of several."""
        if len(plans) == 1:
            return plans[0]
        columns = ((plan.local, plan.remote, plan.num_bytes) for plan in plans)
        return cls(*(np.concatenate(column) for column in zip(*columns, strict=True)))

    @property
    def num_descriptors(self) -> int:
        return len(self.num_bytes)

    @property
    def total_bytes(self) -> int:
        return int(self.num_bytes.sum())

    def split(self, max_descriptors: int, max_bytes: int) -> list[ReadPlan]:
        """Return the same reads in several plans; one descriptor may be larger than ``max_bytes``,
        and is cut."""
        if self.num_descriptors <= max_descriptors and self.total_bytes <= max_bytes:
            return [self]
        whole = self._cut(max_bytes)
        ends = np.cumsum(whole.num_bytes)
        plans, start = [], 0
        while start < whole.num_descriptors:
            before = ends[start - 1] if start else np.uint64(0)
            fits = int(np.searchsorted(ends, before + np.uint64(max_bytes), side="right"))
            stop = min(fits, start + max_descriptors)
            plans.append(whole._rows(start, stop))
            start = stop
        return plans

    def _cut(self, max_bytes: int) -> ReadPlan:
        """Return the same with no descriptor larger than that."""
        counts = -(-self.num_bytes.astype(np.int64) // max_bytes)
        if not len(counts) or counts.max() == 1:
            return self
        of = np.repeat(np.arange(len(counts)), counts)
        nth = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
        offsets = (nth * max_bytes).astype(np.uint64)
        sizes = np.minimum(self.num_bytes[of] - offsets, np.uint64(max_bytes))
        return ReadPlan(self.local[of] + offsets, self.remote[of] + offsets, sizes)

    def _rows(self, start: int, stop: int) -> ReadPlan:
        rows = slice(start, stop)
        return ReadPlan(self.local[rows], self.remote[rows], self.num_bytes[rows])


class Transport(Protocol):
    """One rank's end of the data plane; used from one thread only.

    Only reads exist: nobody writes into a peer's memory.

    max_read_bytes: how much one read may move and still be started at once. Within one host's
        memory, starting a read may be copying.
    """

    @property
    def max_read_bytes(self) -> int: ...

    def register(self, spans: Sequence[tuple[int, int]]) -> bytes:
        """Make local memory readable; ``spans`` are (address, bytes). Returns what
        ``add_peer`` needs on the other side."""

    def add_peer(self, metadata: bytes, beside: PeerName | None = None) -> PeerName:
        """Connect to a peer by what its ``register`` returned. Raises PeerError.

        beside: another rank of its engine, with which it is closed; connecting costs less then.
        """

    def remove_peer(self, peer: PeerName) -> None:
        """Close the connection: no read from that peer writes to local memory afterwards."""

    def post_read(self, peer: PeerName, plan: ReadPlan) -> ReadHandle:
        """Start one read. Raises PeerError when it cannot even start."""

    def poll_read(self, handle: ReadHandle) -> ReadState:
        """Say how a read stands, and drive it on."""

    def release_read(self, handle: ReadHandle) -> None:
        """Forget a read that is DONE or FAILED, or whose peer was removed."""

    def progress(self) -> None:
        """Serve peers that read from this side; must be called now and then while they do."""

    def close(self) -> None:
        """Deregister memory and disconnect."""
