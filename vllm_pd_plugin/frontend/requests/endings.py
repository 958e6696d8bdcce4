"""How attempts and requests fail; labels of metrics."""

from __future__ import annotations

import enum


class Failure(enum.StrEnum):
    """Why an attempt or a handoff failed; the ``reason`` label of ``pd_frontend_retries_total`` and
    ``pd_frontend_pair_breakers_opened_total``, each of which counts some of these."""

    ENGINE_LOST = "engine_lost"
    ENGINE_STOPPED = "engine_stopped"
    """The engine ended the request: it is shutting down."""
    REQUEST_FAILED = "request_failed"
    """The engine ended the request with an error: a handoff that failed, for one."""
    TIMEOUT = "timeout"
    RECOMPUTED = "recomputed"
    """The decode engine has computed the prompt after all: the attempt goes on, and the pair of
    engines is not tried for ever."""


class Ending(enum.StrEnum):
    """Why a request ended without being finished; a label of ``pd_frontend_failures_total``."""

    NO_ENGINE = "no_engine"
    OVERLOADED = "overloaded"
    """It has waited for so long, and all engines still have enough to do."""
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    NOT_REPLAYABLE = "not_replayable"
    REPLAY_DIFFERS = "replay_differs"
    DEADLINE = "deadline"
    REFUSED = "refused"
    """The engine does not take it: it is the request that is wrong."""
    SUSPECT = "suspect"
    """Two engines were lost while they worked on it: it is not tried on a third."""
    UNREAD = "unread"
    """Its client reads too slowly: too much of the answer waits for it."""
    UNSENDABLE = "unsendable"
    """It has something in it that cannot be written down."""
    SHUTDOWN = "shutdown"
    INTERNAL = "internal"
