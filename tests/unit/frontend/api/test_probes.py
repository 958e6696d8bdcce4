"""Liveness, which is not readiness."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine.exceptions import EngineDeadError

    from vllm_pd_plugin.frontend.api.probes import LIVE_PATH, PROXY_PATH, make_probe_router


@pytest.mark.parametrize(("errored", "status"), [(False, 200), (True, 503)])
def test_a_frontend_is_alive_as_long_as_it_gives_answers(errored: bool, status: int) -> None:
    client: Any = SimpleNamespace(errored=errored)  # and nothing of engines is asked
    app = FastAPI()
    app.include_router(make_probe_router(client))
    answer = TestClient(app).get(LIVE_PATH)
    assert answer.status_code == status
    assert answer.json()["live"] is not errored


@pytest.mark.parametrize(("problem", "status"), [(None, 200), ("no engine is up", 503)])
def test_who_expects_a_proxy_is_told_whether_requests_are_served(
    problem: str | None, status: int
) -> None:
    async def check_health() -> None:
        if problem is not None:
            raise EngineDeadError(problem)

    client: Any = SimpleNamespace(errored=False, check_health=check_health)
    app = FastAPI()
    app.include_router(make_probe_router(client))
    answer = TestClient(app).get(PROXY_PATH)
    assert answer.status_code == status
    assert answer.json().get("problem") == problem
