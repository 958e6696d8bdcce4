"""Engines of one configuration and other weights: their KV is never mixed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import models
from tests.engine import Engine, connector_arguments, hand_off, running, start, start_frontend
from tests.engines.conftest import ARGUMENTS, Trio, random_prompt
from tests.http_client import HTTP
from tests.parity import FLOAT32, compare

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

REFUSAL_S = 5.0


class Pool:
    """A decode engine, a frontend, and prefill engines on a folder whose files change."""

    def __init__(self, folder: Path, logs: Path, llama: Trio) -> None:
        self.folder, self._logs, self.llama = folder, logs, llama
        self.frontend = start_frontend(
            "serve",
            models.tiny_llama(),
            ("--decode", llama.consumer.url, "--local-below", "0", "--max-model-len", "4096"),
            folder=logs,
        )

    @contextmanager
    def prefill(self) -> Iterator[Engine]:
        """A prefill engine on what the folder contains now."""
        words = (*ARGUMENTS["tiny-llama"], *connector_arguments("prefill", lease_s=2))
        engine = start("changing", self.folder, words, cores="0", folder=self._logs)
        with running([engine]):
            yield engine

    def engines(self, *words: str) -> str:
        """Run ``vllm-pd engines``."""
        command = [str(Path(sys.executable).with_name("vllm-pd")), "engines", *words]
        done = subprocess.run(
            [*command, "--frontend", self.frontend.url],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def problem(self, engine: Engine) -> str:
        pool = HTTP.get(f"{self.frontend.url}/pd/v1/pool", timeout=10).json()
        found: dict[str, Any] = {each["url"]: each["problem"] for each in pool["engines"]}
        return str(found[engine.url])

    @contextmanager
    def using(self, engine: Engine) -> Iterator[None]:
        self.engines("add", engine.url, "--role", "prefill")
        try:
            yield
        finally:
            self.engines("remove", engine.url)

    def wait_until_refused(self, engine: Engine, words: str) -> None:
        deadline = time.monotonic() + REFUSAL_S
        while words not in (problem := self.problem(engine)):
            assert time.monotonic() < deadline, f"not refused for {words}: {problem!r}"
            time.sleep(0.1)
        assert "weights" in self.engines("list")
        assert words in self.frontend.log.read_text()

    def assert_right(self, seed: int) -> None:
        """Five of five answers are the decode engine's own."""
        for number in range(5):
            prompt = random_prompt(300, seed + number)
            expected = self.llama.alone.complete(prompt, 8)
            answer = self.frontend.complete(prompt, 8)
            assert answer.token_ids == expected.token_ids


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, logs: Path, llama: Trio) -> Iterator[Pool]:
    folder = tmp_path_factory.mktemp("changing") / "model"
    models.reshard(models.tiny_llama(), folder)
    pool = Pool(folder, logs, llama)
    with running([pool.frontend]):
        yield pool


def test_the_same_weights_in_other_files_at_another_path_are_the_same(pool: Pool) -> None:
    with pool.prefill() as prefill, pool.using(prefill):
        deadline = time.monotonic() + 30
        while pool.problem(prefill):
            assert time.monotonic() < deadline, pool.problem(prefill)
            time.sleep(0.1)
        pool.assert_right(700)
        prompt = random_prompt(300, 710)
        expected = pool.llama.alone.complete(prompt, 8)
        compare(expected, hand_off(prefill, pool.llama.consumer, prompt, 8), FLOAT32)
        assert prefill.metrics()['pd_producer_handoffs_total{state="committed"}'] >= 6


def test_an_engine_that_restarts_on_other_weights_is_refused(pool: Pool) -> None:
    shutil.rmtree(pool.folder)
    shutil.copytree(models.tiny_llama_other(), pool.folder)
    for file in ("config.json", "tokenizer.json"):
        ours, theirs = models.tiny_llama() / file, pool.folder / file
        assert ours.read_bytes() == theirs.read_bytes()
    with pool.prefill() as prefill, pool.using(prefill):
        pool.wait_until_refused(prefill, "its weights are")
        pool.assert_right(720)
        # Without our frontend, too.
        with pytest.raises(httpx.HTTPStatusError):
            hand_off(prefill, pool.llama.consumer, random_prompt(300, 730), 8)
        assert "its weights are" in pool.llama.consumer.log.read_text()
        name = 'pd_handoff_failures_total{reason="peer_incompatible"}'
        assert pool.llama.consumer.metrics()[name] >= 1
        prefill.wait_until_at_rest(60)
    pool.llama.consumer.wait_until_at_rest()


def test_one_row_that_was_changed_is_found_when_all_bytes_are_read(pool: Pool) -> None:
    shutil.rmtree(pool.folder)
    shutil.copytree(models.tiny_llama(), pool.folder)
    models.change_one_row(pool.folder)
    with pool.prefill() as prefill, pool.using(prefill):
        pool.wait_until_refused(prefill, "its weights are full:")
        pool.assert_right(740)
