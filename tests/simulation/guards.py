"""The guards of the protocol, and how each is taken out: without it, some seed fails."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import msgspec

from vllm_pd_plugin.edge.consumer_requests import ConsumingRequests
from vllm_pd_plugin.edge.producer_requests import ProducingRequests
from vllm_pd_plugin.edge.scheduler import SchedulerSide
from vllm_pd_plugin.protocol import framing, wire
from vllm_pd_plugin.protocol.answering import Answering
from vllm_pd_plugin.protocol.control import ControlPlane
from vllm_pd_plugin.protocol.export import Export
from vllm_pd_plugin.protocol.export_states import ExportEvent
from vllm_pd_plugin.protocol.exports import ExportTable
from vllm_pd_plugin.protocol.peers import PeerTable
from vllm_pd_plugin.protocol.wanting import Wanting
from vllm_pd_plugin.protocol.wants import ConsumerTable
from vllm_pd_plugin.simulation.links import SimulatedLoop
from vllm_pd_plugin.transfer.peer_reading import PeerReading
from vllm_pd_plugin.transfer.peer_reads import PeerReads
from vllm_pd_plugin.transfer.peer_source import PeerSource
from vllm_pd_plugin.transfer.plane import TransferPlane
from vllm_pd_plugin.transfer.states import FetchEvent, FetchState
from vllm_pd_plugin.transfer.stretches import Stretches


def _without_commit() -> None:
    """What was read is used, whatever has become of the blocks."""

    def commit(self: Any, reads: Any, event: Any) -> None:
        self._follow(event)
        self._end(FetchEvent.COMMITTED, None)

    _put(PeerReading, "_commit", commit)


def _without_epoch() -> None:
    """A commit of an earlier epoch is granted."""

    def of_epoch(self: Any, question: Any) -> Any:
        return self._exports.live(question.handoff_id)

    _put(Answering, "_of_epoch", of_epoch)


def _without_lease() -> None:
    """Silence ends nothing."""
    _put(ExportTable, "tick", _nothing)


def _without_incarnation() -> None:
    """Whoever answers at an address is taken for who was there before."""
    receive, respond = PeerTable._receive, ControlPlane._respond

    def take(self: Any, address: Any, frames: Any) -> None:
        connection = self._connections.get(address)
        peer = None if connection is None else connection.peer
        if peer is not None:
            frames = _as_from(peer.incarnation, self._identity.incarnation, frames)
        receive(self, address, frames)

    def answer(self: Any, who: Any, header: Any, message: Any) -> Any:
        header = _with(header, target=self._incarnation)
        return respond(self, who, header, message)

    meet, ready = PeerSource.meet, PeerSource.peer_ready

    def begin(self: Any, reading: Any) -> None:
        connection = self._peers._connections.get(reading.segment.source.address)
        if connection is not None and connection.peer is not None:
            _bind(reading.segment, connection.peer.incarnation)
        meet(self, reading)

    def found(self: Any, address: Any, peer: Any) -> None:
        for reading in self._at(address):
            _bind(reading.segment, peer.incarnation)
        ready(self, address, peer)

    _put(PeerTable, "_receive", take)
    _put(ControlPlane, "_respond", answer)
    _put(PeerSource, "meet", begin)
    _put(PeerSource, "peer_ready", found)


def _without_fingerprint() -> None:
    """Any handoff's prompt is taken for that of the request."""
    offered = ConsumingRequests.offered

    def take(self: Any, offer: Any) -> None:
        consuming = self._open.get(offer.request_id)
        if consuming is not None and consuming.prompt is not None:
            own = consuming.prompt.of(offer.num_tokens)
            offer = dataclasses.replace(offer, prompt=own)
        offered(self, offer)

    _put(ConsumingRequests, "offered", take)


def _without_drain() -> None:
    """A fetch that has failed is reported while its reads may still write."""
    _put(PeerReads, "writes", property(lambda self: False))


def _without_order_of_reads() -> None:
    """Reads of a new epoch begin while those of an earlier one may still write."""
    go_on = PeerReads.go_on

    def at_once(self: Any) -> None:
        void = [read for read in self._reads if read.is_void]
        for read in void:
            self._reads.remove(read)
        go_on(self)
        self._reads.extend(void)

    _put(PeerReads, "go_on", at_once)


def _without_closing() -> None:
    """A read that has failed counts as ended; its connection is kept."""

    def disconnect(self: Any, reads: Any, why: str) -> None:
        reads.disconnected()
        self._end(FetchEvent.READS_ENDED, self.reason)

    _put(PeerReading, "_disconnect", disconnect)


def _without_calls_first() -> None:
    """A message is handled before what other threads have said until then."""
    _put(SimulatedLoop, "before_message", _nothing)
    go_round = SimulatedLoop._go_round

    def messages_first(self: Any, number: int) -> None:
        if number == self._round and not self._is_closed:
            while self._inbox:
                self.contain.run("a message", self._inbox.popleft(), None)
        go_round(self, number)

    _put(SimulatedLoop, "_go_round", messages_first)


def _without_withdrawal() -> None:
    """A preemption is not told of."""
    _put(ProducingRequests, "_withdraw", _nothing)


def _without_drop() -> None:
    """The end of a request without KV is not told of."""
    _put(ControlPlane, "drop", _nothing)


def _without_holding() -> None:
    """Blocks are freed when their request ends, although they were offered."""
    finish = SchedulerSide.finish

    def free(self: Any, request: Any, blocks: Any) -> Any:
        _, params = finish(self, request, blocks)
        self._producing._sealed.discard(request.request_id)
        return False, params

    _put(SchedulerSide, "finish", free)


def _without_windows() -> None:
    """A sliding window that moves on ends no export."""
    _put(Export, "keeps", lambda self, groups, blocks: True)


def _without_announcements() -> None:
    """KV counts as written when a step begins that will write it."""
    advance = ExportTable.advance

    def at_once(self: Any, step: int, advances: Any) -> None:
        advance(self, step, advances)
        for each in advances:
            if (export := self._growing(each)) is not None:
                for rank in range(self.num_ranks):
                    known = export.written.get(rank, wire.Written()).base_tokens
                    tokens = max(each.num_tokens, known)
                    layers = self._num_layers[rank // self.tensor_parallel_size]
                    export.written[rank] = wire.Written(tokens, tokens, layers)

    _put(ExportTable, "advance", at_once)


def _without_own_workers() -> None:
    """Anybody may say what this engine's workers have written."""

    class _Everybody:
        def __contains__(self, incarnation: object) -> bool:
            return True

    init = ControlPlane.__init__

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self._workers = _Everybody()

    _put(ControlPlane, "__init__", begin)


def _without_void() -> None:
    """KV of a producer's earlier weights is handed off."""
    _put(ExportTable, "void", _nothing)


def _without_kv_changed() -> None:
    """A consumer whose weights have changed goes on fetching for the earlier ones."""
    _put(Wanting, "give_up_all", _nothing)


def _without_revision() -> None:
    """An offer counts, whatever KV its producer has since it introduced itself."""
    offered = Wanting._offered

    def take(self: Any, peer: Any, offer: Any) -> None:
        offered(self, peer, _with(offer, revision=peer.welcome.revision))

    _put(Wanting, "_offered", take)


def _without_identity() -> None:
    """Nobody asks what a peer's KV is."""
    _put(ControlPlane, "_check_fit", _nothing)


def _without_vouch() -> None:
    """What has arrived is kept when a fetch fails, whether or not it was valid."""

    def arrived(self: Any) -> int:
        if self.state is FetchState.DONE:
            return int(self.segment.tokens.stop)
        reads = self._reads or self._earlier.reads
        return int(reads.arrived_tokens) if reads is not None else 0

    _put(PeerReading, "valid_tokens", property(arrived))


def _without_gaps() -> None:
    """A table goes on where the last message has left it, whatever was lost between them."""
    extend = Stretches._extend

    def go_on(self: Any, slices: Any) -> bool:
        closed = [
            _with(part, start=min(part.start, len(table)))
            for part, table in zip(slices, self._tables, strict=True)
        ]
        return extend(self, closed)

    _put(Stretches, "_extend", go_on)


def _without_used_ids() -> None:
    """A handoff id that was used before is handed off again."""
    enqueue = ExportTable.enqueue

    def once_more(self: Any, handoff_id: Any, *args: Any) -> None:
        self.happen(handoff_id, ExportEvent.REPLACED)
        if self._absent.state_of(handoff_id).is_over:
            self._absent.take(handoff_id)
        enqueue(self, handoff_id, *args)

    _put(ExportTable, "enqueue", once_more)


def _without_queue_timeout() -> None:
    """Nothing that is wanted waits too long."""
    want = ConsumerTable.want

    def for_ever(self: Any, request_id: Any, source: Any, deadline: float) -> Any:
        return want(self, request_id, source, math.inf)

    _put(ConsumerTable, "want", for_ever)


def _without_peer_timeout() -> None:
    """No answer is waited for too long."""
    _put(PeerTable, "_expect", _nothing)


def _without_fetch_timeout() -> None:
    """No fetch takes too long."""

    def go_on(self: Any) -> None:
        self._deadline = math.inf

    _put(PeerReading, "_overdue", go_on)


def _without_cancel_of_fetches() -> None:
    """A fetch whose request has ended goes on."""
    _put(TransferPlane, "cancel", _nothing)


def _nothing(self: Any, *args: Any, **kwargs: Any) -> None:
    return None


def _put(owner: type, name: str, value: object) -> None:
    setattr(owner, name, value)


def _with(struct: Any, **changes: Any) -> Any:
    if isinstance(struct, msgspec.Struct):
        return msgspec.structs.replace(struct, **changes)
    if dataclasses.is_dataclass(struct):
        return dataclasses.replace(struct, **changes)  # type: ignore[type-var]
    return struct._replace(**changes)


def _bind(segment: Any, incarnation: Any) -> None:
    """Let a segment's source be another incarnation; whoever has the segment sees it."""
    source = dataclasses.replace(segment.source, incarnation=incarnation)
    object.__setattr__(segment, "source", source)


def _as_from(sender: Any, target: Any, frames: list[bytes]) -> list[bytes]:
    """Return a message as if somebody else had sent it."""
    header, message = framing.decode(frames)
    if isinstance(message, wire.Welcome):
        return frames
    return framing.encode(message, sender, target, header.version)


GUARDS: dict[str, Callable[[], None]] = {
    "commit": _without_commit,
    "epoch": _without_epoch,
    "lease": _without_lease,
    "incarnation": _without_incarnation,
    "fingerprint": _without_fingerprint,
    "drain": _without_drain,
    "order-of-reads": _without_order_of_reads,
    "closing": _without_closing,
    "calls-first": _without_calls_first,
    "withdrawal": _without_withdrawal,
    "drop": _without_drop,
    "holding": _without_holding,
    "windows": _without_windows,
    "announcements": _without_announcements,
    "own-workers": _without_own_workers,
    "void": _without_void,
    "kv-changed": _without_kv_changed,
    "revision": _without_revision,
    "identity": _without_identity,
    "vouch": _without_vouch,
    "gaps": _without_gaps,
    "used-ids": _without_used_ids,
    "queue-timeout": _without_queue_timeout,
    "peer-timeout": _without_peer_timeout,
    "fetch-timeout": _without_fetch_timeout,
    "cancel": _without_cancel_of_fetches,
}
