"""Two releases side by side whose control protocols differ: each works with its own only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests import models
from tests.engine import (
    Engine,
    connector_arguments,
    free_port,
    hand_off,
    running,
    start,
    start_frontend,
)
from tests.engines.conftest import ARGUMENTS, random_prompt
from vllm_pd_plugin.protocol.wire import PROTOCOL_VERSION

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

_NEXT_RELEASE = f"""
import importlib.abc, importlib.util, sys

class Next(importlib.abc.MetaPathFinder):
    # What the next release does: another version in every header.
    def find_spec(self, name, path, target=None):
        if name != "vllm_pd_plugin.protocol.wire":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            module.PROTOCOL_VERSION = {PROTOCOL_VERSION + 1}
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Next())
"""


class Site:
    """engines: a prefill and a decode engine of each release."""

    def __init__(self, logs: Path, stack: ExitStack) -> None:
        folder = logs / "next-release"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(_NEXT_RELEASE)
        self.environs = {"old": {}, "new": {"PYTHONPATH": str(folder)}}
        self.model = models.tiny_llama()
        self._logs = logs
        self.engines: dict[tuple[str, str], Engine] = {}
        for release, environ in self.environs.items():
            for role in ("prefill", "decode"):
                port = free_port()
                arguments = (*ARGUMENTS["tiny-llama"], *connector_arguments(role, port=port))
                self.engines[release, role] = start(
                    f"{release}-{role}",
                    self.model,
                    arguments,
                    cores="0" if role == "prefill" else "1",
                    folder=logs,
                    control_port=port,
                    environ=environ,
                )
        stack.enter_context(running(list(self.engines.values())))

    def frontend(self, release: str) -> Engine:
        """A frontend of a release over all four engines."""
        urls = {
            role: [engine.url for (_, each), engine in self.engines.items() if each == role]
            for role in ("prefill", "decode")
        }
        words = ["--prefill", *urls["prefill"], "--decode", *urls["decode"], "--local-below", "0"]
        return start_frontend(
            "serve",
            self.model,
            (*words, "--max-model-len", "4096"),
            folder=self._logs,
            environ=self.environs[release],
        )


@pytest.fixture(scope="module")
def site(logs: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(logs, stack)


def test_engines_of_two_releases_refuse_each_other(site: Site) -> None:
    """Neither hangs, and neither uses what the other says."""
    prompt = random_prompt(300, 90)
    for ours, theirs in (("old", "new"), ("new", "old")):
        producer, consumer = site.engines[ours, "prefill"], site.engines[theirs, "decode"]
        with pytest.raises(httpx.HTTPStatusError):
            hand_off(producer, consumer, prompt, 8)
        assert "speaks version" in consumer.log.read_text()
        own = site.engines[theirs, "prefill"]
        assert hand_off(own, consumer, prompt, 8).token_ids == own.complete(prompt, 8).token_ids
    for engine in site.engines.values():
        engine.wait_until_at_rest(60)


@pytest.mark.parametrize("release", ["old", "new"])
def test_a_frontend_keeps_to_engines_of_its_own_release(site: Site, release: str) -> None:
    other = {"old": "new", "new": "old"}[release]
    prompt = random_prompt(300, 91)
    expected = site.engines[release, "prefill"].complete(prompt, 40)
    with running([site.frontend(release)]) as (frontend,):
        states = {
            engine["url"]: (engine["state"], engine["problem"])
            for engine in httpx.get(f"{frontend.url}/pd/v1/pool", timeout=10).json()["engines"]
        }
        for role in ("prefill", "decode"):
            assert states[site.engines[release, role].url] == ("up", "")
            state, problem = states[site.engines[other, role].url]
            assert state == "down"
            assert "run the same release of vllm-pd-plugin on both" in problem
        for _ in range(4):
            assert frontend.complete(prompt, 40).token_ids == expected.token_ids
        metrics = frontend.metrics()
        assert metrics['pd_frontend_routes_total{reason="disaggregated"}'] == 4
        assert sum(v for k, v in metrics.items() if k.startswith("pd_frontend_retries_total")) == 0
