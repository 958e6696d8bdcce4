"""What can go wrong, in one tree.

    PdError
     ├─ ConfigError         an option is refused at start
     ├─ UnsupportedError    a model, layout or vLLM version is refused at start
     └─ HandoffError        one request's handoff failed; carries a Reason
         ├─ ParamsError         its kv_transfer_params are not usable
         └─ PeerError           the other engine cannot be used

A ``HandoffError`` never leaves the request that it belongs to.
"""

from __future__ import annotations

import enum


class Reason(enum.StrEnum):
    """Why a handoff failed; the ``reason`` label of ``pd_handoff_failures_total``."""

    BAD_PARAMS = "bad_params"
    WRONG_ROLE = "wrong_role"
    PEER_UNREACHABLE = "peer_unreachable"
    PEER_RESTARTED = "peer_restarted"
    PEER_INCOMPATIBLE = "peer_incompatible"
    UNKNOWN_HANDOFF = "unknown_handoff"
    KV_CHANGED = "kv_changed"
    PROMPT_MISMATCH = "prompt_mismatch"
    MISSING_BLOCKS = "missing_blocks"
    READ_FAILED = "read_failed"
    DIGEST_MISMATCH = "digest_mismatch"
    FETCH_TIMEOUT = "fetch_timeout"
    QUEUE_TIMEOUT = "queue_timeout"
    NOT_LOADED = "not_loaded"
    NOT_REGISTERED = "not_registered"
    LEASE_EXPIRED = "lease_expired"
    CANCELLED = "cancelled"
    PRODUCER_ENDED = "producer_ended"
    ABORTED = "aborted"
    INTERNAL = "internal"


OTHER_KV = frozenset({Reason.KV_CHANGED, Reason.PEER_INCOMPATIBLE})
"""What was fetched before such a failure is not kept: it may be no KV of this engine's model."""


class PdError(Exception):
    """Root of every error that this package raises on purpose."""


class ConfigError(PdError, ValueError):
    """An option has a value that cannot work; the message says what is allowed."""


class UnsupportedError(PdError):
    """This vLLM, model or parallel layout is not supported; the message says what is."""


class HandoffError(PdError):
    """One handoff cannot go on."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ParamsError(HandoffError):
    """``kv_transfer_params`` are malformed or not allowed here."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.BAD_PARAMS, message)


class PeerError(HandoffError):
    """The other engine is gone, was replaced, or does not fit this one."""
