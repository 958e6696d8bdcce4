"""Which engines work on a request; pure functions of a snapshot of the pool.

The prefill engine is the one whose first token is predicted to come first, the decode engine the
one with most room and fewest prompts to compute. A prompt of which little is to be computed is not
handed off at all.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Container, Sequence
from typing import TypeVar

from vllm_pd_plugin.frontend.routing.choice import (
    TYPICAL_RATE,
    Chance,
    Engine,
    EngineKey,
    NoPrefill,
    Pair,
    Policy,
    Prompt,
    Reason,
    Role,
    Route,
    Strategy,
    Unroutable,
)

T = TypeVar("T")

NO_CHANCE = Chance()
"""For who wants the same choice every time."""

_REACH = 0.5
"""A session, or another part of a request, goes to an engine that has so much more headroom than
the one where it was."""
_REQUEST_S = 0.1
"""So much computing of prompts weighs as much as one request that an engine decodes."""


def choose(
    engines: Sequence[Engine],
    prompt: Prompt,
    policy: Policy,
    handoff_s: float = 0.0,
    chance: Chance = NO_CHANCE,
    blocked: Container[Pair] = (),
) -> Route | Unroutable:
    """Decide where a request goes.

    engines: those that take requests. handoff_s: what a handoff was seen to add to TTFT.
    blocked: pairs between which no handoff is tried now.
    """
    if prompt.beside is not None and _can_follow(prompt.beside, engines, prompt, blocked):
        return prompt.beside
    prefills = [engine for engine in engines if engine.role.prefills]
    decodes = [engine for engine in engines if engine.role.decodes]
    sound = [engine for engine in prefills if not engine.is_broken]
    if prompt.max_tokens == 1 and not prompt.is_beam and (sound or (prefills and not decodes)):
        free = [engine for engine in sound or prefills if not engine.is_full]
        if not free:
            return Unroutable.FULL
        one = _choose_prefill(free, prompt, policy, chance)
        return Route(None, one.key, Reason.ONE_TOKEN)
    if not decodes:
        return Unroutable.NO_DECODE
    decodes = [engine for engine in decodes if not engine.is_full]
    if not decodes:
        return Unroutable.FULL
    kinds = {engine.kind for engine in prefills}
    fed = [engine for engine in decodes if engine.kind in kinds]
    decode = _choose_decode(fed or decodes, prompt, policy, chance)
    if prompt.is_beam:
        return Route(None, decode.key, Reason.BEAM_SEARCH)
    if prompt.needs_whole_prompt:
        return Route(None, decode.key, Reason.WHOLE_PROMPT)
    if prompt.handoff_failed:
        return Route(None, decode.key, Reason.HANDOFF_FAILED)
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
    able = [e for e in others if not e.is_broken and (e.key, decode.key) not in blocked]
    if not able:
        return Route(None, decode.key, Reason.HANDOFF_FAILED)
    prefill = _choose_prefill(
        [engine for engine in able if not engine.is_full] or able, prompt, policy, chance
    )
    local = _local_reason(prefill, decode, prompt, policy, handoff_s)
    if local is not None:
        return Route(None, decode.key, local)
    if prefill.is_full:
        return Unroutable.FULL
    return Route(prefill.key, decode.key, Reason.DISAGGREGATED)


def _can_follow(
    route: Route, engines: Sequence[Engine], prompt: Prompt, blocked: Container[Pair]
) -> bool:
    """Say whether another part of a request may go where one has gone, whose prompt is there: it
    need not be computed again, so that a queue of prompts is none for it."""
    if (route.reason is Reason.ONE_TOKEN) != (prompt.max_tokens == 1 and not prompt.is_beam):
        return False
    there = {engine.key: engine for engine in engines}
    decode = there.get(route.decode)
    if decode is None or not decode.has_slots:
        return False
    if decode.role.decodes and not _is_near_best(decode, [e for e in engines if e.role.decodes]):
        return False
    if route.prefill is None:
        return True
    prefill = there.get(route.prefill)
    return (
        prefill is not None
        and prefill.kind == decode.kind
        and not prefill.is_broken
        and not prompt.handoff_failed
        and (prefill.key, decode.key) not in blocked
    )


def _is_near_best(engine: Engine, engines: Sequence[Engine]) -> bool:
    """Say whether an engine has room, and none of these has much more."""
    most = max(engine.headroom for engine in engines)
    return engine.headroom > max(0.0, most - _REACH)


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
    # Where all prefill engines have enough to do, a prompt that is computed here is a stall for
    # some; one that waits for them is late, and everything behind it.
    spares_decodes = disturbs and not prefill.role.decodes and not prefill.is_full
    if here_s > there_s or spares_decodes:
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

    def near_s(best: Engine) -> float:
        return prompt.uncached(best) / (best.prefill_rate or TYPICAL_RATE)

    return _cheapest(candidates, lambda e: _handed_off_s(e, prompt, policy), near_s, chance)


def _choose_decode(
    engines: Sequence[Engine], prompt: Prompt, policy: Policy, chance: Chance
) -> Engine:
    if policy.decode is Strategy.BEST and prompt.session is not None:
        for engine in engines:
            if engine.key == prompt.session and _is_near_best(engine, engines):
                return engine
    candidates = _candidates(engines, policy.decode, chance)

    def cost(engine: Engine) -> float:
        # A cached prefix need not be computed there; prompts that wait there hold up the answer.
        saved = prompt.cached.get(engine.key, 0) - engine.prefill_tokens
        saved_s = saved / (engine.prefill_rate or TYPICAL_RATE)
        return -engine.headroom - saved_s / _REQUEST_S / engine.max_running

    return _cheapest(candidates, cost, lambda best: 1 / best.max_running, chance)


def _cheapest(
    engines: Sequence[Engine],
    cost: Callable[[Engine], float],
    near: Callable[[Engine], float],
    chance: Chance,
) -> Engine:
    """Return the engine of least cost. Which one that is of equals differs between frontends.

    near: what one request like this adds to the cost of the best engine. Every other frontend may
        have sent it one that this one does not know of yet: engines within so much of the best are
        as good as that, and the better of two of them at random is taken, so that frontends that
        have seen the same do not all do the same.
    """
    costs = [cost(engine) for engine in engines]
    least = min(costs)
    others = max(engine.other_frontends for engine in engines)
    limit = least
    if others:
        limit += others * near(engines[costs.index(least)])
    equals = [(each, engine) for each, engine in zip(costs, engines, strict=True) if each <= limit]
    if len(equals) == 1:
        return equals[0][1]
    if others:
        two = _two_of(sorted(equals, key=lambda each: each[1].key), chance)
        return min(two, key=lambda each: each[0])[1]
    return min((engine for _, engine in equals), key=lambda e: _liking(chance.frontend, e))


def _liking(frontend: str, engine: Engine) -> tuple[bool, int, EngineKey]:
    """Return a rank of an engine that is another one for each frontend (rendezvous hashing), by
    name alone where the frontend has none; what does one thing goes before what does both."""
    weight = zlib.crc32(f"{frontend} {engine.key}".encode()) if frontend else 0
    return engine.role is Role.BOTH, weight, engine.key


def _candidates(engines: Sequence[Engine], strategy: Strategy, chance: Chance) -> Sequence[Engine]:
    match strategy:
        case Strategy.BEST:
            return engines
        case Strategy.ROUND_ROBIN:
            ordered = sorted(engines, key=lambda engine: engine.key)
            return [ordered[chance.turn % len(ordered)]]
        case Strategy.POWER_OF_TWO:
            return _two_of(sorted(engines, key=lambda engine: engine.key), chance)


def _two_of(ordered: Sequence[T], chance: Chance) -> list[T]:
    """Return two of these at random, or all where there are no more."""
    first = int(chance.first * len(ordered))
    others = [*ordered[:first], *ordered[first + 1 :]]
    if not others:
        return list(ordered)
    return [ordered[first], others[int(chance.second * len(others))]]
