"""A pool is taken from one of vLLM's release lines to the next under load, engine by engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from tests import models
from tests.engine import Engine, running, start_frontend
from tests.http_client import HTTP
from tests.minors.test_pool import OLD, PROMPTS, start_engine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

ROLES = ("prefill", "prefill", "decode", "decode")
CLIENTS = 2


class Load:
    """Clients that ask one thing after the other, until they are told to stop.

    answers: of each prompt, by its number. failures: what went wrong, in words.
    """

    def __init__(self, frontend: Engine) -> None:
        self._frontend = frontend
        self._stopping = threading.Event()
        self.answers: dict[int, set[tuple[int, ...]]] = {}
        self.failures: list[str] = []
        self.count = 0
        self._threads = [
            threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(180)
            assert not thread.is_alive(), "a request hangs"

    def _ask(self, client: int) -> None:
        number = client
        while not self._stopping.is_set():
            number = (number + CLIENTS) % len(PROMPTS)
            try:
                answer = self._frontend.complete(PROMPTS[number], 24)
            except httpx.HTTPError as error:
                self.failures.append(repr(error))
                continue
            self.answers.setdefault(number, set()).add(answer.token_ids)
            self.count += 1

    def wait_for(self, more: int) -> None:
        """Wait until so many more have been answered."""
        wanted, deadline = self.count + more, time.monotonic() + 180
        while self.count < wanted:
            assert time.monotonic() < deadline, "no answers any more"
            time.sleep(0.1)


class Pool:
    """Two prefill and two decode engines, and a frontend of the new release line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.old = [self.start(OLD, number) for number in range(len(ROLES))]

    def start(self, programs: Path | None, number: int) -> Engine:
        name = f"{'new' if programs is None else 'old'}-{number}"
        return start_engine(name, models.tiny_llama(), self.folder, programs, str(number % 2))

    def serve(self) -> Engine:
        words = ["--prefill", *self.urls("prefill"), "--decode", *self.urls("decode")]
        rest = ("--local-below", "0", "--max-model-len", "2048")
        return start_frontend("serve", models.tiny_llama(), (*words, *rest), folder=self.folder)

    def urls(self, role: str) -> Sequence[str]:
        return [engine.url for engine, its in zip(self.old, ROLES, strict=True) if its == role]


def states(frontend: Engine) -> dict[str, tuple[str, str]]:
    engines = HTTP.get(f"{frontend.url}/pd/v1/pool", timeout=30).json()["engines"]
    return {engine["url"]: (engine["state"], engine["problem"]) for engine in engines}


def tell(frontend: Engine, call: str, **body: object) -> None:
    HTTP.post(f"{frontend.url}/pd/v1/{call}", json=body, timeout=60).raise_for_status()


def wait_until_up(frontend: Engine, engine: Engine) -> None:
    deadline = time.monotonic() + 120
    while (found := states(frontend).get(engine.url)) != ("up", ""):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def test_no_request_fails_while_every_engine_is_replaced_by_one_of_the_next_release_line(
    tmp_path: Path,
) -> None:
    pool = Pool(tmp_path)
    with running(pool.old), running([pool.serve()]) as (frontend,):
        for engine in pool.old:
            wait_until_up(frontend, engine)
        new: list[Engine] = []
        try:
            with Load(frontend) as load:
                load.wait_for(20)
                for number, (old, role) in enumerate(zip(pool.old, ROLES, strict=True)):
                    new.append(pool.start(None, number))
                    new[-1].wait_until_ready()
                    tell(frontend, "engines", url=new[-1].url, role=role)
                    wait_until_up(frontend, new[-1])
                    tell(frontend, "engines/drain", url=old.url, timeout_s=60)
                    load.wait_for(10)
                    where = f"{frontend.url}/pd/v1/engines"
                    HTTP.delete(where, params={"url": old.url}, timeout=60).raise_for_status()
                    old.stop()
                load.wait_for(20)
            assert load.failures == []
            assert all(len(answers) == 1 for answers in load.answers.values())
            metrics = frontend.metrics()
            handed_off = metrics['pd_frontend_routes_total{reason="disaggregated"}']
            assert handed_off >= 0.9 * load.count
            assert set(states(frontend)) == {engine.url for engine in new}
        finally:
            for engine in new:
                engine.stop()
