"""How attempts and requests fail; labels of metrics."""

from __future__ import annotations

import enum


class Failure(enum.StrEnum):
    """Why an attempt failed; the ``reason`` label of ``pd_frontend_retries_total``."""

    ENGINE_LOST = "engine_lost"
    ENGINE_STOPPED = "engine_stopped"
    """The engine ended the request: it is shutting down."""
    REQUEST_FAILED = "request_failed"
    """The engine ended the request with an error: a handoff that failed, for one."""
    TIMEOUT = "timeout"


class Ending(enum.StrEnum):
    """Why a request ended without being finished; a label of ``pd_frontend_failures_total``."""

    NO_ENGINE = "no_engine"
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    NOT_REPLAYABLE = "not_replayable"
    REPLAY_DIFFERS = "replay_differs"
    DEADLINE = "deadline"
    UNSENDABLE = "unsendable"
    """It has something in it that cannot be written down."""
    SHUTDOWN = "shutdown"
    INTERNAL = "internal"
