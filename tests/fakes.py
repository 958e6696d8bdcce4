"""Fakes of what the package meets outside: a clock, a network, a transport, and whole engines.

Nothing here starts a thread or opens a socket. Time passes when a test says so, a message arrives
when a test delivers it, and a read moves its bytes when a test lets it.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_pd_plugin import wire
from vllm_pd_plugin.control import ControlPlane, Event, Lost, Offered, Released
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.handoffs import FetchResult, FetchSpec, Source
from vllm_pd_plugin.ids import Address, new_handoff_id, new_incarnation
from vllm_pd_plugin.layout import EngineLayout, Group, RankMemory, Region
from vllm_pd_plugin.peers import Identity, PeerTable
from vllm_pd_plugin.plan import ReadPlan
from vllm_pd_plugin.transfer import LocalRank, TransferPlane
from vllm_pd_plugin.transport import PeerName, ReadHandle, ReadState


class FakeClock:
    """Seconds that pass only when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


# --- messages --------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True, eq=False)
class Packet:
    """A message under way; ``kind`` is the wire's tag, such as ``hello``."""

    kind: str
    frames: list[bytes]
    deliver: Callable[[], None]


class FakeLink:
    """The connecting end, in place of ``channel.Link``."""

    def __init__(
        self,
        network: FakeNetwork,
        identity: bytes,
        address: Address,
        on_message: Callable[[list[bytes]], None],
    ) -> None:
        self._network = network
        self.identity = identity
        self.address = address
        self.on_message = on_message
        self.is_closed = False

    def send(self, frames: list[bytes]) -> None:
        assert not self.is_closed, "a message was sent on a closed link"
        self._network.post(frames, lambda: self._arrive(frames))

    def close(self) -> None:
        assert not self.is_closed, "a link was closed twice"
        self.is_closed = True

    def _arrive(self, frames: list[bytes]) -> None:
        listener = self._network.listeners.get(self.address)
        if listener is not None:
            listener(self.identity, frames)


class FakeNetwork:
    """Addresses, and the messages between them; they queue up until ``deliver``.

    A message to an address where nobody listens is lost. A link outlives its peer, as ZeroMQ's
    does: what is sent after a restart reaches whoever listens then.
    """

    def __init__(self) -> None:
        self.listeners: dict[Address, Callable[[bytes, list[bytes]], None]] = {}
        self.links: dict[bytes, FakeLink] = {}
        self.in_flight: list[Packet] = []
        self.delivered: list[str] = []

    def listen(self, address: Address, receive: Callable[[bytes, list[bytes]], None]) -> None:
        assert address not in self.listeners, f"{address} is in use"
        self.listeners[address] = receive

    def silence(self, address: Address) -> None:
        """From now on nobody listens there."""
        del self.listeners[address]

    def connect(self, address: Address, on_message: Callable[[list[bytes]], None]) -> FakeLink:
        """Stand in for ``peers.Connect``."""
        identity = f"link-{len(self.links)}".encode()
        link = self.links[identity] = FakeLink(self, identity, address, on_message)
        return link

    def answer(self, identity: bytes, frames: list[bytes]) -> None:
        """Stand in for ``channel.Listener.send``."""
        self.post(frames, lambda: self._arrive(identity, frames))

    def post(self, frames: list[bytes], deliver: Callable[[], None]) -> None:
        header, _ = wire.decode(frames)
        self.in_flight.append(Packet(header.kind, frames, deliver))

    def deliver_one(self, index: int = 0) -> None:
        packet = self.in_flight.pop(index)
        self.delivered.append(packet.kind)
        packet.deliver()

    def deliver(self) -> int:
        """Deliver everything, answers to it included; return how many messages that was."""
        count = 0
        while self.in_flight:
            self.deliver_one()
            count += 1
            assert count < 10_000, "the messages never end"
        return count

    def lose(self, kind: str) -> int:
        """Drop every message of a kind that is under way; return how many."""
        kept = [packet for packet in self.in_flight if packet.kind != kind]
        lost, self.in_flight = len(self.in_flight) - len(kept), kept
        return lost

    def duplicate(self, kind: str) -> int:
        """Send every message of a kind that is under way once more, at the end of the queue."""
        copies = [packet for packet in self.in_flight if packet.kind == kind]
        self.in_flight += copies
        return len(copies)

    def open_links(self, address: Address) -> int:
        links = self.links.values()
        return sum(link.address == address and not link.is_closed for link in links)

    def _arrive(self, identity: bytes, frames: list[bytes]) -> None:
        link = self.links[identity]
        if not link.is_closed:
            link.on_message(frames)


# --- memory and reads ------------------------------------------------------------------------


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

    def add_peer(self, metadata: bytes) -> PeerName:
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
        for read in list(self.unfinished):
            if read.state is ReadState.PENDING:
                self._finish(read)

    def fail_reads(self) -> None:
        """Let every read that is under way end badly, after its first descriptor."""
        for read in list(self.unfinished):
            if read.state is ReadState.PENDING:
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


# --- engines ---------------------------------------------------------------------------------

BLOCK_TOKENS = 4
BLOCK_BYTES = 32


def make_layout(model: str = "model") -> EngineLayout:
    """One KV cache group of two layers, four tokens and 32 bytes a block."""
    group = Group(
        kind="full",
        block_tokens=BLOCK_TOKENS,
        window=None,
        layers=("layer.0", "layer.1"),
        block_shape=(2, BLOCK_TOKENS, 4),
        dtype="uint8",
    )
    return EngineLayout(model=model, tensor_parallel_size=1, groups=(group,))


def region_over(cache: NDArray[np.uint8], block_bytes: int | None = None) -> Region:
    """The region of an array of bytes ``[num_blocks, stride_bytes]``."""
    num_blocks, stride_bytes = cache.shape
    return Region(cache.ctypes.data, num_blocks, block_bytes or stride_bytes, stride_bytes)


class FakeEngine:
    """A control plane, a transfer plane and KV memory, on fakes; one rank.

    results, events: what the planes have reported, in order.
    Whenever a fetch is reported, it is checked that nothing can write to its blocks any more.
    """

    def __init__(
        self,
        name: str,
        address: Address,
        network: FakeNetwork,
        fabric: FakeFabric,
        clock: FakeClock,
        num_blocks: int = 32,
        lease_s: float = 30.0,
        queue_timeout_s: float = 600.0,
        peer_timeout_s: float = 5.0,
        fetch_timeout_s: float = 60.0,
        drain_s: float = 5.0,
        layout: EngineLayout | None = None,
    ) -> None:
        self.identity = Identity(name, new_incarnation())
        self.address = address
        self.layout = layout or make_layout()
        self.clock = clock
        self.events: list[Event] = []
        self.results: list[FetchResult] = []
        self._specs: dict[str, FetchSpec] = {}
        self._network = network
        num_layers = sum(len(group.layers) for group in self.layout.groups)
        self.caches = [np.zeros((num_blocks, BLOCK_BYTES), np.uint8) for _ in range(num_layers)]
        self.regions = tuple(region_over(cache) for cache in self.caches)
        self.transport = FakeTransport(fabric, f"{name}-{self.identity.incarnation}")
        metadata = self.transport.register([(c.ctypes.data, c.nbytes) for c in self.caches])
        worker = Identity(name, new_incarnation())
        self.plane = TransferPlane(
            LocalRank(0, 1, self.layout, self.regions),
            self.transport,
            self._make_peers(worker, peer_timeout_s),
            self._report,
            clock,
            fetch_timeout_s,
            drain_s,
        )
        self.control = ControlPlane(
            self.identity,
            self.layout,
            [RankMemory(self.regions, metadata)],
            lease_s,
            queue_timeout_s,
            self._make_peers(self.identity, peer_timeout_s),
            network.answer,
            self.events.append,
            clock,
        )
        network.listen(address, self.control.receive)

    def turn(self) -> None:
        self.control.turn()
        self.plane.turn()

    def kill(self) -> None:
        """Die without a word: nobody listens, and the memory can no longer be read."""
        self._network.silence(self.address)
        self.transport.close()

    def fill(self, blocks: Sequence[int], value: int) -> None:
        for cache in self.caches:
            cache[list(blocks)] = value

    def holds(self, blocks: Sequence[int], value: int) -> bool:
        return all(bool((cache[list(blocks)] == value).all()) for cache in self.caches)

    def produce(self, request_id: str, blocks: Sequence[int], num_tokens: int) -> Source:
        """Open a handoff and seal it, with its KV in ``blocks``."""
        source = self.begin(request_id, num_tokens)
        self.control.seal(source.handoff_id, num_tokens, (tuple(blocks),))
        return source

    def begin(self, request_id: str, num_tokens: int) -> Source:
        """Open a handoff whose KV is still being produced."""
        handoff = new_handoff_id()
        self.control.open(handoff, request_id, num_tokens, b"digest")
        return Source(handoff, self.address, self.identity.incarnation)

    def fetch(
        self, request_id: str, source: Source, blocks: Sequence[int], num_tokens: int
    ) -> None:
        spec = FetchSpec(request_id, source, 0, num_tokens, (tuple(blocks),))
        self._specs[request_id] = spec
        self.plane.fetch(spec)

    def outcome(self, request_id: str) -> Reason | None:
        """How a fetch ended; it must have been reported exactly once."""
        (result,) = (r for r in self.results if r.request_id == request_id)
        return result.reason

    def is_reported(self, request_id: str) -> bool:
        return any(result.request_id == request_id for result in self.results)

    def lost(self) -> dict[str, Reason]:
        return {e.request_id: e.reason for e in self.events if isinstance(e, Lost)}

    def offered(self) -> list[str]:
        return [e.request_id for e in self.events if isinstance(e, Offered)]

    def released(self) -> list[str]:
        return [e.request_id for e in self.events if isinstance(e, Released)]

    def _make_peers(self, identity: Identity, timeout_s: float) -> Callable[..., PeerTable]:
        return lambda on_ready, on_lost, on_reply: PeerTable(
            identity,
            self.layout,
            timeout_s,
            self._network.connect,
            on_ready,
            on_lost,
            on_reply,
            self.clock,
        )

    def _report(self, result: FetchResult) -> None:
        assert not self.is_reported(result.request_id), "a fetch was reported twice"
        for block in self._specs[result.request_id].blocks[0]:
            for region in self.regions:
                assert not self.transport.may_write(region.address(block), region.block_bytes), (
                    "a fetch was reported while a read could still write to its blocks"
                )
        self.results.append(result)


class FakeCluster:
    """A producer and a consumer on one network, and the time they share."""

    producer_address: Address = ("127.0.0.1", 7001)
    consumer_address: Address = ("127.0.0.1", 7002)

    def __init__(self, lease_s: float = 30.0, queue_timeout_s: float = 600.0) -> None:
        self.clock = FakeClock()
        self.network = FakeNetwork()
        self.fabric = FakeFabric()
        self._lease_s, self._queue_timeout_s = lease_s, queue_timeout_s
        self.producer = self._engine("producer", self.producer_address)
        self.consumer = self._engine("consumer", self.consumer_address)

    def restart_producer(self) -> FakeEngine:
        """Replace the producer by a new incarnation on the same address; return the old one."""
        old = self.producer
        old.kill()
        self.producer = self._engine("producer", self.producer_address)
        return old

    def settle(self) -> None:
        """Deliver messages and drive the consumer until nothing happens any more."""
        self.consumer.turn()
        while self.network.deliver():
            self.consumer.turn()

    def pass_time(self, seconds: float, step_s: float = 0.5) -> None:
        """Let time pass, with both engines awake."""
        for _ in range(round(seconds / step_s)):
            self.clock.advance(step_s)
            self.producer.turn()
            self.settle()

    def _engine(self, name: str, address: Address) -> FakeEngine:
        return FakeEngine(
            name,
            address,
            self.network,
            self.fabric,
            self.clock,
            lease_s=self._lease_s,
            queue_timeout_s=self._queue_timeout_s,
        )
