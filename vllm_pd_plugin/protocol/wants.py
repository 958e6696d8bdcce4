"""Per request: a handoff as its consumer's scheduler sees it; pure.

    NEW -> ASKED -> OFFERED -> closed

An offer may show that the producer's KV has become another: then its handoff is DOUBTED, and asked
for once more.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from vllm_pd_plugin.containment import LOOK_AGAIN_S
from vllm_pd_plugin.deadlines import Deadlines
from vllm_pd_plugin.ids import Address, HandoffId, Incarnation, RequestId, Source


class WantState(enum.Enum):
    NEW = "new"
    ASKED = "asked"
    DOUBTED = "doubted"
    ASKED_ANEW = "asked anew"
    OFFERED = "offered"


class WantEvent(enum.Enum):
    ASK = "ask"
    DOUBT = "offer of another revision"
    OFFER = "offer"
    RESTART = "producer restarted"


_S, _E = WantState, WantEvent

TRANSITIONS: Mapping[tuple[WantState, WantEvent], WantState] = {
    (_S.NEW, _E.ASK): _S.ASKED,
    (_S.DOUBTED, _E.ASK): _S.ASKED_ANEW,
    (_S.NEW, _E.DOUBT): _S.DOUBTED,
    (_S.ASKED, _E.DOUBT): _S.DOUBTED,
    **{(state, _E.OFFER): _S.OFFERED for state in WantState if state is not _S.OFFERED},
    (_S.ASKED, _E.RESTART): _S.NEW,
    (_S.ASKED_ANEW, _E.RESTART): _S.DOUBTED,
}
"""What follows on what, until it is closed."""


@dataclasses.dataclass(slots=True, eq=False)
class Wanted:
    """A handoff as its consumer's scheduler sees it, until it is closed."""

    request_id: RequestId
    source: Source
    accepts_any: bool
    """The source was named without an incarnation."""
    state: WantState = WantState.NEW

    @property
    def is_asked(self) -> bool:
        """Whether the producer has been asked, and its answer counts."""
        return self.state not in (WantState.NEW, WantState.DOUBTED)

    @property
    def is_offered(self) -> bool:
        return self.state is WantState.OFFERED

    def follow(self, event: WantEvent) -> None:
        """Something has happened that may happen now."""
        self.state = TRANSITIONS[self.state, event]

    def doubt(self) -> bool:
        """An offer is of KV that the producer has not described; say whether it is to be asked for
        once more, which it is once."""
        if (self.state, WantEvent.DOUBT) not in TRANSITIONS:
            return False
        self.follow(WantEvent.DOUBT)
        return True

    def ask_again(self) -> bool:
        """Turn to whoever runs at the address now, if nothing binds it to who ran there before."""
        if not self.accepts_any or self.is_offered:
            return False
        self.source = dataclasses.replace(self.source, incarnation=None)
        self.follow(WantEvent.RESTART)
        return True


class ConsumerTable:
    """Every handoff that this engine's scheduler wants and has not finished."""

    def __init__(self) -> None:
        self._wanted: dict[HandoffId, Wanted] = {}
        self._by_request: dict[RequestId, HandoffId] = {}
        self._by_address: dict[Address, dict[HandoffId, Wanted]] = {}
        self._deadlines = Deadlines[HandoffId]()
        """When waiting for blocks of its own is given up; none once it has them."""

    def __len__(self) -> int:
        return len(self._wanted)

    def want(self, request_id: RequestId, source: Source, deadline: float) -> Wanted | None:
        """Start. Returns None when another request already wants the same handoff."""
        if source.handoff_id in self._wanted:
            return None
        handoff_id = source.handoff_id
        wanted = Wanted(request_id, source, source.incarnation is None)
        self._wanted[handoff_id] = wanted
        self._by_request[request_id] = handoff_id
        self._by_address.setdefault(source.address, {})[handoff_id] = wanted
        self._deadlines.set(handoff_id, deadline)
        return wanted

    def offered(self, handoff_id: HandoffId, sender: Incarnation) -> Wanted | None:
        """The producer has offered. None when nobody waits for that."""
        wanted = self._wanted.get(handoff_id)
        if wanted is None or wanted.is_offered or wanted.source.incarnation != sender:
            return None
        wanted.follow(WantEvent.OFFER)
        return wanted

    def allocated(self, request_id: RequestId) -> None:
        """The request has its blocks; from here on the workers keep the deadline."""
        if handoff_id := self._by_request.get(request_id):
            self._deadlines.remove(handoff_id)

    def overdue(self, now: float) -> list[Wanted]:
        """Return what has waited too long for blocks; once more after a while, if it is not closed
        then."""
        overdue = self._deadlines.take(now)
        for handoff_id in overdue:
            self._deadlines.set(handoff_id, now + LOOK_AGAIN_S)
        return [self._wanted[handoff_id] for handoff_id in overdue]

    def next_deadline(self) -> float | None:
        return self._deadlines.next()

    def close(self, request_id: RequestId) -> Wanted | None:
        """The handoff is over for this request, whatever the outcome."""
        handoff_id = self._by_request.pop(request_id, None)
        if handoff_id is None:
            return None
        wanted = self._wanted.pop(handoff_id)
        self._deadlines.remove(handoff_id)
        there = self._by_address[wanted.source.address]
        del there[handoff_id]
        if not there:
            del self._by_address[wanted.source.address]
        return wanted

    def get(self, handoff_id: HandoffId) -> Wanted | None:
        return self._wanted.get(handoff_id)

    def all(self) -> list[Wanted]:
        return list(self._wanted.values())

    def at(self, address: Address) -> list[Wanted]:
        """Return what is wanted from one peer."""
        return list(self._by_address.get(address, {}).values())

    def asked_at(self, address: Address) -> tuple[HandoffId, ...]:
        """Return what one peer has been asked for."""
        there = self._by_address.get(address, {})
        return tuple([handoff_id for handoff_id, wanted in there.items() if wanted.is_asked])

    def is_wanted_from(self, address: Address) -> bool:
        """Say whether anything is."""
        return address in self._by_address
