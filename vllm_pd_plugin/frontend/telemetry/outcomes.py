"""How the requests of clients come and end: what is promised to a class of them, and what one got.

A client's request may have several choices (``n``), or be a beam search of many steps, each of
which is a request to the engines. What a client asked for is one request all the same: it is
answered when all its choices are.
"""

from __future__ import annotations

import contextvars
import dataclasses
import enum
from collections.abc import Iterator
from contextlib import contextmanager

from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.requests.endings import Ending
from vllm_pd_plugin.frontend.requests.siblings import Siblings

DEFAULT_CLASS = "default"


@dataclasses.dataclass(frozen=True, slots=True)
class Objectives:
    """What a request of a class is promised: time to first token, and per token after it; in
    seconds. A request counts for goodput when each of its choices meets both."""

    ttft_s: float
    tpot_s: float

    def are_met(self, ttft_s: float, tpot_s: float | None) -> bool:
        return ttft_s <= self.ttft_s and (tpot_s is None or tpot_s <= self.tpot_s)


def parse_slo(text: str) -> tuple[str, Objectives]:
    """Read NAME=TTFT_MS/TPOT_MS, or TTFT_MS/TPOT_MS for the default class.

    Raises:
        ConfigError: it is something else.
    """
    name, equals, numbers = text.rpartition("=")
    ttft, slash, tpot = numbers.partition("/")
    try:
        objectives = Objectives(float(ttft) / 1e3, float(tpot) / 1e3)
    except ValueError:
        objectives = Objectives(0, 0)
    if not slash or objectives.ttft_s <= 0 or objectives.tpot_s <= 0 or (equals and not name):
        raise ConfigError(f"--slo {text!r} is not NAME=TTFT_MS/TPOT_MS, as in interactive=500/50")
    return name or DEFAULT_CLASS, objectives


class Outcome(enum.StrEnum):
    """How a client's request has ended; the ``outcome`` label of ``pd_frontend_requests_total``."""

    ANSWERED = "answered"
    FAILED = "failed"
    REFUSED = "refused"
    """It was turned away before anything was done for it."""
    GONE = "gone"
    """Its client has left before the end: it did not wait any longer, or had enough."""


class ClientRequest:
    """One request of a client, until all its choices are over.

    is_whole: no more choices come. ending: why it failed, if it did. siblings: its choices.
    """

    __slots__ = ("ending", "is_good", "is_whole", "num_open", "outcome", "siblings", "slo_class")

    def __init__(self, is_whole: bool, are_beams: bool = False) -> None:
        self.siblings = Siblings(are_beams)
        self.is_whole = is_whole
        self.num_open = 0
        self.outcome: Outcome | None = None
        self.is_good = True
        self.ending: Ending | None = None
        self.slo_class = DEFAULT_CLASS

    @property
    def is_over(self) -> bool:
        return self.is_whole and self.num_open == 0 and self.outcome is not None

    def choice_ended(self, outcome: Outcome, is_good: bool, ending: Ending | None) -> None:
        """One of its choices is over. A choice that has failed takes the others with it."""
        self.num_open -= 1
        self.is_good = self.is_good and is_good
        if self.outcome is None or _WEIGHT[outcome] > _WEIGHT[self.outcome]:
            self.outcome = outcome
        if self.ending is None:
            self.ending = ending


_WEIGHT = {Outcome.ANSWERED: 0, Outcome.GONE: 1, Outcome.REFUSED: 2, Outcome.FAILED: 3}

_CURRENT: contextvars.ContextVar[ClientRequest | None] = contextvars.ContextVar(
    "pd_client_request", default=None
)


def current_request() -> ClientRequest:
    """Return the client's request that this task begins choices of; else one of one choice."""
    return _CURRENT.get() or ClientRequest(is_whole=True)


@contextmanager
def one_request(are_beams: bool = False) -> Iterator[ClientRequest]:
    """Let all choices that this task begins within be of one request; of the one around it, if that
    is a beam search. are_beams: they are the steps of one."""
    around = _CURRENT.get()
    if around is not None and around.siblings.are_beams and not around.is_whole:
        yield around
        return
    request = ClientRequest(is_whole=False, are_beams=are_beams)
    token = _CURRENT.set(request)
    try:
        yield request
    finally:
        _CURRENT.reset(token)
        request.is_whole = True


class Timeline:
    """When one choice's tokens went to its client, in seconds of the frontend's clock.

    begins: its first token is the first of something; not so for a step of beam search that goes on
        after another.
    """

    __slots__ = (
        "arrived_at", "begins", "first_at", "is_answered", "last_at", "num_tokens", "request",
        "second_at",
    )  # fmt: skip

    def __init__(self, arrived_at: float, request: ClientRequest) -> None:
        self.arrived_at = arrived_at
        self.begins = not request.siblings.is_going_on
        self.request = request
        self.first_at = self.second_at = self.last_at = 0.0
        self.num_tokens = 0
        self.is_answered = False

    @property
    def ttft_s(self) -> float:
        return self.first_at - self.arrived_at

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None when there was only one."""
        if self.num_tokens < 2:
            return None
        return (self.last_at - self.first_at) / (self.num_tokens - 1)
