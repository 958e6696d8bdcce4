"""Whose fault it is that an attempt has failed; a pure table.

A handoff that fails is nobody's fault alone: the engines may be unlike, or cannot reach each other,
and each may do well with others, and by itself. So it counts against the pair.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING

from vllm_pd_plugin.frontend.requests.endings import Failure
from vllm_pd_plugin.frontend.requests.legs import Leg, LegKind

if TYPE_CHECKING:
    from vllm_pd_plugin.frontend.routing.choice import EngineKey, Pair


class Fault(enum.Enum):
    """Whose circuit breaker counts a failure."""

    NOBODY = enum.auto()
    ENGINE = enum.auto()
    """Of the engine on which it has failed."""
    PAIR = enum.auto()
    """Of the two engines of a handoff."""


_OF_THE_ENGINE = (Failure.REQUEST_FAILED, Failure.TIMEOUT)
"""An engine that is gone, or stops, needs no breaker: it is not there."""
_FAULTS: dict[tuple[LegKind, bool], Fault] = {
    (LegKind.WHOLE, False): Fault.ENGINE,
    (LegKind.WHOLE, True): Fault.ENGINE,
    (LegKind.PREFILL, False): Fault.ENGINE,
    (LegKind.PREFILL, True): Fault.ENGINE,
    (LegKind.DECODE, False): Fault.PAIR,
    (LegKind.DECODE, True): Fault.ENGINE,  # the handoff was over
}
"""By the leg on which it shows, and whether that had given something out before."""


def fault_of(failure: Failure, kind: LegKind, has_output: bool) -> Fault:
    """Return whose fault a failure is; see ``_FAULTS``."""
    return _FAULTS[kind, has_output] if failure in _OF_THE_ENGINE else Fault.NOBODY


@dataclasses.dataclass(frozen=True, slots=True)
class Blame:
    """A failure, and who may be at fault.

    engines: that the request comes to last from now on.
    counts_for: whose circuit breaker counts it.
    ends_handoff: it was the handoff that has failed, or one of its engines before it was over.
    """

    failure: Failure
    engines: tuple[EngineKey, ...]
    counts_for: EngineKey | Pair | None = None
    ends_handoff: bool = False


def blame_for(failure: Failure, leg: Leg, prefill: EngineKey | None, prefill_failed: bool) -> Blame:
    """Return what follows from a failure that shows on a leg.

    prefill: the engine that was to hand KV to it, if any. prefill_failed: that engine has said of
        its own part that it has failed.
    """
    fault = fault_of(failure, leg.kind, leg.has_output)
    counted = failure in _OF_THE_ENGINE
    ends_handoff = counted and prefill is not None and _is_before_decoding(leg)
    if fault is not Fault.PAIR or prefill is None:
        key = leg.engine if fault is not Fault.NOBODY else None
        return Blame(failure, (leg.engine,), key, ends_handoff)
    if prefill_failed:
        return Blame(failure, (prefill,), prefill, ends_handoff)
    return Blame(failure, (leg.engine, prefill), (prefill, leg.engine), ends_handoff)


def _is_before_decoding(leg: Leg) -> bool:
    """Say whether a failure on this leg comes before the handoff is over."""
    return leg.kind is LegKind.PREFILL or (leg.kind is LegKind.DECODE and not leg.has_output)
