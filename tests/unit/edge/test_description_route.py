"""The page of an engine's API server that says where frontends attach."""

from __future__ import annotations

import asyncio
import sys
import types
import warnings
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_pd_plugin.edge.hooks import _describe_engine, add_description_route
from vllm_pd_plugin.engine_port.messages import DESCRIPTION_PATH

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.edge.connector import PdConnector

LAUNCHER = "vllm.entrypoints.launchers.app"


class FakeApp:
    """Takes routes, and knows an engine core that answers utility calls."""

    def __init__(self) -> None:
        self.routes: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {}
        self.methods: dict[str, list[str]] = {}
        self.calls: list[str] = []
        core = SimpleNamespace(_call_utility_async=self._call, core_engines=[b"core"])
        self.state = SimpleNamespace(engine_client=SimpleNamespace(engine_core=core))

    def add_api_route(
        self, path: str, endpoint: Callable[[], Coroutine[Any, Any, Any]], methods: list[str]
    ) -> None:
        assert path not in self.routes, "a route was added twice"
        self.routes[path], self.methods[path] = endpoint, methods

    async def _call(self, method: str, *, engine: bytes) -> dict[str, Any]:
        assert engine == b"core"
        self.calls.append(method)
        return {"engine_id": "engine"}


class Launcher(types.ModuleType):
    """vLLM's, as far as it is wrapped. calls: what was registered, with what."""

    def __init__(self) -> None:
        super().__init__(LAUNCHER)
        self.calls: list[tuple[Any, ...]] = []

    def register_api_routers(self, args: Any, app: Any, *more: Any, **kwargs: Any) -> None:
        self.calls.append((args, *more, kwargs))


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Any:
    launcher = Launcher()
    monkeypatch.setitem(sys.modules, LAUNCHER, launcher)
    return launcher


def test_an_api_server_says_where_frontends_attach(launcher: Any) -> None:
    add_description_route()
    app = FakeApp()
    launcher.register_api_routers("args", app, ("generate",), model="model")
    assert launcher.calls == [("args", ("generate",), {"model": "model"})]
    assert app.methods == {DESCRIPTION_PATH: ["GET"]}
    assert asyncio.run(app.routes[DESCRIPTION_PATH]()) == [{"engine_id": "engine"}]
    assert app.calls == ["pd_describe_engine"]


def test_the_engine_is_asked_anew_each_time(launcher: Any) -> None:
    add_description_route()
    app = FakeApp()
    launcher.register_api_routers("args", app)
    for _ in range(2):
        asyncio.run(app.routes[DESCRIPTION_PATH]())
    assert len(app.calls) == 2


def test_the_launcher_is_wrapped_once(launcher: Any) -> None:
    add_description_route()
    add_description_route()
    launcher.register_api_routers("args", FakeApp())
    assert len(launcher.calls) == 1


def test_without_an_api_server_there_is_nothing_to_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, LAUNCHER, raising=False)
    add_description_route()
    assert LAUNCHER not in sys.modules


def test_an_engine_core_asks_its_connector() -> None:
    connector = PdConnector.__new__(PdConnector)
    connector._scheduler = SimpleNamespace(describe_engine=lambda: {"engine_id": "engine"})
    core = SimpleNamespace(scheduler=SimpleNamespace(get_kv_connector=lambda: connector))
    assert _describe_engine(core) == {"engine_id": "engine"}
