"""The admin API: which engines there are, and changing that while requests are under way.

    GET    /pd/v1/pool            the engines and what is known of each
    GET    /pd/v1/targets         the engines as Prometheus asks for them (``http_sd_configs``)
    POST   /pd/v1/engines         {"url", "role"}: add one; one that is drained takes requests again
    POST   /pd/v1/engines/drain   {"url", "timeout_s"}: nothing new; what is left after a while
                                  goes on elsewhere
    DELETE /pd/v1/engines?url=    remove one; what is under way on it goes on elsewhere

Every call needs the admin key as a bearer token, whoever calls: a proxy on the same machine, or a
browser that was led here by another page, comes from loopback, too.
"""

from __future__ import annotations

import argparse
import hashlib
import secrets
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field

from vllm_pd_plugin.config import ADMIN_KEY_VARIABLE
from vllm_pd_plugin.engine_port.link import server_of
from vllm_pd_plugin.frontend.dispatch import Dispatch
from vllm_pd_plugin.frontend.engine_hosts import EngineHosts, host_of
from vllm_pd_plugin.frontend.options import engine_url
from vllm_pd_plugin.frontend.pool.membership import Membership
from vllm_pd_plugin.frontend.routing.choice import Role


class EngineToAdd(BaseModel):
    model_config = ConfigDict(extra="forbid")

    url: str
    role: Literal["prefill", "decode", "both"]


class EngineToDrain(BaseModel):
    model_config = ConfigDict(extra="forbid")

    url: str
    timeout_s: float = Field(default=60.0, ge=0, le=3600)


def make_pool_router(dispatch: Dispatch, key: str) -> APIRouter:
    """Return the routes that only look. key: that callers must know."""
    digest = _digest(key)

    def authenticate(request: Request) -> None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        # Digests are of equal length, so the time says nothing of the key's.
        is_right = secrets.compare_digest(_digest(token), digest)
        if scheme.lower() != "bearer" or not is_right:
            text = f"the admin key is needed, as a bearer token: that of {ADMIN_KEY_VARIABLE}"
            raise HTTPException(401, text, {"WWW-Authenticate": "Bearer"})

    router = APIRouter(prefix="/pd/v1", dependencies=[Depends(authenticate)])

    @router.get("/pool")
    async def pool() -> dict[str, Any]:
        return describe_pool(dispatch)

    @router.get("/targets")
    async def targets() -> list[dict[str, Any]]:
        return describe_targets(dispatch)

    return router


def make_router(
    dispatch: Dispatch,
    membership: Membership,
    apply: Callable[[], None],
    hosts: EngineHosts,
    key: str,
) -> APIRouter:
    """Return all routes; see ``make_pool_router``.

    apply: called when the membership has changed. hosts: where engines may be that are added.
    """
    router = make_pool_router(dispatch, key)

    @router.post("/engines", status_code=201)
    async def add(engine: EngineToAdd) -> dict[str, Any]:
        url = _checked(engine_url, engine.url)
        if not hosts.allows(url):
            raise HTTPException(
                403,
                f"engines at {host_of(url)} are not allowed: only on loopback, at hosts that were "
                "named when the frontend was started, and at those of --engine-hosts",
            )
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
                "problem": member.problem or dispatch.pairs.problem(member.key),
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


def describe_targets(dispatch: Dispatch) -> list[dict[str, Any]]:
    """Return where engines have ``/metrics``, each server once; those that are down, too, because
    Prometheus notices by that."""
    roles = {
        server_of(member.key): member.role for member in dispatch.pool if member.link.twin is None
    }
    return [
        {
            "targets": [urlsplit(url).netloc],
            "labels": {"__scheme__": urlsplit(url).scheme, "role": role.value},
        }
        for url, role in roles.items()
    ]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


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
