"""The admin API: which engines there are, and changing that while requests are under way.

    GET    /pd/v1/pool            the engines and what is known of each
    POST   /pd/v1/engines         {"url", "role"}: add one; one that is drained takes requests again
    POST   /pd/v1/engines/drain   {"url", "timeout_s"}: nothing new; what is left after a while
                                  goes on elsewhere
    DELETE /pd/v1/engines?url=    remove one; what is under way on it goes on elsewhere

With an admin key every call needs it as a bearer token; without one the API answers only on
loopback.
"""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Callable
from typing import Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field

from vllm_pd_plugin.config import ADMIN_KEY_VARIABLE
from vllm_pd_plugin.frontend.dispatch import Dispatch
from vllm_pd_plugin.frontend.options import engine_url
from vllm_pd_plugin.frontend.pool.membership import Membership
from vllm_pd_plugin.frontend.routing.choice import Role
from vllm_pd_plugin.net.hosts import is_loopback


class EngineToAdd(BaseModel):
    model_config = ConfigDict(extra="forbid")

    url: str
    role: Literal["prefill", "decode", "both"]


class EngineToDrain(BaseModel):
    model_config = ConfigDict(extra="forbid")

    url: str
    timeout_s: float = Field(default=60.0, ge=0, le=3600)


def make_pool_router(dispatch: Dispatch, host: str | None, key: str | None) -> APIRouter:
    """Return the route that only looks.

    host: that the server binds; None where that is not known.
    key: that callers must know; None allows loopback only.
    """

    def authenticate(request: Request) -> None:
        if key is None:
            if host is None or not is_loopback(host):
                text = (
                    f"set {ADMIN_KEY_VARIABLE} to use the admin API of a frontend beyond loopback"
                )
                raise HTTPException(403, text)
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(token.encode(), key.encode()):
            raise HTTPException(401, "the admin key is needed, as a bearer token")

    router = APIRouter(prefix="/pd/v1", dependencies=[Depends(authenticate)])

    @router.get("/pool")
    async def pool() -> dict[str, Any]:
        return describe_pool(dispatch)

    return router


def make_router(
    dispatch: Dispatch,
    membership: Membership,
    apply: Callable[[], None],
    host: str | None,
    key: str | None,
) -> APIRouter:
    """Return all routes; see ``make_pool_router``.

    apply: called when the membership has changed.
    """
    router = make_pool_router(dispatch, host, key)

    @router.post("/engines", status_code=201)
    async def add(engine: EngineToAdd) -> dict[str, Any]:
        url = _checked(engine_url, engine.url)
        membership.add(url, Role(engine.role))
        apply()
        return {"url": url}

    @router.post("/engines/drain", status_code=202)
    async def drain(engine: EngineToDrain) -> dict[str, Any]:
        url = _known(membership, engine.url)
        membership.drain(url, engine.timeout_s)
        apply()
        return {"url": url}

    @router.delete("/engines")
    async def remove(url: str) -> dict[str, Any]:
        url = _known(membership, url)
        membership.remove(url)
        apply()
        return {"url": url}

    return router


def describe_pool(dispatch: Dispatch) -> dict[str, Any]:
    """Return what ``vllm-pd engines list`` and ``vllm-pd top`` show."""
    return {
        "requests_open": len(dispatch),
        "requests_waiting": dispatch.num_waiting,
        "engines": [
            {
                "url": member.key,
                "role": member.role.value,
                "state": member.state(dispatch.now()).value,
                "problem": member.problem,
                "model": member.link.description.model if member.is_up else None,
                "incarnation": member.link.incarnation if member.is_up else None,
                "running": member.load.running,
                "waiting": member.load.waiting,
                "waiting_tokens": member.load.waiting_tokens,
                "kv_usage": member.load.kv_usage,
                "legs": len(member.legs),
                "prefill_tokens_per_s": member.prefill_rate,
                "tokens_given": member.tokens_given,
            }
            for member in dispatch.pool
        ],
    }


def _known(membership: Membership, text: str) -> str:
    url = _checked(engine_url, text)
    if url not in membership.engines:
        raise HTTPException(404, f"no engine {url} in the pool")
    return url


def _checked(parse: Callable[[str], str], text: str) -> str:
    try:
        return parse(text)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise HTTPException(422, str(error)) from error
