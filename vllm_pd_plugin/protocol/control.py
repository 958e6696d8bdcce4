"""The control plane of one engine: it lives beside the scheduler and knows nothing of vLLM.

A ``ControlPlane`` is owned by the engine's control thread. As a producer it answers consumers of
what is exported, and keeps the leases; as a consumer it asks for offers and keeps its handoffs
alive. What the scheduler must know comes out as events.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec

from vllm_pd_plugin.containment import LOOK_AGAIN_S, Containment
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.ids import HandoffId, Incarnation, RequestId, Source
from vllm_pd_plugin.mapping.kv_cache import EngineKvCache
from vllm_pd_plugin.mapping.match import match
from vllm_pd_plugin.memory.identity import KvIdentity, difference
from vllm_pd_plugin.memory.layout import BlockTables, RankLayout, RankMemory
from vllm_pd_plugin.protocol import framing, wire
from vllm_pd_plugin.protocol.answering import Answering
from vllm_pd_plugin.protocol.events import Abandoned, Event, Nudged, Released
from vllm_pd_plugin.protocol.exports import ExportTable
from vllm_pd_plugin.protocol.outbox import Answer, Outbox, ReturnAddress
from vllm_pd_plugin.protocol.peers import Identity, MakePeers
from vllm_pd_plugin.protocol.steps import Advance
from vllm_pd_plugin.protocol.wanting import Wanting

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class LocalEngine:
    """What this engine is to its peers.

    layout: that of one of its ranks.
    kv: what its KV is, for now.
    allow_fp8: see ``PdConfig``.
    workers: incarnations of its own worker ranks, who announce what they have written.
    """

    identity: Identity
    layout: RankLayout
    kv_cache: EngineKvCache
    kv: KvIdentity
    ranks: Sequence[RankMemory]
    workers: Collection[Incarnation]
    allow_fp8: bool = False


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
        self._contain = Containment("control")
        self._incarnation = local.identity.incarnation
        self._outbox = Outbox(self._incarnation, answer, self._contain)
        self._welcome = wire.Welcome(
            local.identity.engine_id, local.kv_cache, local.kv, 0, tuple(local.ranks), lease_s
        )
        self._encoded_welcome = framing.Encoded.of(self._welcome)
        self._workers = frozenset(local.workers)
        self._emit = emit
        self._clock = clock
        self._exports = ExportTable(
            local.layout,
            local.kv_cache,
            lease_s,
            lambda request_id, state: emit(Released(request_id, state)),
            lambda request_id, state: emit(Abandoned(request_id, state)),
            lambda handoff_id, rank: self._unstage(rank, wire.Unstage(handoff_id)),
            clock,
        )
        self._answering = Answering(self._exports)
        self._allow_fp8 = local.allow_fp8
        self._wanting = Wanting(make_peers, self._check_fit, queue_timeout_s, emit, clock)
        self._worker_links: dict[int, ReturnAddress] = {}
        self._dropped_requests = 0

    @property
    def control_bytes(self) -> int:
        """Of all messages to and from producers."""
        return self._wanting.num_bytes

    @property
    def dropped_messages(self) -> int:
        return self._dropped_requests + self._wanting.dropped_messages

    @property
    def faults(self) -> int:
        """How many were caught; see ``Containment``."""
        return self._contain.faults + self._exports.faults + self._wanting.faults

    # --- what this engine's KV is ------------------------------------------------------------

    def identify(self, kv: KvIdentity) -> None:
        """More is known of what this engine's KV is; peers that do not fit are lost."""
        revision = self._exports.revision = self._welcome.revision + 1
        self._welcome = msgspec.structs.replace(self._welcome, kv=kv, revision=revision)
        self._encoded_welcome = framing.Encoded.of(self._welcome)
        self._wanting.look_again()

    def void(self, kv: KvIdentity) -> None:
        """This engine's KV is another from now on: nothing that has begun is good any more."""
        self._exports.void()
        text = "this engine's KV is another since: its weights were changed, or its cache was reset"
        self._wanting.give_up_all(Reason.KV_CHANGED, text)
        self.identify(kv)

    def _check_fit(self, welcome: wire.Welcome) -> None:
        """Refuse a peer whose KV is not what ours is. Raises PeerError."""
        match(welcome.kv_cache, self._welcome.kv_cache, self._allow_fp8)
        if found := difference(self._welcome.kv, welcome.kv):
            raise PeerError(Reason.PEER_INCOMPATIBLE, f"the peer's KV is another: {found}")

    # --- as a producer ---------------------------------------------------------------------

    def enqueue(
        self, handoff_id: HandoffId, request_id: RequestId, num_tokens: int, prompt: bytes
    ) -> None:
        """A request whose KV is to be handed off has arrived."""
        self._exports.enqueue(handoff_id, request_id, num_tokens, prompt)

    def open(self, handoff_id: HandoffId) -> None:
        """It is scheduled for the first time."""
        self._tell(self._exports.open(handoff_id))

    def advance(self, step: int, advances: Sequence[Advance]) -> None:
        """An engine step begins that computes some of these handoffs' KV."""
        self._exports.advance(step, advances)

    def withdraw(self, handoff_id: HandoffId, epoch: int) -> None:
        """Its request was preempted; what was announced is no longer true."""
        self._tell(self._exports.withdraw(handoff_id, epoch))

    def seal(
        self,
        handoff_id: HandoffId,
        request_id: RequestId,
        num_tokens: int,
        blocks: BlockTables,
        sampled: int | None = None,
    ) -> None:
        """Its KV is final; the blocks are held until a ``Released`` event."""
        self._tell(self._exports.seal(handoff_id, request_id, num_tokens, blocks, sampled))

    def drop(self, handoff_id: HandoffId) -> None:
        """It ended without KV to hand off."""
        self._tell(self._exports.drop(handoff_id))

    def receive(self, identity: bytes, frames: list[bytes]) -> None:
        """Handle a message from a consumer."""
        self._receive(identity, frames)
        self.send()

    def send(self) -> None:
        """Send what has gathered since the last turn."""
        self._outbox.flush()

    def _receive(self, identity: bytes, frames: list[bytes]) -> None:
        try:
            header, message = framing.decode(frames)
        except framing.VersionError as error:
            # Answered in our own version: the header tells the peer what is wrong.
            logger.warning("refused a peer: %s", error)
            self._dropped_requests += 1
            nobody = ReturnAddress(identity, Incarnation(""), framing.PROTOCOL_VERSION)
            self._reply(nobody, wire.Alive({}))
            return
        except framing.WireError as error:
            logger.warning("dropped a message: %s", error)
            self._dropped_requests += 1
            return
        who = ReturnAddress(identity, header.sender, header.version)
        reply = self._respond(who, header, message)
        if reply is not None:
            self._reply(who, reply)

    def _respond(
        self, who: ReturnAddress, header: framing.Header, message: wire.Message
    ) -> wire.Reply | None:
        if isinstance(message, wire.Hello):
            version = min(max(message.newest, header.version), framing.PROTOCOL_VERSION)
            self._outbox.add(who._replace(version=version), self._encoded_welcome)
            return None
        if header.target != self._incarnation:
            return wire.Alive({})  # its header says who is here now
        match message:
            case wire.Want(handoff_id):
                return self._answering.want(handoff_id, who)
            case wire.Subscribe():
                return self._answering.subscribe(message, who)
            case wire.Heartbeat(handoff_ids):
                self._tell(self._answering.heartbeat(handoff_ids, who))
                return None
            case wire.Commit():
                return self._answering.commit(message)
            case wire.Check():
                return self._ask_worker(message.source_rank, self._answering.check(message))
            case wire.Pack() | wire.Gather():
                stage = self._answering.pack(message, who.incarnation)
                return self._ask_worker(message.source_rank, stage)
            case wire.Unpacked(handoff_id, rank, source_rank, number):
                unstage = wire.Unstage(handoff_id, who.incarnation, rank, number)
                self._unstage(source_rank, unstage)
                return None
            case wire.Cancel(handoff_id):
                self._answering.cancel(handoff_id)
                return None
            case wire.Announce(step, rank, num_layers) if header.sender in self._workers:
                self._worker_links[rank] = who
                self._tell(self._exports.announce(step, rank, num_layers))
                return None
            case wire.Examined(check, digest) if header.sender in self._workers:
                self._tell(self._answering.examined(check, digest))
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
        answer = self._answering.staged(staged)
        if answer is not None:
            self._reply(*answer)
        elif staged.packed is not None:
            number = staged.packed.number
            unstage = wire.Unstage(staged.handoff_id, staged.consumer, staged.rank, number)
            self._unstage(staged.source_rank, unstage)

    def _unstage(self, rank: int, unstage: wire.Unstage) -> None:
        if worker := self._worker_links.get(rank):
            self._reply(worker, unstage)

    def _tell(self, answers: Iterable[Answer]) -> None:
        for who, message in answers:
            self._reply(who, message)

    # --- as a consumer -------------------------------------------------------------------------

    def want(self, request_id: RequestId, source: Source) -> None:
        """Ask for a handoff; an ``Offered`` or ``Lost`` event follows."""
        self._wanting.want(request_id, source)

    def allocated(self, request_id: RequestId) -> None:
        """The request has its blocks; its workers fetch."""
        self._wanting.allocated(request_id)

    def close(self, request_id: RequestId, cancel: bool) -> None:
        """The handoff is over for a request; ``cancel`` tells the producer to let go."""
        self._wanting.close(request_id, cancel)

    # --- the thread's -------------------------------------------------------------------------

    def turn(self) -> float | None:
        """Do what is due, and send what has gathered; return for how many seconds nothing needs to
        be done."""
        again = self._clock() + LOOK_AGAIN_S
        due = (
            self._contain.run("leases", self._exports.tick, again),
            self._contain.run("what is wanted", self._wanting.turn, again),
        )
        self.send()
        now = self._clock()
        waits = [max(0.0, at - now) for at in due if at is not None]
        return min(waits) if waits else None

    def shut_down(self) -> None:
        self._wanting.shut_down()

    def _reply(self, who: ReturnAddress, message: wire.Reply) -> None:
        self._outbox.add(who, message)


CallControl = Callable[[Callable[[ControlPlane], None]], None]
"""Runs a function on the control thread, soon; for other threads of the process."""
