"""How far an attempt to read from a peer is: one table; pure.

    CONNECTING -> FETCHING -> (CHECKING ->) COMMITTING -> DONE
                     |
                  DRAINING -> FAILED

An attempt ends in one of three states: DONE, FAILED, or INTERRUPTED, after which another begins.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping


class FetchState(enum.Enum):
    CONNECTING = "connecting"
    FETCHING = "fetching"
    CHECKING = "checking"
    """Everything has been read; the producer's digest of it is awaited."""
    COMMITTING = "committing"
    DRAINING = "draining"
    """Failed, but a read may still write: the blocks must be kept until it has ended."""
    DONE = "done"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    """The connection was closed for another's sake, and nothing was wrong with this one."""


class FetchEvent(enum.Enum):
    SUBSCRIBED = "subscribed"
    NEW_EPOCH = "new epoch"
    ALL_READ = "all read"
    ALL_READ_UNCHECKED = "all read, the bytes are to be compared"
    BYTES_EQUAL = "bytes equal"
    COMMITTED = "committed"
    FAILED = "failed, no read under way"
    FAILED_WRITING = "failed, a read may still write"
    READS_ENDED = "reads ended"
    PEER_LOST = "peer lost"
    INTERRUPTED = "connection closed for another"


_S, _E = FetchState, FetchEvent
_BEFORE = (_S.CONNECTING, _S.FETCHING, _S.CHECKING, _S.COMMITTING)
_SUBSCRIBED = (_S.FETCHING, _S.CHECKING, _S.COMMITTING)

TRANSITIONS: Mapping[tuple[FetchState, FetchEvent], FetchState] = {
    (_S.CONNECTING, _E.SUBSCRIBED): _S.FETCHING,
    **{(state, _E.NEW_EPOCH): _S.FETCHING for state in _SUBSCRIBED},
    (_S.FETCHING, _E.ALL_READ): _S.COMMITTING,
    (_S.FETCHING, _E.ALL_READ_UNCHECKED): _S.CHECKING,
    (_S.CHECKING, _E.BYTES_EQUAL): _S.COMMITTING,
    (_S.COMMITTING, _E.COMMITTED): _S.DONE,
    **{(state, _E.FAILED): _S.FAILED for state in _BEFORE},
    # Only then is a read under way: what is checked or committed has been read.
    (_S.FETCHING, _E.FAILED_WRITING): _S.DRAINING,
    (_S.DRAINING, _E.READS_ENDED): _S.FAILED,
    **{(state, _E.PEER_LOST): _S.FAILED for state in (*_BEFORE, _S.DRAINING)},
    **{(state, _E.INTERRUPTED): _S.INTERRUPTED for state in _SUBSCRIBED},
}
"""What follows on what; nothing else happens to an attempt."""

ENDS = frozenset({FetchState.DONE, FetchState.FAILED, FetchState.INTERRUPTED})


def follow(state: FetchState, event: FetchEvent) -> FetchState:
    """Return the state after an event; the only way from one to another."""
    return TRANSITIONS[state, event]
