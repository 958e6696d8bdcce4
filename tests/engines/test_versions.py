"""Releases side by side: engines meet at the version that both know, or refuse in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests import models
from tests.engine import (
    Engine,
    connector_arguments,
    free_port,
    hand_off,
    hand_off_at_once,
    running,
    start,
    start_frontend,
)
from tests.engine_site import Changes, environ_of
from tests.engines.conftest import ARGUMENTS, Trio, random_prompt
from tests.http_client import HTTP
from tests.parity import FLOAT32, compare
from vllm_pd_plugin.protocol.framing import PROTOCOL_VERSION

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

NEXT = PROTOCOL_VERSION + 1


def next_release(oldest: int) -> Changes:
    """What the next release says in its source: another version, and perhaps no knowledge of
    ours."""
    return {
        "vllm_pd_plugin.protocol.framing": {
            rf"(?m)^{constant} = \d+$": f"{constant} = {version}"
            for constant, version in (("PROTOCOL_VERSION", NEXT), ("OLDEST_VERSION", oldest))
        }
    }


class Site:
    """engines: a prefill and a decode engine of each release.

    The next release's decode engine still knows our version; its prefill engine does not."""

    def __init__(self, logs: Path, llama: Trio) -> None:
        self._logs = logs
        self.model = models.tiny_llama()
        self.environs: dict[str, dict[str, str]] = {"old": {}}
        self.engines: dict[tuple[str, str], Engine] = {
            ("old", "prefill"): llama.producer,
            ("old", "decode"): llama.consumer,
        }
        for role, oldest in (("prefill", NEXT), ("decode", PROTOCOL_VERSION)):
            self.environs["new"] = environ_of(next_release(oldest))
            port = free_port()
            self.engines["new", role] = start(
                f"new-{role}",
                self.model,
                (*ARGUMENTS["tiny-llama"], *connector_arguments(role, port=port)),
                cores="0" if role == "prefill" else "1",
                folder=logs,
                control_port=port,
                environ=self.environs["new"],
            )

    @property
    def started(self) -> list[Engine]:
        return [engine for (release, _), engine in self.engines.items() if release == "new"]

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
def site(logs: Path, llama: Trio) -> Iterator[Site]:
    site = Site(logs, llama)
    with running(site.started):
        yield site


@pytest.mark.parametrize("release", ["old", "new"])
def test_an_engine_that_knows_both_versions_fetches_from_either(
    site: Site, llama: Trio, release: str
) -> None:
    producer, consumer = site.engines[release, "prefill"], site.engines["new", "decode"]
    for seed, how in enumerate((hand_off, hand_off_at_once)):
        prompt = random_prompt(600, 80 + 10 * (release == "new") + seed)
        compare(llama.alone.complete(prompt), how(producer, consumer, prompt), FLOAT32)
    for engine in (producer, consumer):
        engine.wait_until_at_rest()


def test_engines_without_a_common_version_refuse_each_other(site: Site, llama: Trio) -> None:
    """Neither hangs, and neither uses what the other says."""
    prompt = random_prompt(300, 70)
    theirs, ours = site.engines["new", "prefill"], llama.consumer
    with pytest.raises(httpx.HTTPStatusError):
        hand_off(theirs, ours, prompt, 8)
    assert "speaks version" in ours.log.read_text()
    expected = llama.alone.complete(prompt, 8)
    compare(expected, hand_off(llama.producer, ours, prompt, 8), FLOAT32)
    for engine in (theirs, ours):
        engine.wait_until_at_rest(60)


@pytest.mark.parametrize("release", ["old", "new"])
def test_a_frontend_keeps_to_engines_of_its_own_release(
    site: Site, llama: Trio, release: str
) -> None:
    other = {"old": "new", "new": "old"}[release]
    prompt = random_prompt(300, 91)
    expected = llama.alone.complete(prompt, 40)
    with running([site.frontend(release)]) as (frontend,):
        states = {
            engine["url"]: (engine["state"], engine["problem"])
            for engine in HTTP.get(f"{frontend.url}/pd/v1/pool", timeout=10).json()["engines"]
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
