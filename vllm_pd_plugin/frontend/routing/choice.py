"""What the choice of engines for a request is made from, and what comes of it; see ``choosing``."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

EngineKey = str
"""An engine's URL, as the operator gave it; see ``engine_port.link.Link``."""
Pair = tuple[EngineKey, EngineKey]
"""An engine that prefills, and the one that it hands KV to."""

TYPICAL_RATE = 2000.0
"""Prompt tokens a second of an engine of which nothing is known yet; only ratios matter then."""
_SCARCE_KV = 0.25
"""Share of the KV cache below which what is free limits an engine more than its slots do."""
_AHEAD, _LEAST_AHEAD = 4, 2
"""An engine gets a quarter more requests than it can decode at once, and two at least, so that it
has something to begin when one ends."""


class Role(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    @property
    def prefills(self) -> bool:
        return self is not Role.DECODE

    @property
    def decodes(self) -> bool:
        return self is not Role.PREFILL


class Strategy(enum.StrEnum):
    """How one engine of a pool is chosen."""

    BEST = "best"
    """Prefill: least predicted TTFT. Decode: most headroom, and the prompt's prefix."""
    POWER_OF_TWO = "power-of-two"
    """The better of two at random."""
    ROUND_ROBIN = "round-robin"


class NoPrefill(enum.StrEnum):
    """What happens to a request when no prefill engine is up."""

    FAIL = "fail"
    LOCAL = "local"
    QUEUE = "queue"


class Reason(enum.StrEnum):
    """Why a request went where it went; a label of ``pd_frontend_routes_total``."""

    DISAGGREGATED = "disaggregated"
    SHORT = "short"
    """So little is to be computed that it disturbs nobody on the decode engine."""
    PREFILL_BUSY = "prefill_busy"
    """The prefill engines' queue is longer than what the decode engine would take."""
    NO_GAIN = "no_gain"
    """The other engine decodes, too: a handoff would move the disturbance, and bring little."""
    ONE_TOKEN = "one_token"
    """Only one token is wanted: nothing is left to decode."""
    NO_PREFILL = "no_prefill"
    """No prefill engine is up."""
    BEAM_SEARCH = "beam_search"
    """A step of beam search goes on where the last one was computed."""
    WHOLE_PROMPT = "whole_prompt"
    """Log-probabilities of the prompt are wanted: one engine computes all of it."""
    HANDOFF_FAILED = "handoff_failed"
    """A handoff of this request has failed; or those of others have, and none is tried now."""


class Unroutable(enum.StrEnum):
    """Why a request cannot go anywhere now."""

    NO_DECODE = "no_decode"
    NO_PREFILL = "no_prefill"
    QUEUE_FOR_PREFILL = "queue_for_prefill"
    """It is to wait until a prefill engine is up."""
    FULL = "full"
    """All engines that could take it have enough to do: it waits here as well as there."""


@dataclasses.dataclass(frozen=True, slots=True)
class Engine:
    """One engine as a frontend sees it now.

    prefill_tokens: prompt tokens that it still has to compute, of this and other frontends.
    prefill_rate: tokens a second that it was seen to compute; None if it was not.
    running: requests that it decodes. max_running: how many it can at once.
    kv_free: share of its KV cache that is free, 0 to 1.
    kind: KV goes only between engines of the same.
    max_prefill_tokens: it gets no prompts more while it has so much to compute.
    is_broken: its circuit breaker is open; it is here because no other engine has its role.
    other_frontends: how many send it requests beside this one, of which this one learns late.
    """

    key: EngineKey
    role: Role
    prefill_tokens: int = 0
    prefill_rate: float | None = None
    running: int = 0
    max_running: int = 256
    kv_free: float = 1.0
    kind: str = ""
    is_broken: bool = False
    max_prefill_tokens: int | None = None
    other_frontends: int = 0

    @property
    def is_full(self) -> bool:
        """Whether it has enough to do for a while."""
        limit = self.max_prefill_tokens
        return not self.has_slots or (limit is not None and self.prefill_tokens >= limit)

    @property
    def has_slots(self) -> bool:
        """Whether it would begin soon with a request whose prompt it has."""
        if self.running < self.max_running:
            return True
        return self.running < self.max_running + max(self.max_running // _AHEAD, _LEAST_AHEAD)

    def prefill_s(self, num_tokens: int) -> float:
        """Return how long a prompt of so many uncached tokens takes from now on, in seconds."""
        return (self.prefill_tokens + num_tokens) / (self.prefill_rate or TYPICAL_RATE)

    @property
    def headroom(self) -> float:
        """Return how much room there is for one request more, 0 to 1. The slots decide, which say
        how long a step takes, as long as there is KV memory enough."""
        return min(self.kv_free / _SCARCE_KV, 1.0 - self.running / self.max_running)


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """What routing knows of a request.

    cached: of how many of its first tokens an engine has the KV.
    session: engine that worked for the same session before.
    handoff_failed: it was to be handed off before, and that has failed.
    beside: where another part of the same request of a client has gone: a choice, or a beam.
    is_beam: it is a step of beam search.
    """

    num_tokens: int
    max_tokens: int
    cached: Mapping[EngineKey, int] = dataclasses.field(default_factory=dict)
    session: EngineKey | None = None
    needs_whole_prompt: bool = False
    handoff_failed: bool = False
    beside: Route | None = None
    is_beam: bool = False

    def uncached(self, engine: Engine) -> int:
        return max(1, self.num_tokens - self.cached.get(engine.key, 0))


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """What the operator has configured.

    local_below: prompts with fewer uncached tokens are not handed off; None decides by prediction.
    max_stall_s: the longest that a prompt computed on a decode engine may hold up its decodes,
        when that is decided by prediction; and by how much sooner an engine that decodes, too, must
        be to compute prompts for another one.
    """

    prefill: Strategy = Strategy.BEST
    decode: Strategy = Strategy.BEST
    no_prefill: NoPrefill = NoPrefill.LOCAL
    local_below: int | None = None
    max_stall_s: float = 0.05


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """prefill: None when one engine does everything."""

    prefill: EngineKey | None
    decode: EngineKey
    reason: Reason


@dataclasses.dataclass(frozen=True, slots=True)
class Chance:
    """What a choice may depend on beside the pool: how many were made before, two numbers in [0, 1)
    drawn for this one, and a name of the frontend that chooses."""

    turn: int = 0
    first: float = 0.0
    second: float = 0.5
    frontend: str = ""
