"""What an orchestrator asks a frontend: is it alive?

``/health`` is vLLM's, and says whether a request can be served now: an answer for load balancers,
and for readiness probes. To start a frontend again because its engines are missing would only end
the streams that are left, so liveness has an address of its own.
"""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from vllm.engine.protocol import EngineClient
from vllm.v1.engine.exceptions import EngineDeadError

LIVE_PATH = "/pd/v1/live"
PROXY_PATH = "/healthcheck"
"""What scripts ask that expect one of vLLM's example proxies before a pair of engines."""


def make_probe_router(client: EngineClient) -> APIRouter:
    """Return the routes that tell whether this process can go on, and whether it can serve now:
    with 200, or 503 if it should be started again, or not be asked."""
    router = APIRouter()

    @router.get(LIVE_PATH)
    async def live() -> JSONResponse:
        if client.errored:
            return JSONResponse({"live": False, "problem": "gives no answers; see its log"}, 503)
        return JSONResponse({"live": True})

    @router.get(PROXY_PATH)
    async def healthcheck() -> JSONResponse:
        try:
            await client.check_health()
        except EngineDeadError as error:
            return JSONResponse({"status": "unavailable", "problem": error.args[-1]}, 503)
        return JSONResponse({"status": "ok"})

    return router
