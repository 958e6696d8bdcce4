"""The engines of a frontend, and what is known of each now."""

from __future__ import annotations

import dataclasses
import enum
from collections import deque
from collections.abc import Callable, Collection, Iterator
from random import Random
from typing import Any

from vllm_pd_plugin.codecs.codec import AUTO, Codec
from vllm_pd_plugin.engine_port.link import Link
from vllm_pd_plugin.engine_port.messages import EngineLoad, State
from vllm_pd_plugin.frontend.admission import Capacity
from vllm_pd_plugin.frontend.pool.breakers import Breaker
from vllm_pd_plugin.frontend.pool.groups import Group
from vllm_pd_plugin.frontend.pool.work import Share, Work
from vllm_pd_plugin.frontend.requests.legs import Leg
from vllm_pd_plugin.frontend.routing.choice import Engine, EngineKey, Role
from vllm_pd_plugin.memory.identity import KvIdentity

_NEW_RATE_WEIGHT = 0.2
_STEPS_AHEAD, _SECONDS_AHEAD = 8, 2.0
"""An engine gets prompts for so many steps, or so much time, in advance; more wait here."""
_ALL_LOOKED_AT, _DRAWN = 32, 8
"""In a larger pool a route looks at so many engines of each role, and not at all of them."""
_CAPACITY_AGE_S = 0.25


class MemberState(enum.StrEnum):
    UP = "up"
    DOWN = "down"
    DRAINING = "draining"
    BROKEN = "broken"
    """Its circuit breaker is open: it gets requests only if there is no other."""


@dataclasses.dataclass(slots=True, eq=False)
class Member:
    """One engine of the pool.

    role: as the operator has sorted it in.
    load: what it has said last; ``_share_then`` was this frontend's part in it.
    other_frontends: how many beside this one have attached to it, as it has said last.
    """

    key: EngineKey
    role: Role
    link: Link
    generation: str = ""
    drain_until: float | None = None
    """Set when it gets nothing new: when what is left on it goes on elsewhere; see ``Wanted``."""
    mismatch: str = ""
    """Why it cannot be used though it is there."""
    kind: str = ""
    """What engines of its generation whose KV is the same have in common."""
    kv: KvIdentity | None = None
    """What its KV is, as it has said last; None while it was never there."""
    incarnation: str = ""
    """Which run of the engine was there last."""
    is_known: bool = False
    """Whether it has attached, and was not lost since."""
    tokens_given: int = 0
    moved_at: float = 0.0
    """When it was last seen to have done something, for anybody."""
    load: EngineLoad = EngineLoad()
    legs: Work = dataclasses.field(default_factory=Work)
    prefill_rate: float | None = None
    breaker: Breaker = dataclasses.field(default_factory=Breaker)
    other_frontends: int = 0
    _share_then: Share = Share()
    _unheard: deque[tuple[int, Leg]] = dataclasses.field(default_factory=deque)
    """Legs that were sent, by their numbers, and were not yet in what it has said last."""
    _seen: tuple[tuple[Any, ...], Engine] | None = None
    """The last snapshot, and what it was made from."""

    @property
    def takes_requests(self) -> bool:
        return self.is_up and not self.is_draining

    @property
    def is_up(self) -> bool:
        return self.link.is_attached and not self.mismatch

    @property
    def problem(self) -> str:
        """Why it cannot be used now; empty when it can."""
        return self.mismatch or self.link.problem

    def state(self, now: float) -> MemberState:
        if not self.is_up:
            return MemberState.DOWN
        if self.is_draining:
            return MemberState.DRAINING
        return MemberState.UP if self.breaker.admits(now) else MemberState.BROKEN

    @property
    def is_draining(self) -> bool:
        return self.drain_until is not None

    def at_work(self) -> set[Leg]:
        """Return the legs one of which may be what the engine was lost to: of those that have got
        nothing from it, the ones that it works on, and the next one. What it decodes has gone well
        so far."""
        silent = [leg for leg in self.legs if not leg.has_output]
        begun = {leg for leg in silent if leg.begun_at}
        waiting = [leg for leg in silent if not leg.begun_at]
        return begun | set(sorted(waiting, key=lambda leg: leg.started_at)[:1])

    def computed(self, num_tokens: int, seconds: float) -> None:
        """It was seen to compute so much of a prompt."""
        if num_tokens < 16 or seconds <= 0:
            return
        rate = num_tokens / seconds
        before = self.prefill_rate
        self.prefill_rate = rate if before is None else before + _NEW_RATE_WEIGHT * (rate - before)

    def send(self, leg: Leg, payload: list[bytes]) -> None:
        """Give it a leg, as its link has written it down."""
        self.legs.add(leg)
        self.breaker.began(leg.id, leg.started_at)
        self._unheard.append((self.link.add(leg.id, payload), leg))

    def set_load(self, load: EngineLoad, last_add: int | None = None) -> None:
        """It says how busy it is.

        last_add: the number of the last leg that is in this; None if it does not say: all are.
        """
        while self._unheard and (last_add is None or self._unheard[0][0] <= last_add):
            self._unheard.popleft()
        self.load, self._share_then = load, self.legs.share_without(leg for _, leg in self._unheard)

    def told(self, state: State, now: float) -> None:
        """It says how busy it is, and with what."""
        if state.load.num_steps != self.load.num_steps:
            self.moved_at = now
        self.set_load(state.load, state.last_add)
        self.other_frontends = max(0, state.num_frontends - 1)
        begun, preempted = set(state.begun), set(state.preempted)
        for leg in self.legs:
            leg.is_preempted = leg.has_output and leg.id in preempted
            leg.begun_at = (leg.begun_at or now) if leg.id in begun else 0.0

    def snapshot(self, is_broken: bool = False) -> Engine:
        """Return what routing may know: own requests exactly, those of others as last told."""
        basis = (
            self.legs.version, self._share_then, self.load, self.prefill_rate, self.role, self.kind,
            self.other_frontends, self.link.description, is_broken,
        )  # fmt: skip
        if self._seen is None or self._seen[0] != basis:
            self._seen = basis, self._snapshot(is_broken)
        return self._seen[1]

    def _snapshot(self, is_broken: bool) -> Engine:
        then, now = self._share_then, self.legs.share
        others_tokens = max(0, self.load.waiting_tokens - then.waiting_tokens)
        others_running = max(0, self.load.running + self.load.waiting - then.requests)
        more_kv = now.kv_tokens - then.kv_tokens
        kv_usage = self.load.kv_usage + more_kv / max(1, self.link.description.kv_tokens)
        return Engine(
            self.key,
            self.role,
            others_tokens + self.legs.to_compute,
            self.prefill_rate,
            others_running + now.running,
            max(1, self.link.description.max_num_seqs),
            min(1.0, max(0.0, 1.0 - kv_usage)),
            self.kind,
            is_broken,
            max(
                _STEPS_AHEAD * self.link.description.max_num_batched_tokens,
                int(_SECONDS_AHEAD * (self.prefill_rate or 0.0)),
            ),
            self.other_frontends,
        )


class Pool:
    """Every engine that a frontend was told of."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._random = Random()
        self._members: dict[EngineKey, Member] = {}
        self._groups: dict[tuple[bool, str], Group] | None = None
        """Who decodes (or else prefills) in each kind; None while they are not sorted."""
        self._capacity: tuple[float, Capacity] | None = None

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    def __len__(self) -> int:
        return len(self._members)

    @property
    def is_large(self) -> bool:
        """Whether a route looks at some of the engines only."""
        return len(self._members) > _ALL_LOOKED_AT

    def get(self, key: EngineKey) -> Member | None:
        return self._members.get(key)

    def __getitem__(self, key: EngineKey) -> Member:
        return self._members[key]

    def add(self, member: Member) -> None:
        self._members[member.key] = member
        self.changed()

    def remove(self, key: EngineKey) -> Member:
        self.changed()
        return self._members.pop(key)

    def behind_s(self) -> float:
        """Return for how long messages of engines wait here to be taken."""
        return max((member.link.behind_s for member in self), default=0.0)

    def changed(self) -> None:
        """Who is there, as what, or of which kind may be another now."""
        self._groups = None

    def freed(self, member: Member) -> bool:
        """Something has happened that may let an engine take a request; say whether it can."""
        if not member.takes_requests or member.snapshot().is_full:
            return False
        if self._groups is not None:
            for decodes in _abilities(member.role):
                if group := self._groups.get((decodes, member.kind)):
                    group.freed(member)
        return True

    def usable(self, excluded: Collection[EngineKey] = (), with_lora: bool = False) -> list[Engine]:
        """Return the engines that take requests. Those that have failed are left out, where there
        are others of their role. with_lora: only those that take LoRA adapters."""
        now = self._clock()
        up = [m for m in self._members.values() if m.takes_requests]
        if with_lora:
            up = [m for m in up if m.link.description.has_lora]
        good = [m for m in up if m.key not in excluded and m.breaker.admits(now)]
        chosen = list(good)
        if not any(m.role.prefills for m in good):
            chosen += [m for m in up if m.role.prefills and m not in chosen]
        if not any(m.role.decodes for m in good):
            chosen += [m for m in up if m.role.decodes and m not in chosen]
        return [member.snapshot(not member.breaker.admits(now)) for member in chosen]

    def candidates(
        self, excluded: Collection[EngineKey], near: Collection[EngineKey] = ()
    ) -> list[Engine]:
        """Return the engines that one route looks at: those of ``usable``, or in a large pool some
        of them, drawn at random from those that have room, if any has.

        near: engines that are among them if they can be used.
        """
        if not self.is_large:
            return self.usable(excluded)
        now = self._clock()

        def is_good(member: Member) -> bool:
            return member.key not in excluded and member.breaker.admits(now)

        chosen: dict[EngineKey, Engine] = {}
        groups = self._sorted()
        for ability in (False, True):
            own = [group for (decodes, _), group in groups.items() if decodes is ability]
            found: list[Engine] = []
            for group in own:
                some = group.draw(_DRAWN, is_good)
                found += some or [m.snapshot() for m in group.some(_DRAWN, is_good)]
            if not found:
                rest = [member for group in own for member in group.some(_DRAWN, lambda _: True)]
                found = [member.snapshot(not member.breaker.admits(now)) for member in rest]
            chosen.update((engine.key, engine) for engine in found)
        for key in near:
            member = self._members.get(key)
            if member is not None and member.takes_requests and is_good(member):
                chosen[key] = member.snapshot()
        return list(chosen.values())

    def allowed_codecs(self) -> set[str]:
        """Return the codecs that a client may ask for: every engine that decodes allows them."""
        decodes = [m.link.description for m in self if m.is_up and m.role.decodes]
        allowed = [set(description.codecs) for description in decodes]
        return set.intersection(*allowed) if allowed else {AUTO, *Codec}

    def capacity(self) -> Capacity | None:
        """Return what the engines that take requests can do; None where there are none. Of a large
        pool it is some time old."""
        now = self._clock()
        if self._capacity is not None and self.is_large:
            looked_at, capacity = self._capacity
            if now - looked_at < _CAPACITY_AGE_S:
                return capacity
        engines = self.usable()
        if not engines:
            return None
        self._capacity = now, Capacity.of(engines)
        return self._capacity[1]

    def _sorted(self) -> dict[tuple[bool, str], Group]:
        if self._groups is None:
            self._groups = {}
            for member in self._members.values():
                for decodes in _abilities(member.role):
                    place = decodes, member.kind
                    self._groups.setdefault(place, Group(self._random)).add(member)
        return self._groups


def _abilities(role: Role) -> list[bool]:
    """Return which groups a role is in: those that prefill, those that decode."""
    return [decodes for decodes, can in ((False, role.prefills), (True, role.decodes)) if can]
