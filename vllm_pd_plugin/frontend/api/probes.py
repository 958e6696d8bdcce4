"""What an orchestrator asks a frontend: is it alive?

``/health`` is vLLM's, and says whether a request can be served now: an answer for load balancers,
and for readiness probes. To start a frontend again because its engines are missing would only end
the streams that are left, so liveness has an address of its own.
"""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from vllm.engine.protocol import EngineClient

LIVE_PATH = "/pd/v1/live"


def make_probe_router(client: EngineClient) -> APIRouter:
    """Return the route that tells whether this process can go on: with 200, or 503 if it should be
    started again."""
    router = APIRouter()

    @router.get(LIVE_PATH)
    async def live() -> JSONResponse:
        if client.errored:
            return JSONResponse({"live": False, "problem": "gives no answers; see its log"}, 503)
        return JSONResponse({"live": True})

    return router
