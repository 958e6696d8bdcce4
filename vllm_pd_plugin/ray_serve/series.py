"""A frontend's series in Ray's own metrics: each replica's by itself, whichever answers at the
ingress.

Ray collects them from every worker process of a node, and each node's agent gives them to
Prometheus, with the replica's id as the label ``ReplicaId``. What to scrape is in ``docs/ray.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import PlainTextResponse
from starlette.routing import Route
from vllm.v1.metrics.ray_wrappers import RayCounterWrapper, RayGaugeWrapper, RayHistogramWrapper

from vllm_pd_plugin.frontend.telemetry.metrics import MetricKinds

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request

RAY_KINDS = MetricKinds(RayCounterWrapper, RayGaugeWrapper, RayHistogramWrapper)
_METRICS_PATH = "/metrics"
_WHERE = (
    "The series of a frontend on Ray are among Ray's own metrics, of each replica: scrape the "
    "nodes, as docs/ray.md says. Here any one of the replicas would answer.\n"
)


def point_elsewhere(app: FastAPI) -> None:
    """Let ``/metrics`` say where the metrics are: those of the replica that happens to answer look
    like one frontend's, and are now one's, now another's."""
    kept = [each for each in app.router.routes if getattr(each, "path", None) != _METRICS_PATH]

    async def say_where(request: Request) -> PlainTextResponse:
        return PlainTextResponse(_WHERE, 404)

    app.router.routes[:] = [*kept, Route(_METRICS_PATH, say_where)]
