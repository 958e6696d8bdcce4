"""All handoffs that this engine produces; pure, with an injected clock.

Nothing here sends, waits or touches memory: the methods return what is to be sent, and the owner of
the table does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from vllm_pd_plugin.containment import LOOK_AGAIN_S, Containment
from vllm_pd_plugin.deadlines import Deadlines
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import HandoffId, Incarnation, RequestId
from vllm_pd_plugin.memory.layout import BlockTables, EngineLayout
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.handoff import (
    Advance,
    Answer,
    Endings,
    Produced,
    ProducerState,
    ReturnAddress,
    Steps,
    Subscriber,
    Written,
)

_MAX_EARLY = 10_000


class ProducerTable:
    """Every handoff that this engine produces.

    on_released(request_id, state): the blocks of a sealed handoff may be freed now.
    on_abandoned(request_id, state): nobody wants what this request is computing.
    on_unpacked(handoff_id, rank): nobody needs what a rank has packed of it.
    """

    def __init__(
        self,
        layout: EngineLayout,
        lease_s: float,
        on_released: Callable[[RequestId, ProducerState], None],
        on_abandoned: Callable[[RequestId, ProducerState], None],
        on_unpacked: Callable[[HandoffId, int], None],
        clock: Callable[[], float],
    ) -> None:
        self._contain = Containment("handoffs")
        self.revision = 0
        """Of what this engine's KV is; see ``wire.Welcome``."""
        self._num_layers = len(layout.layers)
        self._num_ranks = layout.tensor_parallel_size
        self._groups = layout.groups
        self._no_blocks: BlockTables = tuple(() for _ in layout.groups)
        self._lease_s = lease_s
        self._on_released = on_released
        self._on_abandoned = on_abandoned
        self._on_unpacked = on_unpacked
        self._clock = clock
        self._open: dict[HandoffId, Produced] = {}
        self._early: dict[HandoffId, ReturnAddress] = {}
        """Who wants what this engine has not heard of yet."""
        self._leases = Deadlines[HandoffId]()
        self._steps = Steps(self._num_ranks, self._num_layers)
        self._endings = Endings()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def faults(self) -> int:
        return self._contain.faults

    def void(self) -> None:
        """What this engine's KV is has changed: whatever was begun before is over, CANCELLED."""
        for handoff in list(self._open.values()):
            if not handoff.ending and handoff.state is not ProducerState.QUEUED:
                self._conclude(handoff, ProducerState.CANCELLED)

    def enqueue(
        self, handoff_id: HandoffId, request_id: RequestId, num_tokens: int, prompt: bytes
    ) -> None:
        """A request has arrived whose KV is to be handed off: QUEUED.

        Whoever sends requests chooses ids; one that was used before is not handed off again."""
        if used := self._open.get(handoff_id):
            self._end(used, ProducerState.CANCELLED)
        handoff = Produced(handoff_id, request_id, num_tokens, prompt, self._no_blocks)
        self._open[handoff_id] = handoff
        if early := self._early.pop(handoff_id, None):
            handoff.wanted_by = early
            self._renew(handoff)
        if (ending := self._endings.pop(handoff_id, None)) is not None:  # cancelled beforehand
            self._abandon(handoff, ending)

    def open(self, handoff_id: HandoffId) -> list[Answer]:
        """The request is scheduled: PRODUCING. Returns the offer, if a consumer waits for it."""
        handoff = self._open.get(handoff_id)
        if handoff is None or handoff.ending:
            return []
        handoff.state = ProducerState.PRODUCING
        if handoff.wanted_by is None:
            return []
        self._renew(handoff)
        return [(handoff.wanted_by, handoff.offer(self.revision))]

    def advance(self, step: int, advances: Sequence[Advance]) -> None:
        """An engine step begins that computes KV of these handoffs."""
        for advance in advances:
            if (handoff := self._open.get(advance.handoff_id)) and handoff.epoch == advance.epoch:
                self._set_blocks(handoff, advance.blocks)
        self._steps.begin(step, advances)

    def announce(self, step: int, rank: int, num_layers: int) -> list[Answer]:
        """One rank has written its first ``num_layers`` layers in a step. Returns the progress
        messages that follow."""
        answers: list[Answer] = []
        is_finished = num_layers >= self._num_layers
        for advance in self._steps.advances(step, num_layers):
            handoff = self._open.get(advance.handoff_id)
            if handoff is None or handoff.epoch != advance.epoch or handoff.is_sealed:
                continue
            tokens = advance.num_tokens
            base = tokens if is_finished else handoff.written.get(rank, Written()).base_tokens
            handoff.written[rank] = Written(base, tokens, num_layers)
            if (subscriber := handoff.subscribers.get(rank)) and not handoff.ending:
                answers.append((subscriber.who, handoff.tell(rank, subscriber)))
        if is_finished:
            self._steps.finish(step, rank)
        return answers

    def withdraw(self, handoff_id: HandoffId, epoch: int) -> list[Answer]:
        """The request was preempted: its blocks are no longer its own."""
        handoff = self._open.get(handoff_id)
        if handoff is None or handoff.is_sealed or epoch <= handoff.epoch:
            return []
        handoff.epoch, handoff.blocks = epoch, self._no_blocks
        handoff.written.clear()
        answers: list[Answer] = []
        for rank, subscriber in handoff.subscribers.items():
            subscriber.told = []
            answers.append((subscriber.who, handoff.tell(rank, subscriber)))
        return answers

    def seal(
        self,
        handoff_id: HandoffId,
        request_id: RequestId,
        num_tokens: int,
        blocks: BlockTables,
        sampled: int | None = None,
    ) -> list[Answer]:
        """All KV is final: SEALED. Returns what is to be told to whom."""
        handoff = self._open.get(handoff_id)
        if handoff is None or handoff.request_id != request_id:
            # It is over already, or another request has its id: nobody reads these blocks.
            self._on_released(request_id, self._endings.get(handoff_id, ProducerState.CANCELLED))
            return []
        handoff.sampled = sampled
        handoff.state = ProducerState.SEALED
        handoff.num_tokens = num_tokens
        self._set_blocks(handoff, blocks)
        self._renew(handoff)
        if handoff.ending:
            self._end(handoff, handoff.ending)
            return []
        return [
            (subscriber.who, handoff.tell(rank, subscriber))
            for rank, subscriber in handoff.subscribers.items()
        ]

    def drop(self, handoff_id: HandoffId) -> list[Answer]:
        """The request ended without KV to hand off: CANCELLED. Returns who is to be refused."""
        handoff = self._open.get(handoff_id)
        if handoff is None:
            return []
        if handoff.ending:
            self._end(handoff, handoff.ending)
            return []
        self._end(handoff, ProducerState.CANCELLED)
        waiting = [subscriber.who for subscriber in handoff.subscribers.values()]
        if handoff.wanted_by:
            waiting.append(handoff.wanted_by)
        return [(who, wire.Refuse(handoff_id, Reason.PRODUCER_ENDED)) for who in waiting]

    def want(self, handoff_id: HandoffId, who: ReturnAddress) -> wire.Offer | wire.Refuse | None:
        """Answer a consumer that asks for a handoff, and start its lease; None: not yet."""
        handoff = self._live(handoff_id)
        if isinstance(handoff, wire.Refuse):
            if handoff.reason is not Reason.UNKNOWN_HANDOFF or handoff_id in self._endings:
                return handoff
            if len(self._early) >= _MAX_EARLY:
                return handoff
            self._early[handoff_id] = who
            self._leases.set(handoff_id, self._clock() + self._lease_s)
            return None
        handoff.wanted_by = who
        self._renew(handoff)
        return None if handoff.state is ProducerState.QUEUED else handoff.offer(self.revision)

    def subscribe(
        self, handoff_id: HandoffId, rank: int, who: ReturnAddress
    ) -> wire.Progress | wire.Seal | wire.Refuse:
        """Answer one rank that is ready to read, and keep it informed."""
        handoff = self._live(handoff_id)
        if isinstance(handoff, wire.Refuse):
            return handoff
        if rank >= self._num_ranks:
            return wire.Refuse(handoff_id, Reason.MISSING_BLOCKS)
        self._renew(handoff)
        subscriber = handoff.subscribers[rank] = Subscriber(who, [])
        return handoff.tell(rank, subscriber)

    def heartbeat(self, handoff_ids: Iterable[HandoffId], who: ReturnAddress) -> list[Answer]:
        """Renew leases; name those that cannot be renewed any more (a committed one needs none).

        A handoff that the producer has not heard of yet is not renewed: its request must come
        within one lease. A consumer that has reconnected is offered anew what it may have missed.
        """
        lost: dict[HandoffId, Reason] = {}
        answers: list[Answer] = []
        self.tick()
        for handoff_id in handoff_ids:
            handoff = self._find(handoff_id)
            if isinstance(handoff, Produced):
                if handoff.wanted_by is None:  # its want came so early that it was forgotten
                    lost[handoff_id] = Reason.UNKNOWN_HANDOFF
                elif handoff.wanted_by != who:
                    handoff.wanted_by = who
                    if handoff.state is not ProducerState.QUEUED:
                        answers.append((who, handoff.offer(self.revision)))
                self._renew(handoff)
            elif handoff_id in self._early:
                self._early[handoff_id] = who
            elif self._ending_of(handoff_id) is not ProducerState.COMMITTED:
                lost[handoff_id] = handoff.reason
        return [*answers, (who, wire.Alive(lost))]

    def commit(
        self, commit: wire.Commit
    ) -> wire.Committed | wire.Progress | wire.Seal | wire.Refuse:
        """Say whether the blocks were held until now; COMMITTED once every rank has read all.

        A rank that asks about an earlier epoch is told how things stand instead."""
        handoff = self._of_epoch(commit)
        if not isinstance(handoff, Produced):
            return handoff
        if commit.is_last:
            if not self._has_all(handoff, commit.rank):
                return wire.Refuse(commit.handoff_id, Reason.MISSING_BLOCKS)
            handoff.committed_ranks.add(commit.rank)
            if len(handoff.committed_ranks) >= self._num_ranks:
                self._conclude(handoff, ProducerState.COMMITTED)
        return wire.Committed(commit.handoff_id, commit.epoch, commit.is_last)

    def pack(self, pack: wire.Pack) -> wire.Stage | wire.Progress | wire.Seal | wire.Refuse:
        """Answer a rank that wants a piece with what its counterpart here is to pack.

        A rank that asks about an earlier epoch is told how things stand instead."""
        handoff = self._of_epoch(pack)
        if not isinstance(handoff, Produced):
            return handoff
        if pack.rank >= self._num_ranks or pack.num_tokens > handoff.num_tokens:
            return wire.Refuse(pack.handoff_id, Reason.MISSING_BLOCKS)
        handoff.packing_ranks.add(pack.rank)
        subscriber = handoff.subscribers.get(pack.rank)
        consumer = subscriber.who.incarnation if subscriber else Incarnation("")
        return wire.Stage(pack, tuple(tuple(table) for table in handoff.blocks), consumer)

    def staged(self, staged: wire.Staged) -> Answer | None:
        """A rank has packed a piece, or cannot; returns what a consumer's rank is told. None: the
        piece is not wanted any more."""
        handoff = self._find(staged.handoff_id)
        if isinstance(handoff, wire.Refuse):
            return None
        subscriber = handoff.subscribers.get(staged.rank)
        if subscriber is None:
            return None
        if staged.packed is None:
            return subscriber.who, wire.Refuse(staged.handoff_id, staged.reason or Reason.INTERNAL)
        if staged.packed.epoch != handoff.epoch:
            return None
        return subscriber.who, staged.packed

    def check(self, check: wire.Check) -> wire.Examine | wire.Progress | wire.Seal | wire.Refuse:
        """Answer a rank that has read everything with what its counterpart here is to examine.

        A rank that asks about an earlier epoch is told how things stand instead."""
        handoff = self._of_epoch(check)
        if not isinstance(handoff, Produced):
            return handoff
        if not self._has_all(handoff, check.rank) or check.num_tokens > handoff.num_tokens:
            return wire.Refuse(check.handoff_id, Reason.MISSING_BLOCKS)
        return wire.Examine(check, tuple(tuple(table) for table in handoff.blocks))

    def examined(self, check: wire.Check, digest: bytes) -> list[Answer]:
        """A rank has the digest that a consumer's rank asked for."""
        handoff = self._live(check.handoff_id)
        if isinstance(handoff, wire.Refuse) or handoff.epoch != check.epoch:
            return []  # the consumer has been told, or will be when it commits
        subscriber = handoff.subscribers.get(check.rank)
        if subscriber is None:
            return []
        return [(subscriber.who, wire.Checked(check.handoff_id, check.epoch, digest))]

    def cancel(self, handoff_id: HandoffId) -> None:
        """The consumer does not want it any more: CANCELLED, at the latest when its request ends.

        It may say so before the request has arrived; that is remembered."""
        if handoff := self._open.get(handoff_id):
            if not handoff.ending:
                self._conclude(handoff, ProducerState.CANCELLED)
        elif handoff_id not in self._endings:
            if self._early.pop(handoff_id, None):
                self._leases.remove(handoff_id)
            self._endings.note(handoff_id, ProducerState.CANCELLED)

    def tick(self) -> float | None:
        """Expire what nobody asks for any more; return when to call again (absolute), or None."""
        leases, now = self._leases, self._clock()
        again = now + LOOK_AGAIN_S
        self._contain.each("leases", leases.take(now), self._expire, lambda i: leases.set(i, again))
        return leases.next()

    def _expire(self, handoff_id: HandoffId) -> None:
        self._early.pop(handoff_id, None)
        handoff = self._open.get(handoff_id)
        if handoff is not None and handoff.is_leased:
            self._conclude(handoff, ProducerState.EXPIRED)

    def _renew(self, handoff: Produced) -> None:
        """The consumer has spoken: its lease begins anew, if silence is to end it."""
        if handoff.is_leased:
            self._leases.set(handoff.handoff_id, self._clock() + self._lease_s)

    def _live(self, handoff_id: HandoffId) -> Produced | wire.Refuse:
        self.tick()  # an answer must never be based on a lease that has already run out
        return self._find(handoff_id)

    def _of_epoch(
        self, question: wire.Commit | wire.Check | wire.Pack
    ) -> Produced | wire.Progress | wire.Seal | wire.Refuse:
        """Return the handoff that a rank asks about, or the answer if it means an earlier epoch."""
        handoff = self._live(question.handoff_id)
        if isinstance(handoff, wire.Refuse) or question.epoch == handoff.epoch:
            return handoff
        return handoff.tell_anew(question.rank)

    def _has_all(self, handoff: Produced, rank: int) -> bool:
        return rank < self._num_ranks and handoff.is_final(rank)

    def _find(self, handoff_id: HandoffId) -> Produced | wire.Refuse:
        handoff = self._open.get(handoff_id)
        if handoff is not None and handoff.ending is None:
            return handoff
        ending = self._ending_of(handoff_id)
        return wire.Refuse(handoff_id, ending.refusal if ending else Reason.UNKNOWN_HANDOFF)

    def _ending_of(self, handoff_id: HandoffId) -> ProducerState | None:
        handoff = self._open.get(handoff_id)
        return handoff.ending if handoff else self._endings.get(handoff_id)

    def _set_blocks(self, handoff: Produced, blocks: BlockTables) -> None:
        """Take the block tables as they are now.

        When a request goes on after its prompt, a sliding window lets go of blocks that a
        consumer may be reading: the handoff is over then."""
        if not handoff.ending and not handoff.keeps(self._groups, blocks):
            handoff.ending = ProducerState.CANCELLED
            self._let_go(handoff)
        handoff.blocks = blocks

    def _conclude(self, handoff: Produced, state: ProducerState) -> None:
        """The consumer is done with it, for better or worse."""
        self._let_go(handoff)
        if handoff.is_sealed:
            self._end(handoff, state)
        elif state is ProducerState.COMMITTED:
            handoff.ending = state
        else:
            self._abandon(handoff, state)

    def _abandon(self, handoff: Produced, state: ProducerState) -> None:
        handoff.ending = state
        self._on_abandoned(handoff.request_id, state)

    def _let_go(self, handoff: Produced) -> None:
        """Nothing of it is needed in the staging memory, and silence does not end it any more."""
        self._leases.remove(handoff.handoff_id)
        for rank in handoff.packing_ranks:
            self._on_unpacked(handoff.handoff_id, rank)
        handoff.packing_ranks.clear()

    def _end(self, handoff: Produced, state: ProducerState) -> None:
        self._let_go(handoff)
        del self._open[handoff.handoff_id]
        self._endings.note(handoff.handoff_id, state)
        if handoff.is_sealed:
            self._on_released(handoff.request_id, state)
