"""Who may call the admin API, and what it changes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from vllm_pd_plugin.frontend.pool.membership import Membership, Wanted
from vllm_pd_plugin.frontend.routing.choice import Role

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.api.admin import make_router

A, B = "http://a:1", "http://b:2"


class Admin:
    """The API before an empty pool; ``applied`` counts how often it is told of a change."""

    def __init__(self, host: str | None = "127.0.0.1", key: str | None = None) -> None:
        self.membership = Membership({A: Wanted(Role.DECODE)})
        self.applied = 0
        app = FastAPI()
        app.include_router(make_router(_Pool(), self.membership, self._apply, host, key))  # type: ignore[arg-type]
        self.client = TestClient(app)

    def _apply(self) -> None:
        self.applied += 1


class _Pool:
    """A dispatch without engines or requests."""

    pool: tuple[()] = ()
    num_waiting = 0

    def __len__(self) -> int:
        return 0


def test_an_engine_is_added_drained_and_removed() -> None:
    admin = Admin()
    added = admin.client.post("/pd/v1/engines", json={"url": "b:2", "role": "both"})
    assert (added.status_code, added.json()) == (201, {"url": B})
    assert admin.membership.engines[B] == Wanted(Role.BOTH)
    assert admin.client.post("/pd/v1/engines/drain", json={"url": B}).status_code == 202
    assert admin.membership.engines[B].drain_until is not None
    assert admin.client.delete("/pd/v1/engines", params={"url": B}).status_code == 200
    assert admin.membership.engines == {A: Wanted(Role.DECODE)}
    assert admin.applied == 3


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/engines", {"url": B, "role": "cook"}, 422),
        ("POST", "/engines", {"url": "ftp://b", "role": "both"}, 422),
        ("POST", "/engines", {"url": B, "role": "both", "colour": "red"}, 422),
        ("POST", "/engines/drain", {"url": B}, 404),
        ("POST", "/engines/drain", {"url": A, "timeout_s": -1}, 422),
        ("POST", "/engines/drain", {"url": A, "timeout_s": "nan"}, 422),
        ("DELETE", f"/engines?url={B}", None, 404),
    ],
)
def test_nonsense_changes_nothing(method: str, path: str, body: Any, status: int) -> None:
    admin = Admin()
    answer = admin.client.request(method, f"/pd/v1{path}", json=body)
    assert answer.status_code == status
    assert admin.membership.engines == {A: Wanted(Role.DECODE)}
    assert admin.applied == 0


def test_the_pool_is_shown() -> None:
    assert Admin().client.get("/pd/v1/pool").json() == {
        "requests_open": 0,
        "requests_waiting": 0,
        "engines": [],
    }


@pytest.mark.parametrize("host", [None, "0.0.0.0", "10.0.0.1"])
def test_beyond_loopback_a_key_is_needed(host: str | None) -> None:
    answer = Admin(host).client.get("/pd/v1/pool")
    assert answer.status_code == 403
    assert "VLLM_PD_ADMIN_KEY" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Basic secret", 401),
        ("Bearer ", 401),
        ("Bearer secret", 200),
        ("bearer secret", 200),
    ],
)
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_with_a_key_everybody_needs_it(host: str, header: str | None, status: int) -> None:
    headers = {} if header is None else {"Authorization": header}
    admin = Admin(host, "secret")
    assert admin.client.get("/pd/v1/pool", headers=headers).status_code == status
    add = admin.client.post("/pd/v1/engines", json={"url": B, "role": "both"}, headers=headers)
    assert (add.status_code == 201) == (status == 200)
