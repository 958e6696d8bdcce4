"""What a frontend counts, for Prometheus, beside what vLLM's own API server counts; and goodput."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from vllm_pd_plugin.frontend.admission import Refusal
from vllm_pd_plugin.frontend.requests.endings import Ending, Failure
from vllm_pd_plugin.frontend.routing.choice import Reason, Role, Route
from vllm_pd_plugin.frontend.telemetry.outcomes import (
    DEFAULT_CLASS,
    ClientRequest,
    Objectives,
    Outcome,
    Timeline,
    current_request,
    one_request,
)

_PAUSE_S = 1.0
"""What takes longer may be a request that goes on elsewhere, and counts as so much."""
_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30, 60,
)  # fmt: skip
_SHORT_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 5,
)  # fmt: skip

_OF_ATTEMPTS = (
    Failure.ENGINE_LOST, Failure.ENGINE_STOPPED, Failure.REQUEST_FAILED, Failure.TIMEOUT,
)  # fmt: skip
"""What another attempt may follow."""
_OF_HANDOFFS = (Failure.REQUEST_FAILED, Failure.TIMEOUT, Failure.RECOMPUTED)
"""What may count against a pair of engines."""
_OF_WAITING = (Ending.NO_ENGINE, Ending.OVERLOADED)
"""How requests end that no engine has got."""


@dataclasses.dataclass(slots=True)
class Totals:
    """What has come and gone so far, for those who look at what changes.

    requests: that have arrived. prompt_tokens: to be computed for those that were routed. answers:
    requests that were answered; answer_tokens: in them. intervals: times between tokens of one
    request; itl_s: their sum, without long pauses.
    """

    requests: int = 0
    prompt_tokens: int = 0
    answers: int = 0
    answer_tokens: int = 0
    intervals: float = 0
    itl_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class MetricKinds:
    """What makes series: called as the classes of ``prometheus_client`` are, and as useful.

    Elsewhere than in Prometheus' own registry series are of other classes: on Ray, of Ray's.
    """

    counter: Callable[..., Any] = Counter
    gauge: Callable[..., Any] = Gauge
    histogram: Callable[..., Any] = Histogram


@dataclasses.dataclass(frozen=True, slots=True)
class _OfClass:
    """The series of one class of requests."""

    requests: Mapping[Outcome, Any]
    failures: Mapping[Ending, Any]
    refusals: Mapping[Refusal, Any]
    good: Any
    ttft: Any
    ttst: Any
    tpot: Any
    itl: Any


class FrontendMetrics:
    """Made once a process. slos: the objectives of each class of requests."""

    def __init__(self, slos: Mapping[str, Objectives], kinds: MetricKinds | None = None) -> None:
        self.slos = slos
        self.totals = Totals()
        self._kinds = kinds = kinds or MetricKinds()
        routes = kinds.counter(
            "pd_frontend_routes", "Attempts of requests, by why they went where.", ["reason"]
        )
        retries = kinds.counter(
            "pd_frontend_retries", "Attempts that failed and were followed by another.", ["reason"]
        )
        pairs = kinds.counter(
            "pd_frontend_pair_breakers_opened",
            "Times that handoffs between two engines were given up for a while.", ["reason"],
        )  # fmt: skip
        self._open_pairs = kinds.gauge(
            "pd_frontend_pairs_open", "Pairs of engines between which handoffs fail.",
            multiprocess_mode="livemax",
        )  # fmt: skip
        engines = kinds.gauge(
            "pd_frontend_engines", "Engines that take requests.", ["role"],
            multiprocess_mode="livemostrecent",
        )  # fmt: skip
        self._lost = kinds.counter("pd_frontend_engines_lost", "Engines that were lost.")
        self._open = kinds.gauge(
            "pd_frontend_requests_open", "Requests under way.", multiprocess_mode="livesum"
        )
        waiting = kinds.gauge(
            "pd_frontend_requests_waiting",
            "Requests that no engine has got yet, by how they end if that lasts.", ["reason"],
            multiprocess_mode="livesum",
        )  # fmt: skip
        self._queued_tokens = kinds.gauge(
            "pd_frontend_queued_tokens", "Prompt tokens of requests that have no token yet.",
            multiprocess_mode="livesum",
        )  # fmt: skip
        self._lag = kinds.gauge(
            "pd_frontend_loop_lag_seconds", "How late the frontend is with what it has to do.",
            multiprocess_mode="livemax",
        )  # fmt: skip
        self._dropped = kinds.counter(
            "pd_frontend_clients_dropped", "Connections of clients that did not read any more."
        )
        self._queue = kinds.histogram(
            "pd_frontend_prefill_queue_seconds", "Time in the prefill engine's queue.",
            buckets=_SECONDS,
        )  # fmt: skip
        self._transfer = kinds.histogram(
            "pd_frontend_handoff_seconds",
            "From the prefill engine's token to the decode engine's first.",
            buckets=_SECONDS,
        )
        self._routes = {reason: routes.labels(reason.value) for reason in Reason}
        self._pairs = {failure: pairs.labels(failure.value) for failure in _OF_HANDOFFS}
        self._retries = {failure: retries.labels(failure.value) for failure in _OF_ATTEMPTS}
        self._waiting = {ending: waiting.labels(ending.value) for ending in _OF_WAITING}
        self._engines = {role: engines.labels(role.value) for role in Role}
        self._of = self._make_classes({DEFAULT_CLASS, *slos})

    def _make_classes(self, names: set[str]) -> dict[str, _OfClass]:
        """Make the series that have a class, all from the start: a rate sees the first event."""
        kinds, labels = self._kinds, ["slo_class"]
        requests = kinds.counter(
            "pd_frontend_requests", "Requests of clients that have ended, by how.",
            [*labels, "outcome"],
        )  # fmt: skip
        refusals = kinds.counter(
            "pd_frontend_refused", "Requests that were turned away at once, by why.",
            [*labels, "reason"],
        )  # fmt: skip
        failures = kinds.counter(
            "pd_frontend_failures", "Requests of clients that failed, by why.", [*labels, "reason"]
        )
        good = kinds.counter(
            "pd_frontend_goodput_requests", "Requests that met both objectives of their class.",
            labels,
        )  # fmt: skip
        ttft = kinds.histogram(
            "pd_frontend_ttft_seconds", "Time to first token.", labels, buckets=_SECONDS
        )
        ttst = kinds.histogram(
            "pd_frontend_ttst_seconds", "Time from the first token to the second.", labels,
            buckets=_SHORT_SECONDS,
        )  # fmt: skip
        tpot = kinds.histogram(
            "pd_frontend_tpot_seconds", "A request's mean time per token after the first.", labels,
            buckets=_SHORT_SECONDS,
        )  # fmt: skip
        itl = kinds.histogram(
            "pd_frontend_itl_seconds", "Time between two outputs of a request.", labels,
            buckets=_SHORT_SECONDS,
        )  # fmt: skip
        return {
            name: _OfClass(
                {outcome: requests.labels(name, outcome.value) for outcome in Outcome},
                {ending: failures.labels(name, ending.value) for ending in Ending},
                {refusal: refusals.labels(name, refusal.value) for refusal in Refusal},
                good.labels(name),
                ttft.labels(name),
                ttst.labels(name),
                tpot.labels(name),
                itl.labels(name),
            )
            for name in names
        }

    # --- requests of clients -----------------------------------------------------------------

    def slo_class(self, wanted: str | None) -> str:
        """Return the class of a request that asks for one; unknown ones are the default."""
        return wanted if wanted is not None and wanted in self.slos else DEFAULT_CLASS

    @contextmanager
    def one_request(self, are_beams: bool = False) -> Iterator[None]:
        """Count all choices that this task begins within as one request; see ``one_request``."""
        try:
            with one_request(are_beams) as request:
                yield
        finally:
            self._count_if_over(request)

    def begin(self, now: float, wanted_class: str | None) -> Timeline:
        """A choice has come; of a request that has several if this is within ``one_request``."""
        request = current_request()
        request.num_open += 1
        request.slo_class = self.slo_class(wanted_class)
        self.totals.requests += 1
        return Timeline(now, request)

    def refused(self, wanted_class: str | None, refusal: Refusal) -> None:
        """A request was turned away at once."""
        of = self._of[self.slo_class(wanted_class)]
        of.requests[Outcome.REFUSED].inc()
        of.refusals[refusal].inc()

    def gave(self, timeline: Timeline, now: float, num_tokens: int) -> None:
        """Tokens went to a client."""
        of = self._of[timeline.request.slo_class]
        if timeline.num_tokens == 0:
            timeline.first_at = now
            if timeline.begins:
                of.ttft.observe(timeline.ttft_s)
        else:
            seconds = now - timeline.last_at
            of.itl.observe(seconds)
            self.totals.intervals += num_tokens
            self.totals.itl_s += min(seconds, _PAUSE_S)
            if timeline.second_at == 0.0:
                timeline.second_at = now
                of.ttst.observe(now - timeline.first_at)
        timeline.last_at = now
        timeline.num_tokens += num_tokens

    def finished(self, timeline: Timeline) -> None:
        """A choice was answered to its end."""
        timeline.is_answered = True
        self.totals.answers += 1
        self.totals.answer_tokens += timeline.num_tokens
        if timeline.tpot_s is not None:
            self._of[timeline.request.slo_class].tpot.observe(timeline.tpot_s)

    def ended(self, timeline: Timeline, ending: Ending | None) -> None:
        """A choice is over. ending: why there was no answer; None if there was, or if its client
        has left."""
        outcome = Outcome.ANSWERED if timeline.is_answered else Outcome.GONE
        if ending is not None:
            outcome = Outcome.FAILED
        request = timeline.request
        request.choice_ended(outcome, self._is_good(timeline), ending)
        self._count_if_over(request)

    def _is_good(self, timeline: Timeline) -> bool:
        objectives = self.slos.get(timeline.request.slo_class)
        if objectives is None or not timeline.begins:
            return timeline.num_tokens > 0
        return timeline.num_tokens > 0 and objectives.are_met(timeline.ttft_s, timeline.tpot_s)

    def _count_if_over(self, request: ClientRequest) -> None:
        if request.outcome is None or not request.is_over:
            return
        of = self._of[request.slo_class]
        of.requests[request.outcome].inc()
        if request.outcome is Outcome.FAILED and request.ending is not None:
            of.failures[request.ending].inc()
        elif request.outcome is Outcome.ANSWERED and request.is_good:
            of.good.inc()

    # --- attempts and engines ----------------------------------------------------------------

    def is_to_compute(self, num_tokens: int) -> None:
        """So much of a prompt is to be computed, as it has found its way for the first time."""
        self.totals.prompt_tokens += num_tokens

    def routed(self, route: Route) -> None:
        self._routes[route.reason].inc()

    def retried(self, failure: Failure) -> None:
        self._retries[failure].inc()

    def engine_lost(self) -> None:
        self._lost.inc()

    def pair_opened(self, failure: Failure) -> None:
        """Handoffs between two engines are not tried for a while."""
        self._pairs[failure].inc()

    def set_open_pairs(self, number: int) -> None:
        self._open_pairs.set(number)

    def set_engines(self, counts: Mapping[Role, int]) -> None:
        for role, series in self._engines.items():
            series.set(counts.get(role, 0))

    def set_requests(
        self, num_open: int, num_waiting: Mapping[Ending, int], num_tokens: int
    ) -> None:
        """num_waiting: by how they end if that lasts. num_tokens: of the prompts of those that have
        no token yet."""
        self._open.set(num_open)
        for ending, series in self._waiting.items():
            series.set(num_waiting.get(ending, 0))
        self._queued_tokens.set(num_tokens)

    def set_lag(self, seconds: float) -> None:
        self._lag.set(seconds)

    def client_dropped(self) -> None:
        """A client has not read anything for too long, and its connection is closed."""
        self._dropped.inc()

    def queued(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def handed_off(self, seconds: float) -> None:
        self._transfer.observe(seconds)
