"""An engine without vLLM: the real planes, threads and sockets of one rank, over a fake KV cache.

It puts together what ``edge.scheduler`` and ``edge.worker`` put together in vLLM.
"""

from __future__ import annotations

import dataclasses
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.ids import Address, EngineId, new_incarnation
from vllm_pd_plugin.mapping.kv_cache import EngineKvCache, RankPlace
from vllm_pd_plugin.memory import regions
from vllm_pd_plugin.memory.identity import KvIdentity, Weights
from vllm_pd_plugin.memory.layout import RankLayout, RankMemory, Span
from vllm_pd_plugin.net.channel import Dealer, Listener, Loop
from vllm_pd_plugin.net.transport import Transport
from vllm_pd_plugin.packing.coder import BlockCoder
from vllm_pd_plugin.packing.digests import kv_digest
from vllm_pd_plugin.packing.pieces import Pieces
from vllm_pd_plugin.packing.slabs import Slabs
from vllm_pd_plugin.protocol.control import ControlPlane, LocalEngine
from vllm_pd_plugin.protocol.events import Event
from vllm_pd_plugin.protocol.peers import Identity, PeerTable
from vllm_pd_plugin.transfer.announcer import Announcement, Announcer, Mark
from vllm_pd_plugin.transfer.plane import TransferPlane
from vllm_pd_plugin.transfer.rank import LocalRank, Rank, Timeouts
from vllm_pd_plugin.transfer.specs import FetchResult

PATIENCE_S = 20.0
KV = KvIdentity("Fake", "", Weights("sampled:1"), "bfloat16", "bfloat16", "none", "", "")

Allocate = Callable[[int], torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class RankParts:
    """What a rank is made of.

    caches: each layer's KV cache. transport, allocate: for them, and for the staging memory.
    """

    layout: RankLayout
    caches: Mapping[str, torch.Tensor]
    transport: Transport
    allocate: Allocate


class Engine:
    """events, results: what the two planes report, in order."""

    def __init__(self, engine_id: EngineId, config: PdConfig, parts: RankParts) -> None:
        self.layout = parts.layout
        self.events: queue.Queue[Event] = queue.Queue()
        self.results: queue.Queue[FetchResult] = queue.Queue()
        self._config = config
        self._identity = Identity(engine_id, new_incarnation())
        self._worker = Identity(engine_id, new_incarnation())
        self._transfer_loop = Loop("pd-transfer", self._transfer_turn)
        self._control_loop = Loop("pd-control", lambda: self._control.turn())
        listener = Listener(self._control_loop, (config.host, 0), None, self._receive)
        self.address: Address = (config.host, listener.port)
        memory = self._make_transfer(parts)
        self._control = ControlPlane(
            LocalEngine(
                self._identity,
                parts.layout,
                _kv_cache(parts.layout, memory),
                KV,
                [memory],
                [self._worker.incarnation],
            ),
            config.lease_s,
            config.queue_timeout_s,
            self._peers(self._identity, self._control_loop),
            listener.send,
            self.events.put,
            time.monotonic,
        )

    @property
    def incarnation(self) -> str:
        return self._identity.incarnation

    @property
    def faults(self) -> int:
        """How many errors were caught where nobody expects any."""
        return self._control.faults + self._plane.faults + self._announcer.faults

    def start(self, device: torch.device) -> None:
        if device.type == "cuda":
            current = torch.cuda.current_device()
            self._transfer_loop.call(lambda: torch.cuda.set_device(current))
        self._control_loop.start()
        self._transfer_loop.start()
        self._transfer_loop.call(
            partial(self._announcer.connect, self.address, self._identity.incarnation)
        )

    def close(self) -> None:
        self._transfer_loop.call(self._plane.close)
        self._transfer_loop.call(self._announcer.close)
        self._transfer_loop.close()
        self._control_loop.call(self._control.shut_down)
        self._control_loop.close()

    def on_control(self, function: Callable[[ControlPlane], None]) -> None:
        """Run something on the control thread, soon."""
        self._control_loop.call(lambda: function(self._control))

    def on_transfer(self, function: Callable[[TransferPlane], None]) -> None:
        """Run something on the transfer thread, soon."""
        self._transfer_loop.call(lambda: function(self._plane))

    def lend(self) -> None:
        """Peers may read from here, from now on."""
        self.on_transfer(lambda plane: plane.set_lending(True))
        self._transfer_loop.call(lambda: self._announcer.set_lending(True))

    def announce(self, step: int, num_layers: int, is_reached: Callable[[], bool]) -> None:
        """So many layers of a step are written once ``is_reached`` says so."""
        announcement = Announcement(step, (tuple(range(1, len(self.layout.layers) + 1)),))
        mark = Mark(announcement, num_layers, is_reached)
        self._transfer_loop.call(lambda: self._announcer.add(mark))

    def event(self, kind: type[Event]) -> Event:
        """Return the next event, which must be of a kind.

        Raises:
            RuntimeError: it is another one. queue.Empty: there is none for long.
        """
        event = self.events.get(timeout=PATIENCE_S)
        if not isinstance(event, kind):
            raise RuntimeError(f"{kind.__name__} was awaited, not {event}")
        return event

    # --- inside ------------------------------------------------------------------------------

    def _receive(self, identity: bytes, frames: list[bytes]) -> None:
        self._control.receive(identity, frames)

    def _transfer_turn(self) -> float | None:
        waits = self._announcer.turn(), self._plane.turn()
        return min((wait for wait in waits if wait is not None), default=None)

    def _peers(self, identity: Identity, loop: Loop) -> partial[PeerTable]:
        def connect(address: Address, on_message: Callable[[list[bytes]], None]) -> Dealer:
            return Dealer(loop, address, None, on_message)

        return partial(PeerTable, identity, self._config.peer_timeout_s, connect, time.monotonic)

    def _make_transfer(self, parts: RankParts) -> RankMemory:
        config, layout = self._config, parts.layout
        ordered = [parts.caches[layer] for layer in layout.layers]
        slabs = _slabs(config, layout, ordered, parts.allocate)
        memory = regions.register(
            parts.transport, parts.caches, layout.layers, [slabs.outgoing, slabs.incoming]
        )
        digest = partial(kv_digest, layout.groups, ordered)
        peers = self._peers(self._worker, self._transfer_loop)
        self._announcer = Announcer(
            self._worker.incarnation, 0, digest, slabs.packer(),
            lambda address, on_message: Dealer(self._transfer_loop, address, None, on_message),
        )  # fmt: skip
        incoming = slabs.for_reads(config)
        rank = Rank(
            LocalRank(0, layout, _kv_cache(layout, memory), memory.regions, incoming),
            parts.transport,
            Timeouts(config.queue_timeout_s, config.fetch_timeout_s, config.fetch_timeout_s),
            time.monotonic,
            digest if config.integrity == "digest" else None,
        )
        self._plane = TransferPlane(rank, peers, self.results.put)
        return memory


def _kv_cache(layout: RankLayout, memory: RankMemory) -> EngineKvCache:
    return EngineKvCache.seen_by_rank(layout, memory, RankPlace(0, 0, 1, 1))


def _slabs(
    config: PdConfig, layout: RankLayout, caches: Sequence[torch.Tensor], allocate: Allocate
) -> Slabs:
    """As ``Slabs.allocate``, in memory that another process can open."""
    pieces = Pieces(layout, tuple(map(regions.region_of, layout.layers, caches)))
    halves = [allocate(config.staging_bytes // 2) for _ in range(2)]
    spans = [Span(half.data_ptr(), len(half)) for half in halves]
    coder = BlockCoder(layout, pieces, caches, *halves)
    return Slabs(pieces, coder, *spans, device=caches[0].device.type)


def config_of(codec: Codec, packing: str) -> PdConfig:
    """Return options that check digests, and give up soon."""
    return PdConfig.parse(
        {
            "codec": codec.value, "packing": packing, "integrity": "digest",
            "staging_bytes": 8 * 2**20, "fetch_timeout_s": PATIENCE_S,
            "queue_timeout_s": PATIENCE_S, "lease_s": PATIENCE_S,
        },
        {},
    )  # fmt: skip
