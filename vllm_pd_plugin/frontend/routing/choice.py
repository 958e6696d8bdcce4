"""Which engines work on a request; pure functions of a snapshot of the pool.

The prefill engine is the one whose first token is predicted to come first, the decode engine the
one with most room and fewest prompts to compute. A prompt of which little is to be computed is not
handed off at all.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence

EngineKey = str
"""Its URL; see ``engine_port.link.Link``."""

_TYPICAL_RATE = 2000.0
"""Prompt tokens a second of an engine of which nothing is known yet; only ratios matter then."""
_SCARCE_KV = 0.25
"""Share of the KV cache below which what is free limits an engine more than its slots do."""
_REQUEST_S = 0.1
"""So much computing of prompts weighs as much as one request that an engine decodes."""


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
    WHOLE_PROMPT = "whole_prompt"
    """Log-probabilities of the prompt are wanted: one engine computes all of it."""


class Unroutable(enum.StrEnum):
    """Why a request cannot go anywhere now."""

    NO_DECODE = "no_decode"
    NO_PREFILL = "no_prefill"
    QUEUE_FOR_PREFILL = "queue_for_prefill"
    """It is to wait until a prefill engine is up."""


@dataclasses.dataclass(frozen=True, slots=True)
class Engine:
    """One engine as a frontend sees it now.

    prefill_tokens: prompt tokens that it still has to compute, of this and other frontends.
    prefill_rate: tokens a second that it was seen to compute; None if it was not.
    running: requests that it decodes. max_running: how many it can at once.
    kv_free: share of its KV cache that is free, 0 to 1.
    kind: KV goes only between engines of the same.
    """

    key: EngineKey
    role: Role
    prefill_tokens: int = 0
    prefill_rate: float | None = None
    running: int = 0
    max_running: int = 256
    kv_free: float = 1.0
    kind: str = ""

    def prefill_s(self, num_tokens: int) -> float:
        """Return how long a prompt of so many uncached tokens takes from now on, in seconds."""
        return (self.prefill_tokens + num_tokens) / (self.prefill_rate or _TYPICAL_RATE)

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
    """

    num_tokens: int
    max_tokens: int
    cached: Mapping[EngineKey, int] = dataclasses.field(default_factory=dict)
    session: EngineKey | None = None
    needs_whole_prompt: bool = False

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
    """What a choice may depend on beside the pool: how many were made before, and two numbers in
    [0, 1) drawn for this one."""

    turn: int = 0
    first: float = 0.0
    second: float = 0.5


def choose(
    engines: Sequence[Engine],
    prompt: Prompt,
    policy: Policy,
    handoff_s: float = 0.0,
    chance: Chance = Chance(),
) -> Route | Unroutable:
    """Decide where a request goes.

    engines: those that take requests. handoff_s: what a handoff was seen to add to TTFT.
    """
    prefills = [engine for engine in engines if engine.role.prefills]
    decodes = [engine for engine in engines if engine.role.decodes]
    if prompt.max_tokens == 1 and prefills:
        return Route(None, _choose_prefill(prefills, prompt, policy, chance).key, Reason.ONE_TOKEN)
    if not decodes:
        return Unroutable.NO_DECODE
    kinds = {engine.kind for engine in prefills}
    fed = [engine for engine in decodes if engine.kind in kinds]
    decode = _choose_decode(fed or decodes, prompt, policy, chance)
    if prompt.needs_whole_prompt:
        return Route(None, decode.key, Reason.WHOLE_PROMPT)
    others = [e for e in prefills if e.key != decode.key and e.kind == decode.kind]
    if not others:
        if decode.role.prefills:  # the one engine there is does both
            return Route(None, decode.key, Reason.NO_PREFILL)
        match policy.no_prefill:
            case NoPrefill.LOCAL:
                return Route(None, decode.key, Reason.NO_PREFILL)
            case NoPrefill.QUEUE:
                return Unroutable.QUEUE_FOR_PREFILL
            case NoPrefill.FAIL:
                return Unroutable.NO_PREFILL
    prefill = _choose_prefill(others, prompt, policy, chance)
    local = _local_reason(prefill, decode, prompt, policy, handoff_s)
    if local is not None:
        return Route(None, decode.key, local)
    return Route(prefill.key, decode.key, Reason.DISAGGREGATED)


def _local_reason(
    prefill: Engine, decode: Engine, prompt: Prompt, policy: Policy, handoff_s: float
) -> Reason | None:
    """Say why the decode engine is to compute the prompt itself; None when it is not."""
    uncached = prompt.uncached(decode)
    if policy.local_below is not None:
        return Reason.SHORT if uncached < policy.local_below else None
    if decode.prefill_rate is None and prefill.prefill_rate is None:
        return None  # nothing has been measured yet
    decode = dataclasses.replace(decode, prefill_rate=decode.prefill_rate or prefill.prefill_rate)
    here_s = decode.prefill_s(uncached)
    there_s = _handed_off_s(prefill, prompt, policy) + handoff_s
    disturbs = decode.running > 0 and here_s > policy.max_stall_s
    if here_s > there_s or (disturbs and not prefill.role.decodes):
        return None
    if prefill.prefill_tokens:
        return Reason.PREFILL_BUSY
    return Reason.NO_GAIN if disturbs else Reason.SHORT


def _handed_off_s(engine: Engine, prompt: Prompt, policy: Policy) -> float:
    """Return how soon an engine computes a prompt for another one, in seconds. One that decodes,
    too, has decodes of its own to hold up: it must be clearly sooner."""
    return engine.prefill_s(prompt.uncached(engine)) + policy.max_stall_s * engine.role.decodes


def _choose_prefill(
    engines: Sequence[Engine], prompt: Prompt, policy: Policy, chance: Chance
) -> Engine:
    candidates = _candidates(engines, policy.prefill, chance)
    return min(candidates, key=lambda e: (_handed_off_s(e, prompt, policy), e.key))


def _choose_decode(
    engines: Sequence[Engine], prompt: Prompt, policy: Policy, chance: Chance
) -> Engine:
    if policy.decode is Strategy.BEST:
        for engine in engines:
            if engine.key == prompt.session and engine.headroom > 0:
                return engine
    candidates = _candidates(engines, policy.decode, chance)

    def worth(engine: Engine) -> tuple[float, str]:
        # A cached prefix need not be computed there; prompts that wait there hold up the answer.
        saved = prompt.cached.get(engine.key, 0) - engine.prefill_tokens
        saved_s = saved / (engine.prefill_rate or _TYPICAL_RATE)
        return engine.headroom + saved_s / _REQUEST_S / engine.max_running, engine.key

    return max(candidates, key=worth)


def _candidates(engines: Sequence[Engine], strategy: Strategy, chance: Chance) -> list[Engine]:
    ordered = sorted(engines, key=lambda engine: engine.key)
    match strategy:
        case Strategy.BEST:
            return ordered
        case Strategy.ROUND_ROBIN:
            return [ordered[chance.turn % len(ordered)]]
        case Strategy.POWER_OF_TWO:
            first = int(chance.first * len(ordered))
            others = ordered[:first] + ordered[first + 1 :]
            if not others:
                return ordered
            return [ordered[first], others[int(chance.second * len(others))]]
