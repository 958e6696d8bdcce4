"""The life of an export: its states, what may happen to it, and what follows; pure.

An export is KV that consumers may read: blocks under a lease, an epoch and a commit, whoever holds
them. Its *holder* makes it grow, seals it, and is told when it is over; a *consumer* reads it and
says when it has enough. ``TRANSITIONS`` is all there is of its state. What goes beside it are facts
that any state may have: who the consumer is, and how long its lease runs; the epoch, the blocks and
how far they are written; which of the consumer's ranks have subscribed, committed, or had pieces
packed.

A pair of state and event that is not in ``TRANSITIONS`` changes nothing; ``IGNORED`` says why.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from vllm_pd_plugin.errors import Reason


class ExportState(enum.Enum):
    """UNKNOWN, AWAITED: nobody holds it; for AWAITED a consumer waits.
    QUEUED: its holder has announced it, and has no blocks yet.
    GROWING: its blocks are the holder's own, and more of them are being written.
    SEALED: all is final, and the blocks are the export's until it is over.
    ..._UNSEALED: over for its consumer, while its holder still has the blocks to itself.
    COMMITTED, CANCELLED, EXPIRED: over, and remembered for a while.
    """

    UNKNOWN = "unknown"
    AWAITED = "awaited"
    QUEUED = "queued"
    GROWING = "growing"
    SEALED = "sealed"
    COMMITTED_UNSEALED = "committed, not sealed"
    CANCELLED_UNSEALED = "cancelled, not sealed"
    EXPIRED_UNSEALED = "expired, not sealed"
    COMMITTED = "committed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_open(self) -> bool:
        """Whether a consumer may read it, or will be able to."""
        return self in _OPEN

    @property
    def is_over(self) -> bool:
        return self in _OVER

    @property
    def outcome(self) -> ExportState | None:
        """How it is over for its consumer; None: it is not."""
        return self if self in _OVER else _OUTCOMES.get(self)

    @property
    def refusal(self) -> Reason:
        """Why a consumer is refused an export that is in this state, and not open."""
        return _REFUSALS.get(self.outcome, Reason.UNKNOWN_HANDOFF)


class ExportEvent(enum.Enum):
    """By its holder: ENQUEUED (it is to come), OPENED (it has its first blocks), WITHDRAWN (it has
    lost them and starts afresh: a new epoch), BLOCKS_LOST (it keeps growing, without blocks that a
    consumer needs), SEALED, DROPPED (it ends without KV). REPLACED: another holder brings its id.
    By a consumer: WANTED (before anybody holds it), COMMITTED (all its ranks have read everything),
    CANCELLED; EXPIRED: it has been silent for a lease.
    VOIDED: this engine's KV is another from now on.
    """

    ENQUEUED = "enqueued"
    OPENED = "opened"
    WITHDRAWN = "withdrawn"
    BLOCKS_LOST = "blocks lost"
    SEALED = "sealed"
    DROPPED = "dropped"
    REPLACED = "replaced"
    WANTED = "wanted"
    COMMITTED = "committed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    VOIDED = "voided"


class Action(enum.Enum):
    """What the owner of an export does when it changes. To the consumer, where there is one:
    RENEW its lease, END_LEASE, OFFER, TELL its ranks how things stand, REFUSE. In the staging
    memory: UNSTAGE what was packed. To the holder: RELEASE (the blocks may be freed), ABANDON
    (nobody wants what it still makes).
    """

    RENEW = "renew the lease"
    END_LEASE = "end the lease"
    OFFER = "offer"
    TELL = "tell the ranks"
    REFUSE = "refuse"
    UNSTAGE = "unstage"
    RELEASE = "release the blocks"
    ABANDON = "abandon"


class Transition(NamedTuple):
    """What becomes of an export, and what is done then, in this order."""

    state: ExportState
    actions: tuple[Action, ...] = ()


_S, _E, _A = ExportState, ExportEvent, Action

_OPEN = frozenset({_S.QUEUED, _S.GROWING, _S.SEALED})
_OUTCOMES = {
    _S.COMMITTED_UNSEALED: _S.COMMITTED,
    _S.CANCELLED_UNSEALED: _S.CANCELLED,
    _S.EXPIRED_UNSEALED: _S.EXPIRED,
}
_OVER = frozenset(_OUTCOMES.values())
_REFUSALS: Mapping[ExportState | None, Reason] = {
    _S.CANCELLED: Reason.CANCELLED,
    _S.EXPIRED: Reason.LEASE_EXPIRED,
}

_CLOSE = (_A.END_LEASE, _A.UNSTAGE)
"""Its consumer has no part in it any more."""
_GIVE_UP = (*_CLOSE, _A.ABANDON)
_FREE = (*_CLOSE, _A.RELEASE)

TRANSITIONS: Mapping[tuple[ExportState, ExportEvent], Transition] = MappingProxyType({
    # Nobody holds it yet.
    (_S.UNKNOWN, _E.WANTED): Transition(_S.AWAITED, (_A.RENEW,)),
    (_S.UNKNOWN, _E.ENQUEUED): Transition(_S.QUEUED),
    (_S.UNKNOWN, _E.CANCELLED): Transition(_S.CANCELLED),
    (_S.AWAITED, _E.WANTED): Transition(_S.AWAITED, (_A.RENEW,)),
    (_S.AWAITED, _E.ENQUEUED): Transition(_S.QUEUED, (_A.RENEW,)),
    (_S.AWAITED, _E.CANCELLED): Transition(_S.CANCELLED, (_A.END_LEASE,)),
    (_S.AWAITED, _E.EXPIRED): Transition(_S.UNKNOWN, (_A.END_LEASE,)),
    # Its holder has it to itself.
    (_S.QUEUED, _E.OPENED): Transition(_S.GROWING, (_A.RENEW, _A.OFFER)),
    (_S.QUEUED, _E.SEALED): Transition(_S.SEALED, (_A.RENEW, _A.OFFER, _A.TELL)),
    (_S.QUEUED, _E.DROPPED): Transition(_S.CANCELLED, (*_CLOSE, _A.REFUSE)),
    (_S.QUEUED, _E.REPLACED): Transition(_S.CANCELLED, _CLOSE),
    (_S.QUEUED, _E.CANCELLED): Transition(_S.CANCELLED_UNSEALED, _GIVE_UP),
    (_S.QUEUED, _E.EXPIRED): Transition(_S.EXPIRED_UNSEALED, _GIVE_UP),
    (_S.GROWING, _E.WITHDRAWN): Transition(_S.GROWING, (_A.TELL,)),
    (_S.GROWING, _E.SEALED): Transition(_S.SEALED, (_A.RENEW, _A.TELL)),
    (_S.GROWING, _E.DROPPED): Transition(_S.CANCELLED, (*_CLOSE, _A.REFUSE)),
    (_S.GROWING, _E.REPLACED): Transition(_S.CANCELLED, _CLOSE),
    # The holder goes on: what it makes is wanted by others than the consumer.
    (_S.GROWING, _E.BLOCKS_LOST): Transition(_S.CANCELLED_UNSEALED, _CLOSE),
    (_S.GROWING, _E.COMMITTED): Transition(_S.COMMITTED_UNSEALED, _CLOSE),
    (_S.GROWING, _E.CANCELLED): Transition(_S.CANCELLED_UNSEALED, _GIVE_UP),
    (_S.GROWING, _E.EXPIRED): Transition(_S.EXPIRED_UNSEALED, _GIVE_UP),
    (_S.GROWING, _E.VOIDED): Transition(_S.CANCELLED_UNSEALED, _GIVE_UP),
    # Its blocks are held for the consumer.
    (_S.SEALED, _E.COMMITTED): Transition(_S.COMMITTED, _FREE),
    (_S.SEALED, _E.CANCELLED): Transition(_S.CANCELLED, _FREE),
    (_S.SEALED, _E.EXPIRED): Transition(_S.EXPIRED, _FREE),
    (_S.SEALED, _E.VOIDED): Transition(_S.CANCELLED, _FREE),
    (_S.SEALED, _E.REPLACED): Transition(_S.CANCELLED, _FREE),
    (_S.SEALED, _E.DROPPED): Transition(_S.CANCELLED, (*_FREE, _A.REFUSE)),
    # Over for its consumer. A holder that seals holds the blocks until it hears of their release.
    (_S.COMMITTED_UNSEALED, _E.SEALED): Transition(_S.COMMITTED, (_A.RELEASE,)),
    (_S.CANCELLED_UNSEALED, _E.SEALED): Transition(_S.CANCELLED, (_A.RELEASE,)),
    (_S.EXPIRED_UNSEALED, _E.SEALED): Transition(_S.EXPIRED, (_A.RELEASE,)),
    (_S.COMMITTED_UNSEALED, _E.DROPPED): Transition(_S.COMMITTED),
    (_S.CANCELLED_UNSEALED, _E.DROPPED): Transition(_S.CANCELLED),
    (_S.EXPIRED_UNSEALED, _E.DROPPED): Transition(_S.EXPIRED),
    (_S.COMMITTED_UNSEALED, _E.REPLACED): Transition(_S.CANCELLED),
    (_S.CANCELLED_UNSEALED, _E.REPLACED): Transition(_S.CANCELLED),
    (_S.EXPIRED_UNSEALED, _E.REPLACED): Transition(_S.CANCELLED),
    # Over. An id is used once; and one that was cancelled beforehand need not be made.
    (_S.COMMITTED, _E.ENQUEUED): Transition(_S.COMMITTED_UNSEALED, (_A.ABANDON,)),
    (_S.CANCELLED, _E.ENQUEUED): Transition(_S.CANCELLED_UNSEALED, (_A.ABANDON,)),
    (_S.EXPIRED, _E.ENQUEUED): Transition(_S.EXPIRED_UNSEALED, (_A.ABANDON,)),
    (_S.COMMITTED, _E.SEALED): Transition(_S.COMMITTED, (_A.RELEASE,)),
    (_S.CANCELLED, _E.SEALED): Transition(_S.CANCELLED, (_A.RELEASE,)),
    (_S.EXPIRED, _E.SEALED): Transition(_S.EXPIRED, (_A.RELEASE,)),
})  # fmt: skip


def _ignored() -> Mapping[tuple[ExportState, ExportEvent], str]:
    nobody = (_S.UNKNOWN, _S.AWAITED)
    unsealed, over = tuple(_OUTCOMES), tuple(_OUTCOMES.values())
    held = (_S.QUEUED, _S.GROWING, _S.SEALED, *unsealed)
    rows: list[tuple[Iterable[ExportState], Iterable[ExportEvent], str]] = [
        (nobody, (_E.OPENED, _E.WITHDRAWN, _E.BLOCKS_LOST, _E.DROPPED, _E.REPLACED, _E.COMMITTED,
                  _E.VOIDED), "nobody holds it"),
        (nobody, (_E.SEALED,), "one that is forgotten counts as cancelled"),
        ((_S.UNKNOWN,), (_E.EXPIRED,), "nobody waits for it"),
        (held, (_E.ENQUEUED,), "the holder before is replaced first"),
        (held, (_E.WANTED,), "answered with the offer, or with how it is over"),
        ((_S.QUEUED,), (_E.WITHDRAWN, _E.BLOCKS_LOST, _E.COMMITTED, _E.VOIDED),
         "it has no blocks yet"),
        ((_S.GROWING,), (_E.OPENED,), "it has its blocks already"),
        ((_S.SEALED,), (_E.OPENED, _E.WITHDRAWN, _E.BLOCKS_LOST, _E.SEALED),
         "it does not change any more"),
        (unsealed, (_E.OPENED, _E.WITHDRAWN, _E.BLOCKS_LOST, _E.COMMITTED, _E.CANCELLED, _E.EXPIRED,
                    _E.VOIDED), "it is over for its consumer, and was said to be"),
        (over, (_E.OPENED, _E.WITHDRAWN, _E.BLOCKS_LOST, _E.DROPPED, _E.REPLACED, _E.COMMITTED,
                _E.CANCELLED, _E.EXPIRED, _E.VOIDED), "it is over"),
        (over, (_E.WANTED,), "refused with how it is over"),
    ]  # fmt: skip
    return MappingProxyType({
        pair: why for states, events, why in rows for pair in itertools.product(states, events)
    })  # fmt: skip


IGNORED = _ignored()
"""Why nothing follows, of each pair that is not in ``TRANSITIONS``."""
