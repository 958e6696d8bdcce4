"""What consumers ask of this engine's exports, and what they are answered; pure.

Nothing here sends: the methods return what is to be sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import HandoffId, Incarnation
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.export import Export, Subscriber
from vllm_pd_plugin.protocol.export_states import ExportEvent, ExportState
from vllm_pd_plugin.protocol.exports import ExportTable
from vllm_pd_plugin.protocol.outbox import Answer, ReturnAddress

_MOST_RANKS = 4096
"""Of a consumer."""


class Answering:
    """The consumers' side of a table of exports. An answer is never based on a lease that has run
    out: whatever a consumer asks, the table looks at its leases first."""

    def __init__(self, exports: ExportTable) -> None:
        self._exports = exports

    def want(self, handoff_id: HandoffId, who: ReturnAddress) -> wire.Offer | wire.Refuse | None:
        """Answer a consumer that asks for an export, and start its lease; None: not yet."""
        export = self._exports.live(handoff_id)
        if isinstance(export, Export):
            export.consumer = who
            self._exports.renew(export)
            is_queued = export.state is ExportState.QUEUED
            return None if is_queued else export.offer(self._exports.revision)
        return None if self._exports.expect(handoff_id, who) else export

    def subscribe(
        self, subscribe: wire.Subscribe, who: ReturnAddress
    ) -> wire.Progress | wire.Seal | wire.Refuse:
        """Answer one rank that is ready to read, and keep it informed."""
        export = self._exports.live(subscribe.handoff_id)
        if isinstance(export, wire.Refuse):
            return export
        ranks, num_ranks = subscribe.source_ranks, subscribe.num_ranks
        is_sound = (
            subscribe.rank < num_ranks == (export.num_subscribers or num_ranks) <= _MOST_RANKS
            and 0 < len(ranks) <= self._exports.num_ranks
            and all(one < other for one, other in pairwise((*ranks, self._exports.num_ranks)))
        )
        if not is_sound:
            return wire.Refuse(subscribe.handoff_id, Reason.MISSING_BLOCKS)
        self._exports.renew(export)
        export.num_subscribers = num_ranks
        before = export.subscribers.get(subscribe.rank)
        if before is not None and before.who.incarnation != who.incarnation:
            export.committed.discard(subscribe.rank)  # another has taken its place
        subscriber = export.subscribers[subscribe.rank] = Subscriber(who, ranks)
        return export.tell(subscriber)

    def heartbeat(self, handoff_ids: Iterable[HandoffId], who: ReturnAddress) -> list[Answer]:
        """Renew leases; name those that cannot be renewed any more (a committed one needs none).

        One that nobody has announced yet is not renewed: it must come within one lease. A consumer
        that has reconnected is offered anew what it may have missed.
        """
        lost: dict[HandoffId, Reason] = {}
        answers: list[Answer] = []
        self._exports.tick()
        for handoff_id in handoff_ids:
            export = self._exports.find(handoff_id)
            if isinstance(export, Export):
                if export.consumer is None:  # its want came so early that it was forgotten
                    lost[handoff_id] = Reason.UNKNOWN_HANDOFF
                elif export.consumer != who:
                    export.consumer = who
                    if export.state is not ExportState.QUEUED:
                        answers.append((who, export.offer(self._exports.revision)))
                self._exports.renew(export)
                continue
            state = self._exports.state_of(handoff_id)
            if state is ExportState.AWAITED:
                self._exports.readdress(handoff_id, who)
            elif state.outcome is not ExportState.COMMITTED:
                lost[handoff_id] = export.reason
        return [*answers, (who, wire.Alive(lost))]

    def commit(
        self, commit: wire.Commit
    ) -> wire.Committed | wire.Progress | wire.Seal | wire.Refuse:
        """Say whether the blocks were held until now; committed once every rank has read all.

        A rank that asks about an earlier epoch is told how things stand instead."""
        export = self._of_epoch(commit)
        if not isinstance(export, Export):
            return export
        if commit.is_last:
            if not _has_all(export, commit.rank):
                return wire.Refuse(commit.handoff_id, Reason.MISSING_BLOCKS)
            if export.commit(commit.rank):
                self._exports.apply(export, ExportEvent.COMMITTED)
        return wire.Committed(commit.handoff_id, commit.epoch, commit.is_last)

    def pack(
        self, pack: wire.Pack | wire.Gather, consumer: Incarnation
    ) -> wire.Stage | wire.Progress | wire.Seal | wire.Refuse:
        """Answer a rank that wants a piece with what a rank here is to pack. consumer: who asks.

        A rank that asks about an earlier epoch is told how things stand instead."""
        export = self._of_epoch(pack)
        if not isinstance(export, Export):
            return export
        num_tokens = pack.num_tokens if isinstance(pack, wire.Pack) else pack.stop
        if pack.source_rank >= self._exports.num_ranks or num_tokens > export.num_tokens:
            return wire.Refuse(pack.handoff_id, Reason.MISSING_BLOCKS)
        export.packing_ranks.add(pack.source_rank)
        return wire.Stage(pack, tuple(tuple(table) for table in export.blocks), consumer)

    def staged(self, staged: wire.Staged) -> Answer | None:
        """A rank has packed a piece, or cannot; returns what a consumer's rank is told. None: the
        piece is not wanted any more."""
        export = self._exports.find(staged.handoff_id)
        if isinstance(export, wire.Refuse):
            return None
        subscriber = export.subscribers.get(staged.rank)
        if subscriber is None or subscriber.who.incarnation != staged.consumer:
            return None
        if staged.packed is None:
            return subscriber.who, wire.Refuse(staged.handoff_id, staged.reason or Reason.INTERNAL)
        if staged.packed.epoch != export.epoch:
            return None
        return subscriber.who, staged.packed

    def check(self, check: wire.Check) -> wire.Examine | wire.Progress | wire.Seal | wire.Refuse:
        """Answer a rank that has read everything with what its counterpart here is to examine.

        A rank that asks about an earlier epoch is told how things stand instead."""
        export = self._of_epoch(check)
        if not isinstance(export, Export):
            return export
        is_sound = (
            check.source_rank < self._exports.num_ranks and check.num_tokens <= export.num_tokens
        )
        if not is_sound or not _has_all(export, check.rank):
            return wire.Refuse(check.handoff_id, Reason.MISSING_BLOCKS)
        return wire.Examine(check, tuple(tuple(table) for table in export.blocks))

    def examined(self, check: wire.Check, digest: bytes) -> list[Answer]:
        """A rank has the digest that a consumer's rank asked for."""
        export = self._exports.live(check.handoff_id)
        if isinstance(export, wire.Refuse) or export.epoch != check.epoch:
            return []  # the consumer has been told, or will be when it commits
        subscriber = export.subscribers.get(check.rank)
        if subscriber is None:
            return []
        return [(subscriber.who, wire.Checked(check.handoff_id, check.epoch, digest))]

    def cancel(self, handoff_id: HandoffId) -> None:
        """The consumer does not want it any more.

        It may say so before its holder has announced it; that is remembered."""
        self._exports.happen(handoff_id, ExportEvent.CANCELLED)

    # --- inside ------------------------------------------------------------------------------

    def _of_epoch(
        self, question: wire.Commit | wire.Check | wire.Pack | wire.Gather
    ) -> Export | wire.Progress | wire.Seal | wire.Refuse:
        """Return the export that a rank asks about, or the answer if it means an earlier epoch."""
        export = self._exports.live(question.handoff_id)
        if isinstance(export, wire.Refuse) or question.epoch == export.epoch:
            return export
        return export.tell_anew(question.rank)


def _has_all(export: Export, rank: int) -> bool:
    subscriber = export.subscribers.get(rank)
    return subscriber is not None and export.is_final(subscriber)
