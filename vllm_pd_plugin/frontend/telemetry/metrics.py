"""What a frontend counts, for Prometheus, beside what vLLM's own API server counts; and goodput."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from prometheus_client import Counter, Gauge, Histogram

from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.requests.endings import Ending, Failure
from vllm_pd_plugin.frontend.routing.choice import Reason, Role, Route

DEFAULT_CLASS = "default"
_PAUSE_S = 1.0
"""What takes longer may be a request that goes on elsewhere, and counts as so much."""
_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30, 60,
)  # fmt: skip
_SHORT_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 5,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Objectives:
    """What a request of a class is promised: time to first token, and per token after it; in
    seconds. A request counts for goodput when it meets both."""

    ttft_s: float
    tpot_s: float

    def are_met(self, ttft_s: float, tpot_s: float | None) -> bool:
        return ttft_s <= self.ttft_s and (tpot_s is None or tpot_s <= self.tpot_s)


def parse_slo(text: str) -> tuple[str, Objectives]:
    """Read NAME=TTFT_MS/TPOT_MS, or TTFT_MS/TPOT_MS for the default class.

    Raises:
        ConfigError: it is something else.
    """
    name, equals, numbers = text.rpartition("=")
    ttft, slash, tpot = numbers.partition("/")
    try:
        objectives = Objectives(float(ttft) / 1e3, float(tpot) / 1e3)
    except ValueError:
        objectives = Objectives(0, 0)
    if not slash or objectives.ttft_s <= 0 or objectives.tpot_s <= 0 or (equals and not name):
        raise ConfigError(f"--slo {text!r} is not NAME=TTFT_MS/TPOT_MS, as in interactive=500/50")
    return name or DEFAULT_CLASS, objectives


class Timeline:
    """When one request's tokens went to its client, in seconds of the frontend's clock."""

    __slots__ = ("arrived_at", "first_at", "last_at", "num_tokens", "second_at", "slo_class")

    def __init__(self, arrived_at: float, slo_class: str) -> None:
        self.arrived_at = arrived_at
        self.slo_class = slo_class
        self.first_at = self.second_at = self.last_at = 0.0
        self.num_tokens = 0

    @property
    def ttft_s(self) -> float:
        return self.first_at - self.arrived_at

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None when there was only one."""
        if self.num_tokens < 2:
            return None
        return (self.last_at - self.first_at) / (self.num_tokens - 1)


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


class FrontendMetrics:
    """Made once a process. slos: the objectives of each class of requests."""

    def __init__(self, slos: Mapping[str, Objectives]) -> None:
        self.slos = slos
        self.totals = Totals()
        self._routes = Counter(
            "pd_frontend_routes", "Attempts of requests, by why they went where.", ["reason"]
        )
        self._retries = Counter(
            "pd_frontend_retries", "Attempts that failed and were followed by another.", ["reason"]
        )
        self._failures = Counter(
            "pd_frontend_failures", "Requests that ended without an answer.", ["reason"]
        )
        self._lost = Counter("pd_frontend_engines_lost", "Engines that were lost.")
        self._engines = Gauge(
            "pd_frontend_engines", "Engines that take requests.", ["role"],
            multiprocess_mode="mostrecent",
        )  # fmt: skip
        self._open = Gauge(
            "pd_frontend_requests_open", "Requests under way.", multiprocess_mode="livesum"
        )
        self._waiting = Gauge(
            "pd_frontend_requests_waiting", "Requests that wait for an engine to come up.",
            multiprocess_mode="livesum",
        )  # fmt: skip
        classes = ["slo_class"]
        self._ttft = Histogram(
            "pd_frontend_ttft_seconds", "Time to first token.", classes, buckets=_SECONDS
        )
        self._ttst = Histogram(
            "pd_frontend_ttst_seconds", "Time from the first token to the second.", classes,
            buckets=_SHORT_SECONDS,
        )  # fmt: skip
        self._tpot = Histogram(
            "pd_frontend_tpot_seconds", "A request's mean time per token after the first.", classes,
            buckets=_SHORT_SECONDS,
        )  # fmt: skip
        self._itl = Histogram(
            "pd_frontend_itl_seconds", "Time between two outputs of a request.",
            buckets=_SHORT_SECONDS,
        )  # fmt: skip
        self._queue = Histogram(
            "pd_frontend_prefill_queue_seconds", "Time in the prefill engine's queue.",
            buckets=_SECONDS,
        )  # fmt: skip
        self._transfer = Histogram(
            "pd_frontend_handoff_seconds",
            "From the prefill engine's token to the decode engine's first.",
            buckets=_SECONDS,
        )
        self._finished = Counter("pd_frontend_requests", "Requests that were answered.", classes)
        self._good = Counter(
            "pd_frontend_goodput_requests", "Requests that met both objectives of their class.",
            classes,
        )  # fmt: skip
        for reason in Reason:
            self._routes.labels(reason.value)
        for failure in Failure:
            self._retries.labels(failure.value)
        for ending in Ending:
            self._failures.labels(ending.value)
        for name in {DEFAULT_CLASS, *slos}:
            self._finished.labels(name)
            self._good.labels(name)

    def slo_class(self, wanted: str | None) -> str:
        """Return the class of a request that asks for one; unknown ones are the default."""
        return wanted if wanted is not None and wanted in self.slos else DEFAULT_CLASS

    def arrived(self) -> None:
        """A request has come."""
        self.totals.requests += 1

    def is_to_compute(self, num_tokens: int) -> None:
        """So much of a prompt is to be computed, as it has found its way for the first time."""
        self.totals.prompt_tokens += num_tokens

    def routed(self, route: Route) -> None:
        self._routes.labels(route.reason.value).inc()

    def retried(self, failure: Failure) -> None:
        self._retries.labels(failure.value).inc()

    def failed(self, ending: Ending) -> None:
        self._failures.labels(ending.value).inc()

    def engine_lost(self) -> None:
        self._lost.inc()

    def set_engines(self, counts: Mapping[Role, int]) -> None:
        for role in Role:
            self._engines.labels(role.value).set(counts.get(role, 0))

    def set_requests(self, num_open: int, num_waiting: int) -> None:
        self._open.set(num_open)
        self._waiting.set(num_waiting)

    def queued(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def handed_off(self, seconds: float) -> None:
        self._transfer.observe(seconds)

    def gave(self, timeline: Timeline, now: float, num_tokens: int) -> None:
        """Tokens went to a client."""
        if timeline.num_tokens == 0:
            timeline.first_at = now
            self._ttft.labels(timeline.slo_class).observe(timeline.ttft_s)
        else:
            seconds = now - timeline.last_at
            self._itl.observe(seconds)
            self.totals.intervals += num_tokens
            self.totals.itl_s += min(seconds, _PAUSE_S)
            if timeline.second_at == 0.0:
                timeline.second_at = now
                self._ttst.labels(timeline.slo_class).observe(now - timeline.first_at)
        timeline.last_at = now
        timeline.num_tokens += num_tokens

    def finished(self, timeline: Timeline) -> None:
        """A request was answered."""
        name = timeline.slo_class
        self._finished.labels(name).inc()
        self.totals.answers += 1
        self.totals.answer_tokens += timeline.num_tokens
        tpot_s = timeline.tpot_s
        if tpot_s is not None:
            self._tpot.labels(name).observe(tpot_s)
        objectives = self.slos.get(name)
        if timeline.num_tokens and (
            objectives is None or objectives.are_met(timeline.ttft_s, tpot_s)
        ):
            self._good.labels(name).inc()
