"""A prefill and a decode engine of two of vLLM's release lines: they hand off, or are refused for
what they compute."""

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
from tests.http_client import HTTP
from tests.model_files import REPO
from tests.parity import FLOAT32, compare

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

OLD = REPO / ".venv-0.31" / "bin"
PROMPTS = [[(7 * i + 13 * j * j) % 40_000 + 100 for j in range(150 + 11 * i)] for i in range(50)]
ARGUMENTS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"),
    *("--no-enable-prefix-caching", "--num-gpu-blocks-override", "256"),
)


def start_engine(name: str, model: Path, folder: Path, programs: Path | None, core: str) -> Engine:
    """Start an engine whose weights are what the operator says they are."""
    port = free_port()
    words = (*ARGUMENTS, *connector_arguments("both", port=port, weights_id="named"))
    return start(
        *(name, model, words),
        cores=core,
        folder=folder,
        control_port=port,
        programs=programs,
    )


class Site:
    """An engine of each release line, and one of the old with other weights of the same name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.new = start_engine("new", models.tiny_llama(), folder, None, "0")
        self.old = start_engine("old", models.tiny_llama(), folder, OLD, "1")
        self.other = start_engine("other", models.tiny_llama_other(), folder, OLD, "1")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("minors"))
    with running([site.new, site.old, site.other]):
        yield site


@pytest.mark.parametrize("consumer", ["new", "old"])
def test_fifty_prompts_are_answered_as_by_the_decode_engine_alone(
    site: Site, consumer: str
) -> None:
    decode: Engine = getattr(site, consumer)
    prefill = site.old if consumer == "new" else site.new
    before = prefill.metrics().get('pd_producer_handoffs_total{state="committed"}', 0.0)
    for number, prompt in enumerate(PROMPTS):
        how = hand_off_at_once if number % 2 else hand_off
        compare(decode.complete(prompt, 12), how(prefill, decode, prompt, 12), FLOAT32)
    committed = prefill.metrics()['pd_producer_handoffs_total{state="committed"}']
    assert committed - before == len(PROMPTS)
    for engine in (prefill, decode):
        engine.wait_until_at_rest()


@pytest.mark.parametrize("consumer", ["new", "other"])
def test_weights_of_one_name_that_compute_something_else_are_refused_with_the_numbers(
    site: Site, consumer: str
) -> None:
    decode: Engine = getattr(site, consumer)
    prefill = site.other if consumer == "new" else site.new
    with pytest.raises(httpx.HTTPStatusError):
        hand_off(prefill, decode, PROMPTS[0], 8)
    log = decode.log.read_text()
    assert "its answers to the probe prompt are" in log
    assert "in layer 0 value" in log
    assert "expected 0.0002 at most (float32, vLLM 0.3" in log
    for engine in (prefill, decode):
        assert len(engine.complete(PROMPTS[1], 4).token_ids) == 4
        engine.wait_until_at_rest(60)


def test_a_frontend_serves_from_both_and_keeps_out_what_computes_something_else(
    site: Site,
) -> None:
    words = ("--prefill", site.old.url, site.other.url, "--decode", site.new.url)
    rest = ("--local-below", "0", "--max-model-len", "2048")
    frontend = start_frontend("serve", models.tiny_llama(), (*words, *rest), folder=site.folder)
    with running([frontend]):
        for prompt in PROMPTS[:10]:
            compare(site.new.complete(prompt, 12), frontend.complete(prompt, 12), FLOAT32)
        metrics = frontend.metrics()
        assert metrics['pd_frontend_routes_total{reason="disaggregated"}'] == 10
        pool = HTTP.get(f"{frontend.url}/pd/v1/pool", timeout=10).json()["engines"]
        problems = {engine["url"]: engine["problem"] for engine in pool}
        assert not problems[site.old.url]
        assert "its answers to the probe prompt are" in problems[site.other.url]
