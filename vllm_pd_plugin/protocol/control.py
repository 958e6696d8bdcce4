"""The control plane of one engine: it lives beside the scheduler and knows nothing of vLLM.

A ``ControlPlane`` is owned by the engine's control thread. As a producer it answers consumers
and keeps the leases; as a consumer it asks for offers and keeps its handoffs alive. What the
scheduler must know comes out as events.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Sequence

from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.ids import Address, HandoffId, Incarnation, RequestId, Source
from vllm_pd_plugin.memory.layout import BlockTables, EngineLayout, RankMemory
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.handoffs import (
    Advance,
    Answer,
    ProducerState,
    ProducerTable,
    ReturnAddress,
)
from vllm_pd_plugin.protocol.peers import Identity, MakePeers, Peer
from vllm_pd_plugin.protocol.wants import ConsumerTable

logger = logging.getLogger(__name__)

_HEARTBEATS_PER_LEASE = 4
_MAX_HEARTBEAT_INTERVAL_S = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Offered:
    """A producer offers what this engine wants; ``source`` names its incarnation."""

    request_id: RequestId
    source: Source
    num_tokens: int
    prompt: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Lost:
    """What this engine wants cannot be had."""

    request_id: RequestId
    reason: Reason
    message: str


@dataclasses.dataclass(frozen=True, slots=True)
class Released:
    """A sealed handoff of this engine has ended; its blocks may be freed."""

    request_id: RequestId
    state: ProducerState


@dataclasses.dataclass(frozen=True, slots=True)
class Abandoned:
    """Nobody wants what a request of this engine is computing."""

    request_id: RequestId
    state: ProducerState


@dataclasses.dataclass(frozen=True, slots=True)
class Nudged:
    """A worker of this engine has a result."""


Event = Offered | Lost | Released | Abandoned | Nudged


@dataclasses.dataclass(frozen=True, slots=True)
class LocalEngine:
    """What this engine is to its peers.

    workers: incarnations of its own worker ranks, who announce what they have written.
    """

    identity: Identity
    layout: EngineLayout
    ranks: Sequence[RankMemory]
    workers: Collection[Incarnation]


class ControlPlane:
    """Both halves of an engine's control channel.

    answer(who, frames): sends to a consumer that has spoken to us.
    emit: takes each event.
    """

    def __init__(
        self,
        local: LocalEngine,
        lease_s: float,
        queue_timeout_s: float,
        make_peers: MakePeers,
        answer: Callable[[bytes, list[bytes]], None],
        emit: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:
        self._incarnation = local.identity.incarnation
        self._welcome = wire.Welcome(
            local.identity.engine_id, local.layout, tuple(local.ranks), lease_s
        )
        self._workers = frozenset(local.workers)
        self._queue_timeout_s = queue_timeout_s
        self._answer = answer
        self._emit = emit
        self._clock = clock
        self._producing = ProducerTable(
            local.layout,
            lease_s,
            lambda request_id, state: emit(Released(request_id, state)),
            lambda request_id, state: emit(Abandoned(request_id, state)),
            self._unstage,
            clock,
        )
        self._consuming = ConsumerTable()
        self._peers = make_peers(self)
        self._next_heartbeat: dict[Address, float] = {}
        self._cancels: list[Source] = []
        self._worker_links: dict[int, ReturnAddress] = {}
        self._dropped_requests = 0

    @property
    def control_bytes(self) -> int:
        """Of all messages to and from producers."""
        return self._peers.num_bytes

    @property
    def dropped_messages(self) -> int:
        return self._dropped_requests + self._peers.dropped_messages

    # --- as a producer ---------------------------------------------------------------------

    def enqueue(
        self, handoff_id: HandoffId, request_id: RequestId, num_tokens: int, prompt: bytes
    ) -> None:
        """A request whose KV is to be handed off has arrived."""
        self._producing.enqueue(handoff_id, request_id, num_tokens, prompt)

    def open(self, handoff_id: HandoffId) -> None:
        """It is scheduled for the first time."""
        self._tell(self._producing.open(handoff_id))

    def advance(self, step: int, advances: Sequence[Advance]) -> None:
        """An engine step begins that computes some of these handoffs' KV."""
        self._producing.advance(step, advances)

    def withdraw(self, handoff_id: HandoffId, epoch: int) -> None:
        """Its request was preempted; what was announced is no longer true."""
        self._tell(self._producing.withdraw(handoff_id, epoch))

    def seal(
        self,
        handoff_id: HandoffId,
        num_tokens: int,
        blocks: BlockTables,
        sampled: int | None = None,
    ) -> None:
        """Its KV is final; the blocks are held until a ``Released`` event."""
        self._tell(self._producing.seal(handoff_id, num_tokens, blocks, sampled))

    def drop(self, handoff_id: HandoffId) -> None:
        """It ended without KV to hand off."""
        self._tell(self._producing.drop(handoff_id))

    def receive(self, identity: bytes, frames: list[bytes]) -> None:
        """Handle a message from a consumer."""
        try:
            header, message = wire.decode(frames)
        except wire.VersionError as error:
            # Answered in our own version: the header tells the peer what is wrong.
            logger.warning("refused a peer: %s", error)
            self._dropped_requests += 1
            self._reply((identity, Incarnation("")), wire.Alive({}))
            return
        except wire.WireError as error:
            logger.warning("dropped a message: %s", error)
            self._dropped_requests += 1
            return
        who = (identity, header.sender)
        reply = self._respond(who, header, message)
        if reply is not None:
            self._reply(who, reply)

    def _respond(
        self, who: ReturnAddress, header: wire.Header, message: wire.Message
    ) -> wire.Reply | None:
        if isinstance(message, wire.Hello):
            return self._welcome
        if header.target != self._incarnation:
            return wire.Alive({})  # its header says who is here now
        match message:
            case wire.Want(handoff_id):
                return self._producing.want(handoff_id, who)
            case wire.Subscribe(handoff_id, rank):
                return self._producing.subscribe(handoff_id, rank, who)
            case wire.Heartbeat(handoff_ids):
                self._tell(self._producing.heartbeat(handoff_ids, who))
                return None
            case wire.Commit():
                return self._producing.commit(message)
            case wire.Check():
                return self._ask_worker(message.rank, self._producing.check(message))
            case wire.Pack():
                return self._ask_worker(message.rank, self._producing.pack(message))
            case wire.Unpacked(handoff_id, rank, number):
                self._unstage(handoff_id, rank, number)
                return None
            case wire.Cancel(handoff_id):
                self._producing.cancel(handoff_id)
                return None
            case wire.Announce(step, rank, num_layers) if header.sender in self._workers:
                self._worker_links[rank] = who
                self._tell(self._producing.announce(step, rank, num_layers))
                return None
            case wire.Examined(check, digest) if header.sender in self._workers:
                self._tell(self._producing.examined(check, digest))
                return None
            case wire.Staged() if header.sender in self._workers:
                self._staged(message)
                return None
            case wire.Nudge() if header.sender in self._workers:
                self._emit(Nudged())
                return None
            case _:
                self._dropped_requests += 1
                return None

    def _ask_worker(self, rank: int, answer: wire.Reply) -> wire.Reply | None:
        """Pass on what is meant for the rank here; its answer is passed on when it comes."""
        if not isinstance(answer, wire.Examine | wire.Stage):
            return answer
        worker = self._worker_links.get(rank)
        if worker is None:  # all its announcements were lost
            asked = answer.check if isinstance(answer, wire.Examine) else answer.pack
            return wire.Refuse(asked.handoff_id, Reason.INTERNAL)
        self._reply(worker, answer)
        return None

    def _staged(self, staged: wire.Staged) -> None:
        answer = self._producing.staged(staged)
        if answer is not None:
            self._reply(*answer)
        elif staged.packed is not None:
            self._unstage(staged.handoff_id, staged.rank, staged.packed.number)

    def _unstage(self, handoff_id: HandoffId, rank: int, number: int | None = None) -> None:
        if worker := self._worker_links.get(rank):
            self._reply(worker, wire.Unstage(handoff_id, number))

    def _tell(self, answers: Iterable[Answer]) -> None:
        for who, message in answers:
            self._reply(who, message)

    # --- as a consumer ---------------------------------------------------------------------

    def want(self, request_id: RequestId, source: Source) -> None:
        """Ask for a handoff; an ``Offered`` or ``Lost`` event follows."""
        deadline = self._clock() + self._queue_timeout_s
        wanted = self._consuming.want(request_id, source, deadline)
        if wanted is None:
            text = "another request already fetches this handoff"
            self._emit(Lost(request_id, Reason.BAD_PARAMS, text))
            return
        peer = self._peers.get(source.address)
        if peer is None:
            return
        if source.incarnation in (None, peer.incarnation):
            self._ask(peer)
        else:
            self._peers.refresh(source.address)

    def allocated(self, request_id: RequestId) -> None:
        """The request has its blocks; its workers fetch."""
        self._consuming.allocated(request_id)

    def close(self, request_id: RequestId, cancel: bool) -> None:
        """The handoff is over for a request; ``cancel`` tells the producer to let go."""
        wanted = self._consuming.close(request_id)
        if wanted is None or not cancel:
            return
        peer = self._peers.get(wanted.source.address)
        if peer is not None and wanted.source.incarnation in (None, peer.incarnation):
            self._cancel(peer, wanted.source)
            return
        self._cancels.append(wanted.source)
        if peer is not None:
            self._peers.refresh(wanted.source.address)

    def turn(self) -> float | None:
        """Do what is due; return for how many seconds nothing needs to be done."""
        due = [self._producing.tick(), self._peers.tick(), self._beat(), self._give_up()]
        now = self._clock()
        waits = [max(0.0, at - now) for at in due if at is not None]
        return min(waits) if waits else None

    def shut_down(self) -> None:
        self._peers.close()

    def _ask(self, peer: Peer) -> None:
        for wanted in self._consuming.at(peer.address):
            if wanted.asked:
                continue
            if wanted.source.incarnation is None:
                wanted.source = dataclasses.replace(wanted.source, incarnation=peer.incarnation)
            if wanted.source.incarnation != peer.incarnation:
                self._lose(wanted.request_id, Reason.PEER_RESTARTED, "the producer was restarted")
                continue
            wanted.asked = True
            # No answer is due before the producer has its request; heartbeats tell that it lives.
            want = wire.Want(wanted.source.handoff_id)
            self._peers.send(peer, want, expects_answer=False)

    def _give_up(self) -> float | None:
        """End what has waited too long for its KV or for blocks; return when to look again."""
        for wanted in self._consuming.overdue(self._clock()):
            missing = "free blocks here" if wanted.offered else "offer from the producer"
            text = f"no {missing} within {self._queue_timeout_s:g} s"
            self.close(wanted.request_id, cancel=True)
            self._emit(Lost(wanted.request_id, Reason.QUEUE_TIMEOUT, text))
        return self._consuming.next_deadline()

    def _beat(self) -> float | None:
        """Send the heartbeats that are due; return when the next one is."""
        now = self._clock()
        addresses = self._consuming.addresses()
        self._next_heartbeat = {a: t for a, t in self._next_heartbeat.items() if a in addresses}
        for address in addresses:
            peer = self._peers.get(address)
            if peer is None:
                continue
            interval = min(peer.welcome.lease_s / _HEARTBEATS_PER_LEASE, _MAX_HEARTBEAT_INTERVAL_S)
            due = self._next_heartbeat.setdefault(address, now + interval)
            if now >= due:
                held = tuple(w.source.handoff_id for w in self._consuming.at(address) if w.asked)
                if held:
                    self._peers.send(peer, wire.Heartbeat(held))
                self._next_heartbeat[address] = now + interval
        return min(self._next_heartbeat.values(), default=None)

    def _cancel(self, peer: Peer, source: Source) -> None:
        if source.incarnation in (None, peer.incarnation):
            self._peers.send(peer, wire.Cancel(source.handoff_id), expects_answer=False)

    def peer_ready(self, address: Address, peer: Peer) -> None:
        for source in self._cancels:
            if source.address == address:
                self._cancel(peer, source)
        self._forget_cancels(address)
        self._ask(peer)

    def _forget_cancels(self, address: Address) -> None:
        self._cancels = [source for source in self._cancels if source.address != address]

    def peer_lost(self, address: Address, error: PeerError) -> None:
        restarted = error.reason is Reason.PEER_RESTARTED
        if not restarted:
            self._forget_cancels(address)
        waits = any(source.address == address for source in self._cancels)
        for wanted in self._consuming.at(address):
            if restarted and (not wanted.asked or wanted.ask_again()):
                waits = True
            else:
                self._lose(wanted.request_id, error.reason, str(error))
        if restarted and waits:
            self._peers.get(address)  # something is meant for the new incarnation

    def peer_replied(self, peer: Peer, message: wire.Message) -> None:
        match message:
            case wire.Offer(handoff_id, num_tokens, prompt):
                if wanted := self._consuming.offered(handoff_id, peer.incarnation):
                    self._emit(Offered(wanted.request_id, wanted.source, num_tokens, prompt))
            case wire.Refuse(handoff_id, reason):
                if wanted := self._consuming.get(handoff_id):
                    self._lose(wanted.request_id, reason, f"the producer refused: {reason}")
            case wire.Alive(lost):
                for handoff_id, reason in lost.items():
                    if wanted := self._consuming.get(handoff_id):
                        # It may have begun to compute for us all the same.
                        self._cancel(peer, wanted.source)
                        text = "the producer no longer holds the handoff"
                        self._lose(wanted.request_id, reason, text)

    def _lose(self, request_id: RequestId, reason: Reason, message: str) -> None:
        self._consuming.close(request_id)
        self._emit(Lost(request_id, reason, message))

    def _reply(self, who: ReturnAddress, message: wire.Reply) -> None:
        identity, incarnation = who
        self._answer(identity, wire.encode(message, self._incarnation, incarnation))


CallControl = Callable[[Callable[[ControlPlane], None]], None]
"""Runs a function on the control thread, soon; for other threads of the process."""
