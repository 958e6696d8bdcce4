"""Engines of several ranks: a control plane, and for each rank a transfer plane and memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence

from tests.fakes.engines import MOMENT_S, PEER_TIMEOUT_S, Settings, Surroundings
from tests.fakes.shapes import Shape, ShapedCoder, ShapedMemory
from tests.fakes.transport import FakeTransport
from vllm_pd_plugin.ids import Address, new_incarnation
from vllm_pd_plugin.mapping.kv_cache import EngineKvCache, RankPlace
from vllm_pd_plugin.memory.layout import BlockTables, RankMemory, Span
from vllm_pd_plugin.packing.incoming import Incoming, Packing, Taker
from vllm_pd_plugin.packing.packer import Packer
from vllm_pd_plugin.packing.pieces import Pieces
from vllm_pd_plugin.packing.staging import Room, Staging
from vllm_pd_plugin.protocol.control import ControlPlane, LocalEngine
from vllm_pd_plugin.protocol.events import Event
from vllm_pd_plugin.protocol.peers import Identity, PeerTable
from vllm_pd_plugin.transfer.announcer import Announcement, Announcer, Mark
from vllm_pd_plugin.transfer.plane import TransferPlane
from vllm_pd_plugin.transfer.rank import LocalRank, Rank
from vllm_pd_plugin.transfer.specs import FetchResult, FetchSpec


def peers_of(around: Surroundings, identity: Identity) -> functools.partial[PeerTable]:
    network, clock = around.network, around.clock
    return functools.partial(PeerTable, identity, PEER_TIMEOUT_S, network.connect, clock)


class FakeRank(ShapedMemory):
    """One rank of an engine.

    results: what its plane has reported. Whenever a fetch is reported, it is checked that nothing
        can write to its blocks any more.
    """

    def __init__(
        self, name: str, shape: Shape, place: RankPlace, around: Surroundings, settings: Settings
    ) -> None:
        super().__init__(shape, place)
        self.worker = Identity(name, new_incarnation())
        self.results: list[FetchResult] = []
        self._specs: dict[str, FetchSpec] = {}
        self._around = around
        self.transport = FakeTransport(around.fabric, f"{name}-{self.worker.incarnation}")
        pieces = Pieces(self.layout, self.regions)
        self.coder = ShapedCoder(self, settings.staging_bytes)
        self.outgoing, self.incoming = (Staging(settings.staging_bytes) for _ in range(2))
        spans = [*self.spans(), *self.coder.spans()]
        staging = Span(*self.coder.spans()[0]) if settings.packing else None
        self.memory = RankMemory(self.regions, self.transport.register(spans), staging)
        self.kv_cache = EngineKvCache.seen_by_rank(self.layout, self.memory, place)
        self.plane = self._make_plane(pieces, settings)
        packer = Packer(pieces, self.outgoing, self.coder) if settings.packing else None
        self.announcer = Announcer(
            self.worker.incarnation, place.rank, self.digest, packer, around.network.connect
        )

    @property
    def packed_bytes(self) -> int:
        return self.outgoing.taken_bytes + self.incoming.taken_bytes

    def announce(self, step: int, num_layers: int) -> None:
        """So many layers of a step are written."""
        announcement = Announcement(step, ((num_layers,),) * self.place.num_stages)
        self.announcer.add(Mark(announcement, num_layers, lambda: True))
        self.announcer.turn()

    def fetch(self, spec: FetchSpec) -> None:
        self._specs[spec.request_id] = spec
        self.plane.fetch(spec)

    def turn(self) -> None:
        """What its transfer thread does; reads that end by themselves do. A moment passes."""
        while self.announcer.turn() == 0.0:
            pass
        looks = 1 if self.transport.holds_reads else 1000
        wait_s = self.plane.turn()
        while wait_s is not None and self.transport.reads and looks:
            looks -= 1
            self._around.clock.advance(min(wait_s, MOMENT_S))
            wait_s = self.plane.turn()

    def _make_plane(self, pieces: Pieces, settings: Settings) -> TransferPlane:
        incoming = None
        if settings.packing:
            room: Room[Taker] = Room(self.incoming)
            span = Span(*self.coder.spans()[1])
            incoming = Incoming(span, room, pieces, self.coder, Packing(settings.packing), {})
        local = LocalRank(self.place.rank, self.layout, self.kv_cache, self.regions, incoming)
        digest = self.digest if settings.checks_bytes else None
        rank = Rank(local, self.transport, settings.timeouts, self._around.clock, digest)
        return TransferPlane(rank, peers_of(self._around, self.worker), self._report)

    def _report(self, result: FetchResult) -> None:
        known = [before.request_id for before in self.results]
        assert result.request_id not in known, "a fetch was reported twice"
        tables = self._specs[result.request_id].blocks
        for number, region in enumerate(self.regions):
            for block in tables[self.group_of(number)]:
                assert not self.transport.may_write(region.address(block), region.block_bytes), (
                    "a fetch was reported while a read could still write to its blocks"
                )
        self.results.append(result)


class RankedEngine:
    """An engine of some shape.

    events: what its control plane has said.
    bare: ranks that have no staging memory.
    """

    def __init__(
        self,
        name: str,
        address: Address,
        shape: Shape,
        around: Surroundings,
        settings: Settings,
        bare: Collection[int] = (),
    ) -> None:
        self.shape = shape
        self.address = address
        self.identity = Identity(name, new_incarnation())
        self.events: list[Event] = []
        without = dataclasses.replace(settings, packing=None)
        self.ranks = [
            FakeRank(
                f"{name}-{place.rank}",
                shape,
                place,
                around,
                without if place.rank in bare else settings,
            )
            for place in shape.places
        ]
        self.control = self._make_control(around, settings)
        around.network.listen(address, self.control.receive)
        around.network.senders.append(self.control.send)
        for rank in self.ranks:
            rank.announcer.connect(address, self.identity.incarnation)
            around.network.deliver_one(-1)

    def turn(self) -> None:
        self.control.turn()
        for rank in self.ranks:
            rank.turn()

    def fill(self, group: int, blocks: Sequence[int], prompt: int) -> None:
        """Some blocks of a group are another's, who writes to them at once, on every rank."""
        tables: BlockTables = [list(blocks)] * self.shape.num_groups
        tokens = range(len(blocks) * self.shape.block_tokens)
        for rank in self.ranks:
            for region in range(rank.num_layers):
                if rank.group_of(region) == group:
                    rank.write(prompt, tables, tokens, region)

    def open_handoffs(self) -> dict[str, int]:
        """How many each table still knows; all are zero when nothing has leaked."""
        return {
            "producer": len(self.control._exports),
            "early": self.control._exports.num_awaited,
            "consumer": len(self.control._wanting),
            "fetches": sum(len(rank.plane._fetches) for rank in self.ranks),
            "packed bytes": sum(rank.packed_bytes for rank in self.ranks),
        }

    def _make_control(self, around: Surroundings, settings: Settings) -> ControlPlane:
        stages = self.ranks[:: self.shape.tp]
        local = LocalEngine(
            self.identity,
            self.ranks[0].layout,
            EngineKvCache.merged([rank.kv_cache for rank in stages]),
            settings.kv,
            [rank.memory for rank in self.ranks],
            [rank.worker.incarnation for rank in self.ranks],
        )
        return ControlPlane(
            local,
            settings.lease_s,
            settings.queue_timeout_s,
            peers_of(around, self.identity),
            around.network.answer,
            self.events.append,
            around.clock,
        )
