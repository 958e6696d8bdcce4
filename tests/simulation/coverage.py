"""What a run has reached: transitions of every state machine, and reasons of failures.

Exports, wants and attempts to read go by a table each; a table that counts takes its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_pd_plugin.edge.consumer_request import (
    ATTEMPTS,
    STAGES,
    Attempt,
    AttemptState,
    ConsumingRequest,
    Stage,
)
from vllm_pd_plugin.edge.metrics import PdStats
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.protocol import export_states, exports, wants, wire
from vllm_pd_plugin.protocol.export_states import ExportEvent, ExportState
from vllm_pd_plugin.protocol.outbox import Outbox
from vllm_pd_plugin.protocol.wants import WantEvent, WantState
from vllm_pd_plugin.transfer import states

reached: Counter[str] = Counter()

Pair = tuple[Any, Any]
"""A state, and an event that happens in it."""


class Counted(Mapping[Pair, Any]):
    """A table of transitions that counts each that is followed."""

    def __init__(self, machine: str, table: Mapping[Pair, Any]) -> None:
        self._table = table
        self._names = {pair: _transition(machine, *pair) for pair in table}

    def __getitem__(self, pair: Pair) -> Any:
        found = self._table[pair]
        reached[self._names[pair]] += 1
        return found

    def __contains__(self, pair: object) -> bool:
        return pair in self._table

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


def _transition(machine: str, state: object, event: object) -> str:
    return f"{machine}: {_name(state)}, {_name(event)}"


def _change(machine: str, before: object, after: object) -> str:
    return f"{machine}: {_name(before)} -> {_name(after)}"


def _name(value: object) -> str:
    return str(getattr(value, "name", value)).lower().replace("_", " ")


def _machine(attempt_number: int) -> str:
    return "attempt elsewhere" if attempt_number else "attempt"


def watch() -> None:
    """Begin to count, in this process."""
    if isinstance(exports.TRANSITIONS, Counted):
        return
    exports.TRANSITIONS = Counted("export", exports.TRANSITIONS)
    wants.TRANSITIONS = Counted("want", wants.TRANSITIONS)
    states.TRANSITIONS = Counted("fetch", states.TRANSITIONS)
    go_on, follow = Attempt.follow, ConsumingRequest.follow
    record, send = PdStats.record_failure, Outbox.add

    def follow_attempt(self: Attempt, state: AttemptState) -> None:
        reached[_change(_machine(self.number), self.state, state)] += 1
        go_on(self, state)

    def follow_request(self: ConsumingRequest, stage: Stage) -> None:
        reached[_change("request", self.stage, stage)] += 1
        follow(self, stage)

    def record_failure(self: PdStats, reason: Reason) -> None:
        reached[f"reason: {reason}"] += 1
        record(self, reason)

    def add(self: Outbox, who: Any, message: Any) -> None:
        if isinstance(message, wire.Refuse):
            reached[f"refused: {message.reason}"] += 1
        send(self, who, message)

    Attempt.follow = follow_attempt  # type: ignore[method-assign]
    ConsumingRequest.follow = follow_request  # type: ignore[method-assign]
    PdStats.record_failure = record_failure  # type: ignore[method-assign]
    Outbox.add = add  # type: ignore[method-assign]


_E, _S = ExportEvent, ExportState
_BLOCKS_FIRST = "a prefill has blocks, and so is opened, before it ends"
_ONE_PREFILL = "an id is one prefill's until that ends"
_ENDS_ONCE = "a prefill that has sealed is not dropped"
_SEALS_ITS_OWN = "a prefill that was dropped, or whose id is another's by now, does not seal"
_ASKED_AT_ONCE = "whoever is there is asked before it can offer"
_FAULTS_ONLY = "a request that has failed fails again only where a fault was caught"

UNREACHABLE: dict[str, str] = {
    _transition("export", _S.QUEUED, _E.SEALED): _BLOCKS_FIRST,
    _transition("export", _S.SEALED, _E.DROPPED): _ENDS_ONCE,
    **{
        _transition("export", state, _E.REPLACED): _ONE_PREFILL
        for state in (
            _S.QUEUED,
            _S.GROWING,
            _S.COMMITTED_UNSEALED,
            _S.CANCELLED_UNSEALED,
            _S.EXPIRED_UNSEALED,
        )
    },
    **{
        _transition("export", state, _E.SEALED): _SEALS_ITS_OWN
        for state in (_S.COMMITTED, _S.CANCELLED, _S.EXPIRED)
    },
    _transition("want", WantState.NEW, WantEvent.OFFER): _ASKED_AT_ONCE,
    _transition("want", WantState.NEW, WantEvent.DOUBT): _ASKED_AT_ONCE,
    _transition("want", WantState.DOUBTED, WantEvent.OFFER): _ASKED_AT_ONCE,
    _change("request", Stage.FAILED, Stage.FAILED): _FAULTS_ONLY,
}
"""What requests that prefill and fetch never do, and why not: other holders of exports will."""


def expected() -> list[str]:
    """Return what there is to be reached."""
    tables: dict[str, Mapping[Pair, Any]] = {
        "export": export_states.TRANSITIONS,
        "want": wants.TRANSITIONS,
        "fetch": states.TRANSITIONS,
    }
    names = [_transition(machine, *pair) for machine, table in tables.items() for pair in table]
    for number in range(2):
        names += _changes(_machine(number), ATTEMPTS)
    names += _changes("request", STAGES)
    names += [f"reason: {reason}" for reason in Reason]
    return [*names, f"refused: {Reason.MISSING_BLOCKS}"]


def _changes(machine: str, table: Mapping[Any, frozenset[Any]]) -> list[str]:
    return [_change(machine, before, after) for before in table for after in table[before]]


def missing(counts: Counter[str]) -> list[str]:
    """Return what a long run must have reached, and has not."""
    return [name for name in expected() if not counts[name] and name not in UNREACHABLE]


def surprises(counts: Counter[str]) -> list[str]:
    """Return what was reached although it is said that it cannot be."""
    return [name for name in UNREACHABLE if counts[name]]


def table(counts: Counter[str]) -> str:
    """Return what was reached, and how often; and what was not."""
    rows = sorted({*counts, *expected()})
    return "\n".join(
        f"{counts[name]:9d}  {name}"
        + (f"  (not by a prefill: {UNREACHABLE[name]})" if name in UNREACHABLE else "")
        for name in rows
    )
