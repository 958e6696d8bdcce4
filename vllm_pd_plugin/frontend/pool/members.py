"""The engines of a frontend, and what is known of each now."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator

from vllm_pd_plugin.engine_port.link import Link
from vllm_pd_plugin.engine_port.messages import EngineLoad
from vllm_pd_plugin.frontend.requests.course import Leg
from vllm_pd_plugin.frontend.requests.legs import LegKind
from vllm_pd_plugin.frontend.routing.choice import Engine, EngineKey, Role
from vllm_pd_plugin.memory.identity import KvIdentity

_FAILURES_TO_OPEN = 3
_COOL_DOWN_S = 5.0
_NEW_RATE_WEIGHT = 0.2


class MemberState(enum.StrEnum):
    UP = "up"
    DOWN = "down"
    DRAINING = "draining"
    BROKEN = "broken"
    """Its circuit breaker is open: it gets requests only if there is no other."""


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """This frontend's part in what an engine has to do.

    waiting_tokens: of prompts that it still has to compute. requests: all that it works on.
    kv_tokens: of the prompts of these, whose KV it holds or will hold.
    """

    waiting_tokens: int = 0
    requests: int = 0
    kv_tokens: int = 0


@dataclasses.dataclass(slots=True, eq=False)
class Member:
    """One engine of the pool.

    role: as the operator has sorted it in.
    load: what it has said last; ``_share_then`` was this frontend's part in it.
    """

    key: EngineKey
    role: Role
    link: Link
    generation: str = ""
    drain_until: float | None = None
    """Set when it gets nothing new: when what is left on it goes on elsewhere; see ``Wanted``."""
    mismatch: str = ""
    kind: str = ""
    """What engines of its generation whose KV is the same have in common."""
    """Why it cannot be used though it is there."""
    kv: KvIdentity | None = None
    """What its KV is, as it has said last; None while it was never there."""
    tokens_given: int = 0
    load: EngineLoad = EngineLoad()
    legs: set[Leg] = dataclasses.field(default_factory=set)
    prefill_rate: float | None = None
    _share_then: Share = Share()
    _failures: int = 0
    _open_until: float = 0.0

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
        return MemberState.BROKEN if self.is_broken(now) else MemberState.UP

    @property
    def is_draining(self) -> bool:
        return self.drain_until is not None

    @property
    def own_tokens(self) -> int:
        """Prompt tokens of this frontend's requests that it still has to compute."""
        return sum(
            leg.num_tokens
            for leg in self.legs
            if leg.kind is not LegKind.DECODE and not leg.has_output
        )

    @property
    def share(self) -> Share:
        return Share(self.own_tokens, len(self.legs), sum(leg.num_tokens for leg in self.legs))

    @property
    def own_running(self) -> int:
        return sum(leg.kind is not LegKind.PREFILL for leg in self.legs)

    def is_broken(self, now: float) -> bool:
        """Whether its circuit breaker is open: it has failed requests one after another."""
        return now < self._open_until

    def failed(self, now: float) -> None:
        """A request has failed on it, though it is there."""
        self._failures += 1
        if self._failures >= _FAILURES_TO_OPEN:
            self._open_until = now + _COOL_DOWN_S  # the first failure after that opens it again

    def worked(self) -> None:
        self._failures, self._open_until = 0, 0.0

    def computed(self, num_tokens: int, seconds: float) -> None:
        """It was seen to compute so much of a prompt."""
        if num_tokens < 16 or seconds <= 0:
            return
        rate = num_tokens / seconds
        before = self.prefill_rate
        self.prefill_rate = rate if before is None else before + _NEW_RATE_WEIGHT * (rate - before)

    def set_load(self, load: EngineLoad) -> None:
        self.load, self._share_then = load, self.share

    def snapshot(self) -> Engine:
        """Return what routing may know: own requests exactly, those of others as last told."""
        then, now = self._share_then, self.share
        others_tokens = max(0, self.load.waiting_tokens - then.waiting_tokens)
        others_running = max(0, self.load.running + self.load.waiting - then.requests)
        more_kv = now.kv_tokens - then.kv_tokens
        kv_usage = self.load.kv_usage + more_kv / max(1, self.link.description.kv_tokens)
        return Engine(
            self.key,
            self.role,
            others_tokens + now.waiting_tokens,
            self.prefill_rate,
            others_running + self.own_running,
            max(1, self.link.description.max_num_seqs),
            min(1.0, max(0.0, 1.0 - kv_usage)),
            self.kind,
        )


class Pool:
    """Every engine that a frontend was told of."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._members: dict[EngineKey, Member] = {}

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    def __len__(self) -> int:
        return len(self._members)

    def get(self, key: EngineKey) -> Member | None:
        return self._members.get(key)

    def __getitem__(self, key: EngineKey) -> Member:
        return self._members[key]

    def add(self, member: Member) -> None:
        self._members[member.key] = member

    def remove(self, key: EngineKey) -> Member:
        return self._members.pop(key)

    def usable(self, excluded: set[EngineKey]) -> list[Engine]:
        """Return the engines that take requests. Those that have failed are left out, where there
        are others of their role."""
        now = self._clock()
        up = [m for m in self._members.values() if m.is_up and not m.is_draining]
        good = [m for m in up if m.key not in excluded and not m.is_broken(now)]
        chosen = list(good)
        if not any(m.role.prefills for m in good):
            chosen += [m for m in up if m.role.prefills and m not in chosen]
        if not any(m.role.decodes for m in good):
            chosen += [m for m in up if m.role.decodes and m not in chosen]
        return [member.snapshot() for member in chosen]
