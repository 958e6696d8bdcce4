"""How many engines a pool needs; pure functions of what the frontends have seen.

Prefill engines must keep up with the prompt tokens that arrive, and work off what waits; a queue
must not take too much of the TTFT objective. Decode engines must hold the requests that arrive for
as long as an answer takes, by slots, by KV memory and by the TPOT objective. Both needs come from
*arrivals*, so that one pool grows with the other's work before that has come through: what arrives
fixes the ratio between them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from vllm_pd_plugin.frontend.routing.choice import EngineKey, Role

_BUSY = 0.8
"""Share of its time that an engine may be planned to be busy: queues grow without end above."""
_QUEUE_SHARE = 0.5
"""Share of the TTFT objective that a prompt may wait in a queue; computing it takes the rest."""
_RECOVERY_S = 30.0
"""In which a queue is worked off: an engine takes about as long to start, so sooner is for none."""
_FULL = 0.85
"""Share of slots, KV memory and the TPOT objective that may be planned to be in use."""
_SLACK = 0.15
"""An engine is given up only when so much of one is left over, or a pool would swing."""
_IDLE = 0.02
"""A pool of which less than this is needed may go down to no engine at all."""
_TYPICAL_RATE = 2000.0
_FALLBACK_TTFT_S, _FALLBACK_TPOT_S = 2.0, 0.1
"""Objectives where the operator has named none."""


@dataclasses.dataclass(frozen=True, slots=True)
class EngineSeen:
    """One engine as a frontend sees it; see ``routing.choice.Engine``.

    waiting_tokens: prompt tokens that it has yet to compute, whoever sent them.
    running: requests that it works on, or that wait there for a slot.
    """

    role: Role
    waiting_tokens: int
    prefill_rate: float | None
    running: int
    max_running: int
    kv_usage: float


@dataclasses.dataclass(frozen=True, slots=True)
class Demand:
    """What one frontend has seen in the last seconds.

    requests_per_s: that have arrived. prompt_tokens_per_s: of them that no engine had in its prefix
    cache. answer_tokens: of a mean answer.
    itl_s: mean time between two tokens of a request; None when there were none. decoding: how many
    requests have decoded at a time, on average.
    waiting: requests, and waiting_tokens prompt tokens of those, that no engine has got yet.
    """

    requests_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    answer_tokens: float = 0.0
    itl_s: float | None = None
    decoding: float = 0.0
    waiting: int = 0
    waiting_tokens: int = 0
    engines: Mapping[EngineKey, EngineSeen] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Targets:
    """Objectives that pools are sized for, in seconds."""

    ttft_s: float = _FALLBACK_TTFT_S
    tpot_s: float = _FALLBACK_TPOT_S


def together(demands: Iterable[Demand]) -> Demand:
    """Return what several frontends have seen: their traffic added, the engines seen once."""
    seen = list(demands)
    requests = sum(each.requests_per_s for each in seen)
    engines: dict[EngineKey, EngineSeen] = {}
    for each in seen:
        engines.update(each.engines)
    decoding = sum(each.decoding for each in seen)
    itl_s = sum(each.itl_s * each.decoding for each in seen if each.itl_s)
    return Demand(
        requests,
        sum(each.prompt_tokens_per_s for each in seen),
        sum(each.answer_tokens * each.requests_per_s for each in seen) / requests
        if requests
        else max((each.answer_tokens for each in seen), default=0.0),
        itl_s / decoding if decoding else None,
        decoding,
        sum(each.waiting for each in seen),
        sum(each.waiting_tokens for each in seen),
        engines,
    )


def prefill_need(demand: Demand, targets: Targets) -> float:
    """Return how many prefill engines are needed; a fraction."""
    engines = [engine for engine in demand.engines.values() if engine.role is Role.PREFILL]
    rate = _prefill_rate(demand.engines.values())
    queued = demand.waiting_tokens + sum(engine.waiting_tokens for engine in engines)
    need = demand.prompt_tokens_per_s / rate / _BUSY + queued / rate / _RECOVERY_S
    if engines and queued / rate / len(engines) > _QUEUE_SHARE * targets.ttft_s:
        return max(need, len(engines) + _SLACK)  # one more
    return max(need, _SLACK) if queued else need


def decode_need(demand: Demand, targets: Targets) -> float:
    """Return how many decode engines are needed; a fraction."""
    engines = [engine for engine in demand.engines.values() if engine.role is Role.DECODE]
    # Little's law: what arrives is there for as long as its answer takes.
    expected = demand.requests_per_s * demand.answer_tokens * (demand.itl_s or targets.tpot_s)
    running = sum(engine.running for engine in engines)
    requests = max(running, expected) + demand.waiting
    if not engines:
        return min(1.0, requests)
    slots = sum(engine.max_running for engine in engines) / len(engines)
    kv_each = sum(engine.kv_usage for engine in engines) / max(1, running)
    by_itl = 0.0
    if demand.itl_s and demand.decoding >= 1:
        # A step takes at most in proportion longer when an engine has more requests; and more
        # engines than requests make none shorter.
        load = max(demand.decoding, expected)
        longer = demand.itl_s / targets.tpot_s / _FULL * load / demand.decoding
        by_itl = min(len(engines) * longer, load)
    return max(requests / slots / _FULL, requests * kv_each / _FULL, by_itl)


def replicas(need: float, current: int) -> int:
    """Return how many engines a pool should have, from how many are needed; it keeps what it has
    unless clearly fewer are enough."""
    wanted = math.ceil(need - 1e-9)
    if need <= _IDLE:
        return 0
    if wanted >= current:
        return wanted
    return max(1, wanted) if need <= current - 1 - _SLACK else current


def move(
    flexible: Mapping[EngineKey, Role], fixed: Mapping[Role, int], needs: Mapping[Role, float]
) -> tuple[EngineKey, Role] | None:
    """Return which engine should work for the other pool, and which that is; None when none.

    flexible: engines that may move, and what each does now. fixed: engines that may not, by role.
    """
    if fixed.get(Role.DECODE, 0) + sum(role is Role.DECODE for role in flexible.values()) == 0:
        # Without prefill engines all goes on; without one that decodes nothing does.
        return (min(flexible), Role.DECODE) if flexible else None
    for starving, other in ((Role.DECODE, Role.PREFILL), (Role.PREFILL, Role.DECODE)):
        movable = sorted(key for key, role in flexible.items() if role is other)
        have = {
            role: fixed.get(role, 0) + sum(each is role for each in flexible.values())
            for role in (starving, other)
        }
        lacks = needs[starving] > have[starving]
        can_spare = needs[other] <= have[other] - 1 - _SLACK
        if movable and lacks and can_spare:
            return movable[0], starving
    return None


def first_duty(counts: Mapping[Role, int]) -> Role:
    """Return for which pool an engine works that has just come: the smaller one."""
    return min((Role.DECODE, Role.PREFILL), key=lambda role: counts.get(role, 0))


def _prefill_rate(engines: Iterable[EngineSeen]) -> float:
    """Return how many prompt tokens a second one engine computes."""
    seen = list(engines)
    for prefills in (True, False):
        rates = [e.prefill_rate for e in seen if e.prefill_rate and e.role.prefills is prefills]
        if rates:
            return sum(rates) / len(rates)
    return _TYPICAL_RATE
