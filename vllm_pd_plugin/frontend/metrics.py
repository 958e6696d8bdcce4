"""What a frontend counts, for Prometheus; beside what vLLM's own API server counts."""

from __future__ import annotations

from prometheus_client import Counter

from vllm_pd_plugin.frontend.course import Ending, Failure
from vllm_pd_plugin.frontend.routing import Reason, Route


class FrontendMetrics:
    """Made once a process."""

    def __init__(self) -> None:
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
        for reason in Reason:
            self._routes.labels(reason.value)
        for failure in Failure:
            self._retries.labels(failure.value)
        for ending in Ending:
            self._failures.labels(ending.value)

    def routed(self, route: Route) -> None:
        self._routes.labels(route.reason.value).inc()

    def retried(self, failure: Failure) -> None:
        self._retries.labels(failure.value).inc()

    def failed(self, ending: Ending) -> None:
        self._failures.labels(ending.value).inc()

    def engine_lost(self) -> None:
        self._lost.inc()
