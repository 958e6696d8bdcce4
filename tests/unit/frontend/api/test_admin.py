"""Who may call the admin API, and what it changes."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from vllm_pd_plugin.frontend.engine_hosts import EngineHosts
from vllm_pd_plugin.frontend.pool.membership import Membership, Wanted
from vllm_pd_plugin.frontend.routing.choice import Role

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.fakes.links import link_of, make_member
    from vllm_pd_plugin.frontend.api.admin import describe_targets, make_router

A, B = "http://a:1", "http://b:2"


KEYED = {"Authorization": "Bearer secret"}


class Admin:
    """The API before an empty pool; ``applied`` counts how often it is told of a change."""

    def __init__(self, *allowed: str) -> None:
        self.membership = Membership({A: Wanted(Role.DECODE)})
        self.applied = 0
        app = FastAPI()
        hosts = EngineHosts.parse(["b", *allowed], [A])
        app.include_router(make_router(_Pool(), self.membership, self._apply, hosts, "secret"))  # type: ignore[arg-type]
        self.client = TestClient(app, headers=KEYED)
        self.stranger = TestClient(app, base_url="http://127.0.0.1:8000")

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


def test_prometheus_is_told_each_server_once() -> None:
    first = make_member("http://a:1", Role.PREFILL)
    rank = make_member("http://a:1#1", Role.PREFILL)
    down = make_member("https://[fd00::1]:2", Role.DECODE, is_attached=False)
    alias = make_member("http://alias:1", Role.PREFILL, is_attached=False)
    link_of(alias).twin = "http://a:1"
    dispatch: Any = SimpleNamespace(pool=[first, rank, down, alias])
    assert describe_targets(dispatch) == [
        {"targets": ["a:1"], "labels": {"__scheme__": "http", "role": "prefill"}},
        {"targets": ["[fd00::1]:2"], "labels": {"__scheme__": "https", "role": "decode"}},
    ]
    assert Admin().client.get("/pd/v1/targets").json() == []


@pytest.mark.parametrize(
    "url", ["http://c:1", "http://169.254.169.254", "http://10.0.0.1:80", "http://a.evil:1"]
)
def test_an_engine_elsewhere_is_refused_and_not_asked(url: str) -> None:
    admin = Admin()
    answer = admin.client.post("/pd/v1/engines", json={"url": url, "role": "both"})
    assert answer.status_code == 403
    assert "--engine-hosts" in answer.json()["detail"]
    assert admin.membership.engines == {A: Wanted(Role.DECODE)}
    assert admin.applied == 0


def test_an_engine_is_added_where_the_operator_allows_it() -> None:
    admin = Admin("10.0.0.0/24")
    added = admin.client.post("/pd/v1/engines", json={"url": "10.0.0.7:1", "role": "both"})
    assert added.status_code == 201
    assert "http://10.0.0.7:1" in admin.membership.engines


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic secret"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer secret2"},
        {"Authorization": "Bearer s\xe9cret"},
        {"Host": "127.0.0.1:8000"},
        {"Host": "evil.example"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"Forwarded": "for=127.0.0.1", "Via": "1.1 proxy"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/pool", None),
        ("GET", "/targets", None),
        ("POST", "/engines", {"url": B, "role": "both"}),
        ("POST", "/engines/drain", {"url": A}),
        ("DELETE", f"/engines?url={A}", None),
    ],
)
def test_without_the_key_nobody_gets_anything_wherever_they_come_from(
    headers: dict[str, str], method: str, path: str, body: Any
) -> None:
    admin = Admin()
    sent = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = admin.stranger.request(method, f"/pd/v1{path}", json=body, headers=sent)
    assert answer.status_code == 401
    assert "VLLM_PD_ADMIN_KEY" in answer.json()["detail"]
    assert admin.membership.engines == {A: Wanted(Role.DECODE)}


def test_the_word_bearer_is_written_in_any_way() -> None:
    headers = {"Authorization": "bearer secret"}
    assert Admin().stranger.get("/pd/v1/pool", headers=headers).status_code == 200
