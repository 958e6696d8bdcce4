"""Which engines the next attempt of a request goes to: what the choice is made from, kept up."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Collection, Container, Sequence

from vllm.v1.engine import EngineCoreRequest

from vllm_pd_plugin.frontend.pool.members import Pool
from vllm_pd_plugin.frontend.requests.course import Course
from vllm_pd_plugin.frontend.requests.seeding import is_seed_safe, needs_whole_prompt
from vllm_pd_plugin.frontend.routing.choice import (
    Chance,
    Engine,
    EngineKey,
    Pair,
    Policy,
    Prompt,
    Reason,
    Route,
    Strategy,
    Unroutable,
)
from vllm_pd_plugin.frontend.routing.choosing import choose
from vllm_pd_plugin.frontend.routing.prefixes import PrefixIndex
from vllm_pd_plugin.frontend.telemetry.metrics import FrontendMetrics

_NEW_HANDOFF_WEIGHT = 0.1
_REMEMBERED_SESSIONS = 10_000
_MOST_HOLDERS = 8
"""So many of the engines that have most of a prompt are looked at, however large the pool is."""


class Router:
    """Chooses engines.

    prefixes: what the engines have in their prefix caches.
    name: this frontend's; others choose otherwise among equals.
    """

    def __init__(self, policy: Policy, metrics: FrontendMetrics, name: str) -> None:
        self.prefixes = PrefixIndex()
        self._name = name
        self._policy = policy
        self._metrics = metrics
        self._turn = 0
        self._handoff_s = 0.0
        self._random = random.Random()
        self._sessions: OrderedDict[bytes, EngineKey] = OrderedDict()

    def handed_off(self, seconds: float) -> None:
        """Learn how long a handoff takes: from the first token of a prompt to the second."""
        self._handoff_s += _NEW_HANDOFF_WEIGHT * (seconds - self._handoff_s)

    def missing(self, engines: Sequence[Engine]) -> Unroutable | None:
        """Return what keeps any request from being served by these; None where nothing does."""
        route = choose(engines, Prompt(1_000_000, 2), self._policy)
        if isinstance(route, Route) or route is Unroutable.FULL:
            return None
        return route

    def route(
        self, course: Course, pool: Pool, blocked: Container[Pair] = ()
    ) -> Route | Unroutable:
        """Choose among a pool's engines for the next attempt of a course; see ``choose``."""
        self._turn += 1
        chance = Chance(self._turn, self._random.random(), self._random.random(), self._name)
        session, siblings = course.session, course.siblings
        before = self._sessions.get(session) if session else None
        named = course.named_prompt if _uses_plain_cache(course.request) else None
        near = self.prefixes.holders(named, _MOST_HOLDERS) if named is not None else []
        engines = self._candidates(course, pool, [*near, *_known(before, siblings.route)])
        has: dict[EngineKey, int] = {}
        if named is not None and near:
            has = self.prefixes.cached(named, [engine.key for engine in engines])
        prompt = Prompt(
            len(course.prompt),
            course.max_tokens,
            has,
            before,
            needs_whole_prompt=needs_whole_prompt(course.params),
            handoff_failed=course.handoff_failed,
            # Another attempt goes where it is best now.
            beside=siblings.route if course.route is None else None,
            is_beam=siblings.are_beams,
        )
        # The client has its first token when the prefill engine has, if that may be passed on.
        handoff_s = 0.0 if is_seed_safe(course.params) else self._handoff_s
        route = choose(engines, prompt, self._policy, handoff_s, chance, blocked)
        if isinstance(route, Route):
            had = prompt.cached.get(route.prefill or route.decode, 0)
            follows = route is prompt.beside  # its prompt is computed for another one
            course.to_compute = 1 if follows else max(1, prompt.num_tokens - had)
            siblings.route = route
            self._metrics.routed(route)
            is_for_prefill = route.reason is not Reason.SHORT or self._policy.local_below is None
            if course.route is None and is_for_prefill:
                self._metrics.is_to_compute(course.to_compute)
            if session:
                self._remember(session, route.decode)
        return route

    def _candidates(
        self, course: Course, pool: Pool, near: Collection[EngineKey]
    ) -> Sequence[Engine]:
        """Return which engines are looked at: all where all are needed to choose."""
        with_lora = course.request.lora_request is not None
        if with_lora or Strategy.ROUND_ROBIN in (self._policy.prefill, self._policy.decode):
            return pool.usable(course.excluded, with_lora)
        return pool.candidates(course.excluded, near)

    def _remember(self, session: bytes, engine: EngineKey) -> None:
        self._sessions[session] = engine
        self._sessions.move_to_end(session)
        if len(self._sessions) > _REMEMBERED_SESSIONS:
            self._sessions.popitem(last=False)


def _uses_plain_cache(request: EngineCoreRequest) -> bool:
    """Whether a prompt's KV can be what another prompt with the same text has left behind."""
    return not request.lora_request and not request.cache_salt


def _known(session: EngineKey | None, siblings: Route | None) -> list[EngineKey]:
    """Return the engines that have worked for a request's session, and for its other choices."""
    routes = [] if siblings is None else [siblings.prefill, siblings.decode]
    return [key for key in (session, *routes) if key is not None]
