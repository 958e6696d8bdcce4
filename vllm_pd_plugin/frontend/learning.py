"""What is learnt from an engine's first output of a leg: how fast it is, and that it works."""

from __future__ import annotations

import dataclasses

from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput

from vllm_pd_plugin.frontend.pool.breakers import PairBreakers
from vllm_pd_plugin.frontend.pool.members import Member
from vllm_pd_plugin.frontend.requests.endings import Failure
from vllm_pd_plugin.frontend.requests.legs import Leg, LegKind
from vllm_pd_plugin.frontend.router import Router
from vllm_pd_plugin.frontend.telemetry.metrics import FrontendMetrics
from vllm_pd_plugin.frontend.underway import Underway


@dataclasses.dataclass(frozen=True, slots=True)
class Learner:
    """Tells it to those who can use it."""

    metrics: FrontendMetrics
    router: Router
    pairs: PairBreakers

    def learn(
        self,
        member: Member,
        underway: Underway,
        leg: Leg,
        output: EngineCoreOutput,
        now: float,
        given_at: float,
    ) -> None:
        """Take the first output of a leg.

        now: this process's clock. given_at: the engine's, as are the times in the output.
        """
        if not output.new_token_ids:
            return  # it ends without having begun
        member.breaker.worked()
        if leg.kind is LegKind.DECODE:
            self._handed_off(underway, leg, output, now)
        elif output.prefill_stats is not None:
            times = {event.type: event.timestamp for event in output.events or ()}
            scheduled_at = times.get(EngineCoreEventType.SCHEDULED, given_at)
            member.computed(output.prefill_stats.num_computed_tokens, given_at - scheduled_at)
            self.metrics.queued(scheduled_at - times.get(EngineCoreEventType.QUEUED, scheduled_at))
        if leg.kind is LegKind.PREFILL:
            underway.marks.prefilled_at = now

    def _handed_off(
        self, underway: Underway, leg: Leg, output: EngineCoreOutput, now: float
    ) -> None:
        marks, route = underway.marks, underway.course.route
        marks.decoding_at = now
        if marks.prefilled_at:
            seconds = now - marks.prefilled_at
            self.metrics.handed_off(seconds)
            self.router.handed_off(seconds)
        if route is None or route.prefill is None:
            return
        if brought_kv(output):
            self.pairs.worked((route.prefill, leg.engine))
        elif recomputed(output):
            self.pairs.failed((route.prefill, leg.engine), Failure.RECOMPUTED)


def brought_kv(output: EngineCoreOutput) -> bool:
    """Say whether the first output of a decode leg proves that its KV was handed over: the engine
    may have had it already, or have computed it."""
    stats = output.prefill_stats
    return stats is None or stats.num_external_cached_tokens > 0


def recomputed(output: EngineCoreOutput) -> bool:
    """Say whether the engine of a decode leg has computed the prompt, as it does with
    ``kv_load_failure_policy`` recompute when the handoff has failed. The few tokens behind a prefix
    that it had already are none that were to come."""
    stats = output.prefill_stats
    return (
        stats is not None
        and stats.num_external_cached_tokens == 0
        and 2 * stats.num_computed_tokens > stats.num_prompt_tokens > 1
    )


def rebase(output: EngineCoreOutput, offset_s: float) -> None:
    """Move an engine's times to this machine's clock, as if its outputs had taken no time."""
    for event in output.events or ():
        event.timestamp += offset_s
