"""Whole engines: both planes, KV memory, and what vLLM's scheduler would have them do."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tests.fakes.clock import FakeClock
from tests.fakes.network import FakeNetwork
from tests.fakes.transport import FakeFabric, FakeTransport
from vllm_pd_plugin.announcer import Announcement, Announcer, Mark
from vllm_pd_plugin.control import (
    Abandoned,
    ControlPlane,
    Event,
    LocalEngine,
    Lost,
    Offered,
    Released,
)
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.fetches import FetchResult, FetchSpec
from vllm_pd_plugin.ids import Address, HandoffId, Source, new_handoff_id, new_incarnation
from vllm_pd_plugin.layout import EngineLayout, Group, RankMemory, Region
from vllm_pd_plugin.peers import Identity, PeerTable
from vllm_pd_plugin.plan import BlockTables
from vllm_pd_plugin.produced import Advance
from vllm_pd_plugin.transfer import LocalRank, Timeouts, TransferPlane

BLOCK_TOKENS = 4
BLOCK_BYTES = 32
TOKEN_BYTES = BLOCK_BYTES // BLOCK_TOKENS
_MAX_TOKENS = 64


def full_group(*layers: str) -> Group:
    """Full attention: four tokens and 32 bytes a block."""
    return Group("full", BLOCK_TOKENS, None, layers, (2, BLOCK_TOKENS, 4), "uint8")


def sliding_group(window: int, *layers: str) -> Group:
    """The same with a sliding window."""
    return Group("sliding_window", BLOCK_TOKENS, window, layers, (2, BLOCK_TOKENS, 4), "uint8")


def make_layout(model: str = "model", groups: Sequence[Group] = ()) -> EngineLayout:
    """One KV cache group of two layers, unless others are given; one rank."""
    chosen = tuple(groups) or (full_group("layer.0", "layer.1"),)
    return EngineLayout(model=model, tensor_parallel_size=1, groups=chosen)


def region_over(cache: NDArray[np.uint8], block_bytes: int | None = None) -> Region:
    """The region of an array of bytes ``[num_blocks, stride_bytes]``."""
    num_blocks, stride_bytes = cache.shape
    return Region(cache.ctypes.data, num_blocks, block_bytes or stride_bytes, stride_bytes)


def kv_of(prompt: int, num_layers: int, num_tokens: int) -> NDArray[np.uint8]:
    """A prompt's KV, bytes ``[num_layers, num_tokens, TOKEN_BYTES]``: the same at every call,
    another for every prompt, layer and token, and that of a prefix is its prefix."""
    assert num_tokens <= _MAX_TOKENS
    return np.stack([_layer_kv(prompt, layer)[:num_tokens] for layer in range(num_layers)])


@functools.cache
def _layer_kv(prompt: int, layer: int) -> NDArray[np.uint8]:
    generator = np.random.default_rng((prompt, layer))
    return generator.integers(0, 256, (_MAX_TOKENS, TOKEN_BYTES), dtype=np.uint8)


@dataclasses.dataclass(slots=True, eq=False)
class _Running:
    """A request whose KV is to be handed off, as vLLM's scheduler knows it."""

    source: Source
    num_tokens: int
    epoch: int = 0
    blocks: BlockTables = ()


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
        num_blocks: int = 64,
        lease_s: float = 30.0,
        queue_timeout_s: float = 600.0,
        peer_timeout_s: float = 5.0,
        timeouts: Timeouts | None = None,
        layout: EngineLayout | None = None,
    ) -> None:
        self.identity = Identity(name, new_incarnation())
        self.address = address
        self.layout = layout or make_layout()
        self.num_layers = len(self.layout.layers)
        self.clock = clock
        self.events: list[Event] = []
        self.results: list[FetchResult] = []
        self.running: dict[str, _Running] = {}
        self._steps = 0
        self.specs: dict[str, FetchSpec] = {}
        self._network = network
        self.caches = [
            np.zeros((num_blocks, BLOCK_BYTES), np.uint8) for _ in range(self.num_layers)
        ]
        self.regions = tuple(region_over(cache) for cache in self.caches)
        self.transport = FakeTransport(fabric, f"{name}-{self.identity.incarnation}")
        metadata = self.transport.register([(c.ctypes.data, c.nbytes) for c in self.caches])
        self.worker = Identity(name, new_incarnation())
        self.plane = TransferPlane(
            LocalRank(0, self.layout, self.regions),
            self.transport,
            self._peers_of(self.worker, peer_timeout_s),
            self._report,
            clock,
            timeouts or Timeouts(queue_s=600.0, read_s=60.0, drain_s=5.0),
        )
        self.announcer = Announcer(self.worker.incarnation, 0, network.connect)
        self._knows_control = False
        self.control = ControlPlane(
            LocalEngine(
                self.identity,
                self.layout,
                [RankMemory(self.regions, metadata)],
                [self.worker.incarnation],
            ),
            lease_s,
            queue_timeout_s,
            self._peers_of(self.identity, peer_timeout_s),
            network.answer,
            self.events.append,
            clock,
        )
        network.listen(address, self.control.receive)

    def turn(self) -> None:
        self.control.turn()
        self.announcer.turn()
        self.plane.turn()

    def kill(self) -> None:
        """Die without a word: nobody listens, and the memory can no longer be read."""
        self._network.silence(self.address)
        self.transport.close()

    def open_handoffs(self) -> dict[str, int]:
        """How many each table still knows; all are zero when nothing has leaked."""
        control, plane = self.control, self.plane
        return {
            "producer": len(control._producing),
            "early": len(control._producing._early),
            "consumer": len(control._consuming),
            "fetches": len(plane._fetches),
        }

    # --- memory

    def fill(self, blocks: Sequence[int], value: int, layers: Sequence[int] | None = None) -> None:
        """Set every byte of some blocks, in some layers (by region) or in all."""
        for layer in range(self.num_layers) if layers is None else layers:
            self.caches[layer][list(blocks)] = value

    def holds(self, blocks: Sequence[int], value: int) -> bool:
        return all(bool((cache[list(blocks)] == value).all()) for cache in self.caches)

    def write_kv(self, prompt: int, blocks: BlockTables, tokens: range, layer: int) -> None:
        """Write a prompt's KV of some tokens in one layer (by region), as a forward pass does."""
        kv = kv_of(prompt, self.num_layers, tokens.stop)[layer]
        cache, table = self.caches[layer], blocks[self.group_of(layer)]
        for token in tokens:
            block, place = table[token // BLOCK_TOKENS], token % BLOCK_TOKENS
            cache[block, place * TOKEN_BYTES : (place + 1) * TOKEN_BYTES] = kv[token]

    def holds_kv(self, prompt: int, blocks: BlockTables, num_tokens: int) -> bool:
        """Say whether blocks hold the KV of a prompt's first tokens in every layer."""
        kv = kv_of(prompt, self.num_layers, num_tokens)
        return all(
            np.array_equal(
                self.caches[layer][list(blocks[self.group_of(layer)])].reshape(-1, TOKEN_BYTES)[
                    :num_tokens
                ],
                kv[layer],
            )
            for layer in range(self.num_layers)
        )

    def group_of(self, layer: int) -> int:
        """The KV cache group of a layer, by its region."""
        sizes = [len(group.layers) for group in self.layout.groups]
        return int(np.searchsorted(np.cumsum(sizes), layer, side="right"))

    # --- as a producer

    def enqueue(
        self,
        request_id: str,
        num_tokens: int,
        handoff_id: HandoffId | None = None,
        digest: bytes = b"digest",
    ) -> Source:
        """A request arrives whose KV is to be handed off."""
        handoff = handoff_id or new_handoff_id()
        source = Source(handoff, self.address, self.identity.incarnation)
        self.running[request_id] = _Running(source, num_tokens)
        self.control.enqueue(handoff, request_id, num_tokens, digest)
        return source

    def begin(self, request_id: str, num_tokens: int) -> Source:
        """A request arrives and is scheduled at once."""
        source = self.enqueue(request_id, num_tokens)
        self.control.open(source.handoff_id)
        return source

    def advance(self, request_id: str, num_tokens: int, blocks: Sequence[int] | BlockTables) -> int:
        """Begin a step that computes a request up to a number of tokens; return the step."""
        running = self.running[request_id]
        running.blocks = self._tables(blocks)
        self._steps += 1
        advance = Advance(running.source.handoff_id, running.epoch, num_tokens, running.blocks)
        self.control.advance(self._steps, [advance])
        return self._steps

    def announce(self, step: int, num_layers: int | None = None) -> None:
        """The worker says that so many layers of a step are written; all, unless told."""
        layers = self.num_layers if num_layers is None else num_layers
        if not self._knows_control:
            self._knows_control = True
            self.announcer.connect(self.address, self.identity.incarnation)
        announcement = Announcement(step, (self.num_layers,))
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
        self, request_id: str, blocks: Sequence[int] | BlockTables, num_tokens: int | None = None
    ) -> None:
        """The request has ended with KV to hand off."""
        running = self.running.pop(request_id)
        tokens = running.num_tokens if num_tokens is None else num_tokens
        self.control.seal(running.source.handoff_id, tokens, self._tables(blocks))

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
    ) -> None:
        spec = FetchSpec(request_id, source, first_token, num_tokens, self._tables(blocks))
        self.specs[request_id] = spec
        self.plane.fetch(spec)

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

    def _peers_of(self, identity: Identity, timeout_s: float) -> functools.partial[PeerTable]:
        return functools.partial(
            PeerTable, identity, self.layout, timeout_s, self._network.connect, self.clock
        )

    def _report(self, result: FetchResult) -> None:
        assert not self.is_reported(result.request_id), "a fetch was reported twice"
        blocks = self.specs[result.request_id].blocks
        for layer, region in enumerate(self.regions):
            for block in blocks[self.group_of(layer)]:
                assert not self.transport.may_write(region.address(block), region.block_bytes), (
                    "a fetch was reported while a read could still write to its blocks"
                )
        self.results.append(result)


class FakeCluster:
    """A producer and a consumer on one network, and the time they share."""

    producer_address: Address = ("127.0.0.1", 7001)
    consumer_address: Address = ("127.0.0.1", 7002)

    def __init__(
        self,
        lease_s: float = 30.0,
        queue_timeout_s: float = 600.0,
        timeouts: Timeouts | None = None,
        layout: EngineLayout | None = None,
    ) -> None:
        self.clock = FakeClock()
        self.network = FakeNetwork()
        self.fabric = FakeFabric()
        self._lease_s, self._queue_timeout_s = lease_s, queue_timeout_s
        self._timeouts, self._layout = timeouts, layout
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
            timeouts=self._timeouts,
            layout=self._layout,
        )
