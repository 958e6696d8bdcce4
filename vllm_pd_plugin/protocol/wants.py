"""Per request: a handoff as its consumer's scheduler sees it; pure.

WANTED -> OFFERED -> ALLOCATED -> closed
"""

from __future__ import annotations

import dataclasses

from vllm_pd_plugin.containment import LOOK_AGAIN_S
from vllm_pd_plugin.deadlines import Deadlines
from vllm_pd_plugin.ids import Address, HandoffId, Incarnation, RequestId, Source


@dataclasses.dataclass(slots=True, eq=False)
class Wanted:
    """A handoff as its consumer's scheduler sees it: WANTED, then OFFERED, until it is closed."""

    request_id: RequestId
    source: Source
    accepts_any: bool
    """The source was named without an incarnation."""
    asked: bool = False
    asked_anew: bool = False
    """Once more, because the producer's KV may have become another."""
    offered: bool = False

    def ask_again(self) -> bool:
        """Turn to whoever runs at the address now, if nothing binds it to who ran there before."""
        if not self.accepts_any or self.offered:
            return False
        self.source = dataclasses.replace(self.source, incarnation=None)
        self.asked = False
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
        """Start: WANTED. Returns None when another request already wants the same handoff."""
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
        """The producer has offered: OFFERED. None when nobody waits for that."""
        wanted = self._wanted.get(handoff_id)
        if wanted is None or wanted.offered or wanted.source.incarnation != sender:
            return None
        wanted.offered = True
        return wanted

    def allocated(self, request_id: RequestId) -> None:
        """The request has its blocks: ALLOCATED; from here on the workers keep the deadline."""
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
        return tuple([handoff_id for handoff_id, wanted in there.items() if wanted.asked])

    def is_wanted_from(self, address: Address) -> bool:
        """Say whether anything is."""
        return address in self._by_address
