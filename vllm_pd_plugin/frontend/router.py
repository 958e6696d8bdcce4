"""Which engines the next attempt of a request goes to: what the choice is made from, kept up."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence

from vllm.v1.engine import EngineCoreRequest

from vllm_pd_plugin.frontend.requests.course import Course
from vllm_pd_plugin.frontend.requests.seeding import is_seed_safe, needs_whole_prompt
from vllm_pd_plugin.frontend.routing.choice import (
    Chance,
    Engine,
    EngineKey,
    Policy,
    Prompt,
    Reason,
    Route,
    Unroutable,
    choose,
)
from vllm_pd_plugin.frontend.routing.prefixes import PrefixIndex
from vllm_pd_plugin.frontend.telemetry.metrics import FrontendMetrics

_NEW_HANDOFF_WEIGHT = 0.1
_REMEMBERED_SESSIONS = 10_000


class Router:
    """Chooses engines.

    prefixes: what the engines have in their prefix caches.
    """

    def __init__(self, policy: Policy, metrics: FrontendMetrics) -> None:
        self.prefixes = PrefixIndex()
        self._policy = policy
        self._metrics = metrics
        self._turn = 0
        self._handoff_s = 0.0
        self._random = random.Random()
        self._sessions: OrderedDict[str, EngineKey] = OrderedDict()

    def handed_off(self, seconds: float) -> None:
        """Learn how long a handoff takes: from the first token of a prompt to the second."""
        self._handoff_s += _NEW_HANDOFF_WEIGHT * (seconds - self._handoff_s)

    def missing(self, engines: Sequence[Engine]) -> Unroutable | None:
        """Return what keeps any request from being served by these; None where nothing does."""
        route = choose(engines, Prompt(1_000_000, 2), self._policy)
        return None if isinstance(route, Route) else route

    def route(self, course: Course, engines: Sequence[Engine]) -> Route | Unroutable:
        """Choose among engines for the next attempt of a course."""
        self._turn += 1
        chance = Chance(self._turn, self._random.random(), self._random.random())
        session = course.request.session_id
        prompt = Prompt(
            len(course.prompt),
            course.max_tokens,
            self.prefixes.cached(course.prompt) if _uses_plain_cache(course.request) else {},
            self._sessions.get(session) if session else None,
            needs_whole_prompt=needs_whole_prompt(course.params),
        )
        # The client has its first token when the prefill engine has, if that may be passed on.
        handoff_s = 0.0 if is_seed_safe(course.params) else self._handoff_s
        route = choose(engines, prompt, self._policy, handoff_s, chance)
        if isinstance(route, Route):
            self._metrics.routed(route)
            is_for_prefill = route.reason is not Reason.SHORT or self._policy.local_below is None
            if course.route is None and is_for_prefill:
                cached = prompt.cached.get(route.prefill or route.decode, 0)
                self._metrics.is_to_compute(max(1, prompt.num_tokens - cached))
            if session:
                self._remember(session, route.decode)
        return route

    def _remember(self, session: str, engine: EngineKey) -> None:
        self._sessions[session] = engine
        self._sessions.move_to_end(session)
        if len(self._sessions) > _REMEMBERED_SESSIONS:
            self._sessions.popitem(last=False)


def _uses_plain_cache(request: EngineCoreRequest) -> bool:
    """Whether a prompt's KV can be what another prompt with the same text has left behind."""
    return not request.lora_request and not request.cache_salt
