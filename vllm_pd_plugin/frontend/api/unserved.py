"""What vLLM's API has and a frontend over a pool has not: one sentence each, before vLLM's own
routes, which would fail somewhere in the middle or are not there at all.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from vllm_pd_plugin.frontend.api.errors import error_answer

if TYPE_CHECKING:
    from starlette.responses import JSONResponse
    from starlette.types import ASGIApp, Receive, Scope, Send

OF_ONE_ENGINE = {
    "/sleep", "/wake_up", "/is_sleeping", "/release_kv_cache_memory",
    "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache",
    "/pause", "/resume", "/is_paused", "/start_profile", "/stop_profile",
    "/collective_rpc", "/get_world_size", "/kv_event_sources",
    "/scale_elastic_ep", "/is_scaling_elastic_ep",
    "/fault_tolerance/apply", "/fault_tolerance/status",
    "/weight_info", "/weight_checker", "/update_weight_version",
    "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine",
    "/start_weight_update", "/start_draft_weight_update", "/update_weights",
    "/finish_weight_update",
}  # fmt: skip
"""What acts on one engine, or asks it something. A frontend has many, which come and go."""
OF_OTHER_MODELS = {
    "/v1/embeddings": "embeddings", "/v2/embed": "embeddings", "/pooling": "pooling",
    "/classify": "classification", "/score": "scores", "/v1/score": "scores",
    "/rerank": "reranking", "/v1/rerank": "reranking", "/v2/rerank": "reranking",
    "/v1/audio/transcriptions": "transcription", "/v1/audio/translations": "translation of speech",
}  # fmt: skip
"""What models do that generate no text; a server of vLLM's own that generates has no such path."""
OF_ONE_FRONTEND = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
"""What changes the frontend that is asked: of several behind one address that is any."""


class SayUnserved:
    """Middleware that answers for such paths: 404 for other models' matters, 501 else.

    is_alone: no other frontend is behind the same address.
    """

    def __init__(self, app: ASGIApp, is_alone: bool) -> None:
        self._app = app
        self._is_alone = is_alone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if (answer := unserved(path, self._is_alone)) is not None:
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


def unserved(path: str, is_alone: bool) -> JSONResponse | None:
    """Return the answer to a request for a path that is not served; None for others."""
    if path in OF_ONE_ENGINE:
        return error_answer(
            HTTPStatus.NOT_IMPLEMENTED,
            f"{path} acts on one engine, and this is a frontend over a pool of them: ask each "
            "engine's own server (GET /pd/v1/pool names them)",
        )
    if what := OF_OTHER_MODELS.get(path):
        return error_answer(
            HTTPStatus.NOT_FOUND,
            f"{path}: there is no {what} over a pool, which generates text; start a `vllm serve` "
            "of a model for that",
        )
    if path in OF_ONE_FRONTEND and not is_alone:
        return error_answer(
            HTTPStatus.NOT_IMPLEMENTED,
            f"{path} would change one of several frontends behind this address; name adapters at "
            "the start with --lora-modules, or run one frontend",
        )
    return None
