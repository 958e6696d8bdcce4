"""Whole engines: both planes, KV memory, and what vLLM's scheduler would have them do."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from tests.fakes.clock import FakeClock
from tests.fakes.coder import FakeCoder
from tests.fakes.memory import BLOCK_BYTES, BLOCK_TOKENS, FakeMemory
from tests.fakes.network import FakeNetwork
from tests.fakes.transport import FakeFabric, FakeTransport
from vllm_pd_plugin.codecs.codec import CodecChoice
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import Address, HandoffId, Source, new_handoff_id, new_incarnation
from vllm_pd_plugin.mapping.kv_cache import EngineKvCache, RankPlace
from vllm_pd_plugin.memory.identity import KvIdentity, Weights
from vllm_pd_plugin.memory.layout import BlockTables, Group, RankLayout, RankMemory, Region, Span
from vllm_pd_plugin.packing.incoming import Incoming, Packing, Taker
from vllm_pd_plugin.packing.packer import Packer
from vllm_pd_plugin.packing.pieces import Pieces
from vllm_pd_plugin.packing.staging import Room, Staging
from vllm_pd_plugin.protocol.control import ControlPlane, LocalEngine
from vllm_pd_plugin.protocol.events import Abandoned, Event, Lost, Offered, Released
from vllm_pd_plugin.protocol.peers import Identity, PeerTable
from vllm_pd_plugin.protocol.steps import Advance
from vllm_pd_plugin.transfer.announcer import Announcement, Announcer, Mark
from vllm_pd_plugin.transfer.peer_reading import PeerReading
from vllm_pd_plugin.transfer.plane import TransferPlane
from vllm_pd_plugin.transfer.rank import LocalRank, Rank, Timeouts
from vllm_pd_plugin.transfer.specs import FetchResult, FetchSpec, Segment

PEER_TIMEOUT_S = 5.0
STAGING_BYTES = 4096
MOMENT_S = 0.002
BIT_FOR_BIT = CodecChoice()


def full_group(*layers: str) -> Group:
    """Full attention: four tokens and 32 bytes a block."""
    return Group("full", BLOCK_TOKENS, None, layers, (2, BLOCK_TOKENS, 4), "uint8")


def sliding_group(window: int, *layers: str) -> Group:
    """The same with a sliding window."""
    return Group("sliding_window", BLOCK_TOKENS, window, layers, (2, BLOCK_TOKENS, 4), "uint8")


def make_layout(groups: Sequence[Group] = ()) -> RankLayout:
    """One KV cache group of two layers, unless others are given; one rank."""
    chosen = tuple(groups) or (full_group("layer.0", "layer.1"),)
    return RankLayout(chosen)


def make_kv_cache(layout: RankLayout, memory: RankMemory, num_ranks: int = 1) -> EngineKvCache:
    """What an engine says whose tensor parallel ranks are all like this one."""
    return EngineKvCache.seen_by_rank(layout, memory, RankPlace(0, 0, 1, num_ranks))


def memory_of(layout: RankLayout) -> RankMemory:
    """Memory that nobody looks at, of 64 blocks a layer."""
    region = Region(0, 64, BLOCK_BYTES, BLOCK_BYTES)
    return RankMemory(tuple(region for _ in layout.layers), b"")


def make_kv(**changes: Any) -> KvIdentity:
    """What KV is, in engines that fit together."""
    fields: dict[str, Any] = {
        "architecture": "Model", "config": "config", "weights": Weights("sampled:1"),
        "dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "quantization": "none", "rope": "{}",
        "windows": "none",
    }  # fmt: skip
    return KvIdentity(**fields | changes)


@dataclasses.dataclass(frozen=True, slots=True)
class Surroundings:
    """What engines share: the network, what moves their memory, and the time."""

    network: FakeNetwork
    fabric: FakeFabric
    clock: FakeClock


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How engines are set up.

    checks_bytes: fetches compare what they have read with what the producer holds.
    packing: whether fetches have the producer pack what they read; None: there is no staging
        memory.
    staging_bytes: of each half of it.
    """

    lease_s: float
    queue_timeout_s: float
    timeouts: Timeouts
    layout: RankLayout
    checks_bytes: bool
    packing: Packing | None = None
    staging_bytes: int = STAGING_BYTES
    kv: KvIdentity = make_kv()


@dataclasses.dataclass(slots=True, eq=False)
class _Running:
    """A request whose KV is to be handed off, as vLLM's scheduler knows it."""

    source: Source
    num_tokens: int
    epoch: int = 0
    blocks: BlockTables = ()


class FakeEngine(FakeMemory):
    """A control plane, a transfer plane and KV memory, on fakes; one rank.

    results, events: what the planes have reported, in order.
    Whenever a fetch is reported, it is checked that nothing can write to its blocks any more.
    """

    def __init__(
        self, name: str, address: Address, around: Surroundings, settings: Settings
    ) -> None:
        super().__init__(settings.layout)
        self.kv = settings.kv
        self.identity = Identity(name, new_incarnation())
        self.worker = Identity(name, new_incarnation())
        self.address = address
        self.events: list[Event] = []
        self.results: list[FetchResult] = []
        self.running: dict[str, _Running] = {}
        self.specs: dict[str, FetchSpec] = {}
        self._around = around
        self._steps = 0
        self._knows_control = False
        self.transport = FakeTransport(around.fabric, f"{name}-{self.identity.incarnation}")
        pieces = Pieces(settings.layout, self.regions)
        self.coder = FakeCoder(self, settings.staging_bytes)
        self.outgoing, self.incoming = (Staging(settings.staging_bytes) for _ in range(2))
        self.room: Room[Taker] = Room(self.incoming)
        spans = [*self.spans(), *self.coder.spans()]
        staging = Span(*self.coder.spans()[0]) if settings.packing else None
        memory = RankMemory(self.regions, self.transport.register(spans), staging)
        self.plane = self._make_transfer_plane(settings, pieces, memory)
        self.announcer = Announcer(
            self.worker.incarnation,
            0,
            self.digest,
            Packer(pieces, self.outgoing, self.coder) if settings.packing else None,
            around.network.connect,
        )
        self.control = self._make_control_plane(settings, memory)
        around.network.listen(address, self.control.receive)
        around.network.senders.append(self.control.send)
        if settings.packing:
            self._connect_announcer()

    def turn(self) -> None:
        self.control.turn()
        self.announcer.set_lending(len(self.control._exports) > 0)
        self.announcer.turn()
        self.look_at_reads()

    def look_at_reads(self) -> float | None:
        """Let the transfer thread do what it has to, and wake up for the reads that are under way;
        for those that do not end by themselves once. A moment passes."""
        looks = 1 if self.transport.holds_reads else 1000
        wait_s = self.plane.turn()
        while wait_s is not None and self.transport.reads and looks:
            looks -= 1
            self._around.clock.advance(min(wait_s, MOMENT_S))
            wait_s = self.plane.turn()
        return wait_s

    def kill(self) -> None:
        """Die without a word: nobody listens, and the memory can no longer be read."""
        self._around.network.silence(self.address)
        self._around.network.senders.remove(self.control.send)
        self.transport.close()

    def open_handoffs(self) -> dict[str, int]:
        """How many each table still knows; all are zero when nothing has leaked."""
        control, plane = self.control, self.plane
        return {
            "producer": len(control._exports),
            "early": control._exports.num_awaited,
            "consumer": len(control._wanting),
            "fetches": len(plane._fetches),
            "packed bytes": self.outgoing.taken_bytes + self.incoming.taken_bytes,
        }

    # --- as a producer

    def enqueue(
        self,
        request_id: str,
        num_tokens: int,
        handoff_id: HandoffId | None = None,
        prompt: bytes = b"digest",
    ) -> Source:
        """A request arrives whose KV is to be handed off."""
        handoff = handoff_id or new_handoff_id()
        source = Source(handoff, self.address, self.identity.incarnation)
        self.running[request_id] = _Running(source, num_tokens)
        self.control.enqueue(handoff, request_id, num_tokens, prompt)
        return source

    def begin(
        self, request_id: str, num_tokens: int, handoff_id: HandoffId | None = None
    ) -> Source:
        """A request arrives and is scheduled at once."""
        source = self.enqueue(request_id, num_tokens, handoff_id)
        self.control.open(source.handoff_id)
        return source

    def advance(self, request_id: str, num_tokens: int, blocks: Sequence[int] | BlockTables) -> int:
        """Begin a step that computes a request up to a number of tokens; return the step."""
        running = self.running[request_id]
        running.blocks = self._tables(blocks)
        self._steps += 1
        every_layer = tuple(range(1, self.num_layers + 1))
        advance = Advance(
            running.source.handoff_id, running.epoch, num_tokens, running.blocks, (every_layer,)
        )
        self.control.advance(self._steps, [advance])
        return self._steps

    def announce(self, step: int, num_layers: int | None = None) -> None:
        """The worker says that so many layers of a step are written; all, unless told."""
        layers = self.num_layers if num_layers is None else num_layers
        self._connect_announcer()
        announcement = Announcement(step, ((self.num_layers,),))
        self.announcer.add(Mark(announcement, layers, lambda: True))
        self.announcer.turn()

    def compute(self, request_id: str, num_tokens: int, blocks: Sequence[int]) -> None:
        """A whole step, announced at its end; the bytes are the test's business."""
        self.announce(self.advance(request_id, num_tokens, blocks))

    def preempt(self, request_id: str) -> None:
        """Take a request's blocks away; its KV must be computed again."""
        running = self.running[request_id]
        running.epoch += 1
        running.blocks = ()
        self.control.withdraw(running.source.handoff_id, running.epoch)

    def seal(
        self,
        request_id: str,
        blocks: Sequence[int] | BlockTables,
        num_tokens: int | None = None,
        sampled: int | None = None,
    ) -> None:
        """The request has ended with KV to hand off, and perhaps with a token after it."""
        running = self.running.pop(request_id)
        tokens = running.num_tokens if num_tokens is None else num_tokens
        handoff_id = running.source.handoff_id
        self.control.seal(handoff_id, request_id, tokens, self._tables(blocks), sampled)

    def drop(self, request_id: str) -> None:
        """The request has ended without."""
        self.control.drop(self.running.pop(request_id).source.handoff_id)

    def produce(self, request_id: str, blocks: Sequence[int], num_tokens: int) -> Source:
        """Open a handoff and seal it, with its KV in ``blocks``."""
        source = self.begin(request_id, num_tokens)
        self.seal(request_id, blocks)
        return source

    def released(self) -> list[str]:
        return [e.request_id for e in self.events if isinstance(e, Released)]

    def abandoned(self) -> list[str]:
        return [e.request_id for e in self.events if isinstance(e, Abandoned)]

    # --- as a consumer

    def fetch(
        self,
        request_id: str,
        source: Source,
        blocks: Sequence[int] | BlockTables,
        num_tokens: int,
        first_token: int = 0,
        choice: CodecChoice = BIT_FOR_BIT,
        seeds: bool = False,
    ) -> None:
        tables = self._tables(blocks)
        segment = Segment(range(first_token, num_tokens), source)
        spec = FetchSpec(request_id, (segment,), tables, codec=choice, seeds=seeds)
        self.specs[request_id] = spec
        self.plane.fetch(spec)

    def attempt(self, request_id: str) -> PeerReading:
        """The attempt under way of a fetch that has one segment."""
        (reading,) = self.plane._fetches[request_id].readings
        assert isinstance(reading, PeerReading)
        return reading

    def result(self, request_id: str) -> FetchResult:
        """The result of a fetch; it must have been reported exactly once."""
        (result,) = (r for r in self.results if r.request_id == request_id)
        return result

    def outcome(self, request_id: str) -> Reason | None:
        return self.result(request_id).reason

    def is_reported(self, request_id: str) -> bool:
        return any(result.request_id == request_id for result in self.results)

    def lost(self) -> dict[str, Reason]:
        return {e.request_id: e.reason for e in self.events if isinstance(e, Lost)}

    def offers(self) -> list[Offered]:
        return [event for event in self.events if isinstance(event, Offered)]

    def offered(self) -> list[str]:
        return [offer.request_id for offer in self.offers()]

    # --- inside

    def _tables(self, blocks: Sequence[int] | BlockTables) -> BlockTables:
        """One table for each group; a plain list of blocks is that of the first."""
        tables = [block for block in blocks if not isinstance(block, int)]
        if tables:
            return tuple(tuple(table) for table in tables)
        plain = tuple(block for block in blocks if isinstance(block, int))
        return (plain, *[() for _ in self.layout.groups[1:]])

    def _connect_announcer(self) -> None:
        """The control plane learns at once where the worker is."""
        if not self._knows_control:
            self._knows_control = True
            self.announcer.connect(self.address, self.identity.incarnation)
            self._around.network.deliver_one(-1)

    def _make_transfer_plane(
        self, settings: Settings, pieces: Pieces, memory: RankMemory
    ) -> TransferPlane:
        incoming = None
        if settings.packing:
            span = Span(*self.coder.spans()[1])
            incoming = Incoming(span, self.room, pieces, self.coder, settings.packing, {})
        rank = Rank(
            LocalRank(0, self.layout, make_kv_cache(self.layout, memory), self.regions, incoming),
            self.transport,
            settings.timeouts,
            self._around.clock,
            self.digest if settings.checks_bytes else None,
        )
        return TransferPlane(rank, self._peers_of(self.worker), self._report)

    def _make_control_plane(self, settings: Settings, memory: RankMemory) -> ControlPlane:
        return ControlPlane(
            LocalEngine(
                self.identity,
                self.layout,
                make_kv_cache(self.layout, memory),
                self.kv,
                [memory],
                [self.worker.incarnation],
            ),
            settings.lease_s,
            settings.queue_timeout_s,
            self._peers_of(self.identity),
            self._around.network.answer,
            self.events.append,
            self._around.clock,
        )

    def _peers_of(self, identity: Identity) -> functools.partial[PeerTable]:
        network, clock = self._around.network, self._around.clock
        return functools.partial(PeerTable, identity, PEER_TIMEOUT_S, network.connect, clock)

    def _report(self, result: FetchResult) -> None:
        assert not self.is_reported(result.request_id), "a fetch was reported twice"
        blocks = self.specs[result.request_id].blocks
        for layer, region in enumerate(self.regions):
            for block in blocks[self.group_of(layer)]:
                assert not self.transport.may_write(region.address(block), region.block_bytes), (
                    "a fetch was reported while a read could still write to its blocks"
                )
        self.results.append(result)
