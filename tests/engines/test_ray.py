"""Pools on Ray Serve: real Ray, several nodes on this machine, real engines."""

from __future__ import annotations

import copy
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests import models
from tests.alone import Alone
from tests.engine import Engine
from tests.engines.conftest import random_prompt
from tests.engines.frontend_failures.cluster import stream
from tests.http_client import HTTP
from tests.ray_cluster import RayCluster, kill_family, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve.yaml"
ADMIN_KEY = secrets.token_hex(16)
ENGINE_ARGS = {
    "dtype": "float32",
    "enforce-eager": True,
    "max-model-len": 4096,
    "num-gpu-blocks-override": 1024,
    "distributed-executor-backend": "uni",
}
NUM_TOKENS = 300
HEAL_S = 240.0


class Site:
    """The cluster, what runs on it, and what one engine alone has answered."""

    def __init__(self, alone: Alone) -> None:
        self.cluster = RayCluster(
            {
                "VLLM_PD_ADMIN_KEY": ADMIN_KEY,
                # As on a cluster of several machines: engines bind the node's own address.
                "VLLM_PD_CLUSTER_KEY": secrets.token_hex(16),
                "VLLM_CPU_KVCACHE_SPACE": "1",
            }
        )
        self.config: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
        self.model = models.tiny_llama()
        self.prompts = [random_prompt(300, 80 + i) for i in range(6)]
        self.expected = [alone.tokens(prompt, NUM_TOKENS) for prompt in self.prompts]
        greeting = "Good morning"
        answer = alone.keep(greeting, lambda one: chat(one.url, one.model, greeting))
        self.question: tuple[str, str] = (greeting, answer)

    def __enter__(self) -> Site:
        try:
            self._set_up()
        except BaseException:
            self.cluster.stop()
            raise
        return self

    def _set_up(self) -> None:
        self.cluster.start_head()
        self.cluster.add("first", 4, stays=1)
        self.config["http_options"]["port"] = self.cluster.http_port
        args = self._args
        args["model"] = str(self.model)
        args["served_model_name"] = self.model.name
        args["engine_args"] = dict(ENGINE_ARGS)
        args["routing"] = {"local_below": 0}
        for pool in ("prefill", "decode"):
            args[pool] = {"replicas": 1, "num_cpus": 1, "drain_timeout_s": 30}
        args["frontend"] = {
            "replicas": 1,
            "num_cpus": 1,
            "resources": {"stays": 0.01},
            "args": {"queue-timeout": HEAL_S},  # as long as it takes to start an engine
        }
        self.deploy()

    def __exit__(self, *_: object) -> None:
        self.cluster.stop()

    @property
    def _args(self) -> dict[str, Any]:
        args: dict[str, Any] = self.config["applications"][0]["args"]
        return args

    @property
    def ingress(self) -> Engine:
        process: Any = None
        return Engine("ingress", self.cluster.url, self.model.name, process, Path())

    def deploy(self, **replicas: int) -> None:
        """Deploy the configuration, with as many replicas of some deployments."""
        config = copy.deepcopy(self.config)
        if replicas:
            config["applications"][0]["deployments"] = [
                {"name": name, "num_replicas": number} for name, number in replicas.items()
            ]
        self.cluster.deploy(config)
        self.cluster.wait_until_running()
        wait_until(lambda: {"decode", "prefill"} <= set(self.roles()), HEAL_S, "engines are there")

    def pool(self) -> list[dict[str, Any]]:
        """Return the engines that take requests, as the frontend sees them."""
        try:
            answer = HTTP.get(
                f"{self.cluster.url}/pd/v1/pool",
                headers={"Authorization": f"Bearer {ADMIN_KEY}"},
                timeout=10,
            )
            answer.raise_for_status()
        except httpx.HTTPError:
            return []
        engines: list[dict[str, Any]] = answer.json()["engines"]
        return [engine for engine in engines if engine["state"] == "up"]

    def roles(self) -> list[str]:
        return sorted(engine["role"] for engine in self.pool())

    def wait_for(self, *roles: str) -> None:
        wait_until(lambda: self.roles() == sorted(roles), HEAL_S, f"there are engines {roles}")
        self.cluster.wait_until_running()

    def wait_for_others(self, before: set[str]) -> None:
        """Wait until no engine is one of these, and there is one of each role."""

        def are_new() -> bool:
            pool = self.pool()
            is_whole = {engine["role"] for engine in pool} == {"decode", "prefill"}
            return is_whole and before.isdisjoint(engine["incarnation"] for engine in pool)

        wait_until(are_new, HEAL_S, "every engine is a new one")
        self.wait_for("decode", "prefill")

    def ask(self, index: int, begun: threading.Semaphore | None = None) -> list[Any]:
        prompt = self.prompts[index]
        return stream(self.ingress, prompt, NUM_TOKENS, begun=begun, timeout_s=HEAL_S)

    @contextmanager
    def load(self, num_clients: int = 2) -> Iterator[list[int]]:
        """Ask one thing after another meanwhile; every answer must be what one engine says."""
        stop = threading.Event()
        answered: list[int] = []

        def client(number: int) -> None:
            index = number
            while not stop.is_set():
                index = (index + 1) % len(self.prompts)
                assert self.ask(index) == self.expected[index]
                answered.append(index)
                stop.wait(0.3)  # engines that start want the machine, too

        with ThreadPoolExecutor(num_clients) as pool:
            clients = [pool.submit(client, number) for number in range(num_clients)]
            try:
                yield answered
            finally:
                stop.set()
                for each in clients:
                    each.result(120)


def chat(url: str, model: str, question: str) -> str:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 24,
    }
    answer = HTTP.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    answer.raise_for_status()
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


@pytest.fixture(scope="module")
def site(alone_of: Callable[[str], Alone]) -> Iterator[Site]:
    with Site(alone_of("tiny-llama")) as site:
        yield site


def test_what_the_example_deploys_answers_like_one_engine(site: Site) -> None:
    question, expected = site.question
    assert chat(site.cluster.url, site.model.name, question) == expected
    assert [site.ask(index) for index in range(2)] == site.expected[:2]
    assert site.roles() == ["decode", "prefill"]


def test_who_has_no_key_does_not_see_the_pool(site: Site) -> None:
    assert HTTP.get(f"{site.cluster.url}/pd/v1/pool", timeout=10).status_code == 401


def test_engines_are_reached_at_their_node_s_address_and_have_no_open_api(site: Site) -> None:
    for engine in site.pool():
        assert "127.0.0.1" not in engine["url"]
        body = {"model": site.model.name, "prompt": [5, 6, 7], "max_tokens": 1}
        for path in ("/v1/completions", "/invocations", "/inference/v1/generate"):
            assert HTTP.post(f"{engine['url']}{path}", json=body).status_code == 403
        assert HTTP.get(f"{engine['url']}/health").status_code == 200


def test_a_pool_grows_and_shrinks_under_load_and_loses_nothing(site: Site) -> None:
    with site.load(3) as answered:
        site.deploy(DecodeEngine=2)
        site.wait_for("decode", "decode", "prefill")
        before = len(answered)
        wait_until(lambda: len(answered) > before + 6, 120, "two decode engines answer")
        site.deploy(DecodeEngine=1)
        site.wait_for("decode", "prefill")
        before = len(answered)
        wait_until(lambda: len(answered) > before + 3, 120, "the one that is left answers")


@pytest.mark.parametrize("pool", ["PrefillEngine", "DecodeEngine"])
def test_streams_go_on_when_a_replica_dies(site: Site, pool: str) -> None:
    site.deploy(DecodeEngine=2)
    site.wait_for("decode", "decode", "prefill")
    before = {engine["incarnation"] for engine in site.pool()}
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(6) as threads:
        answers: list[Future[list[Any]]] = [threads.submit(site.ask, i, begun) for i in range(6)]
        assert all(begun.acquire(timeout=60) for _ in answers)
        kill_family(site.cluster.replicas(pool)[0]["pid"])
        assert [answer.result(240) for answer in answers] == site.expected
        # The prefill pool has one engine: until there is another, prompts are computed elsewhere.
        assert site.ask(0) == site.expected[0]
    site.wait_for("decode", "decode", "prefill")
    assert len(before - {engine["incarnation"] for engine in site.pool()}) == 1


def test_an_update_replaces_every_engine_and_drops_nothing(site: Site) -> None:
    site.deploy()
    site.wait_for("decode", "prefill")
    before = {engine["incarnation"] for engine in site.pool()}
    site.cluster.add("more", 4, stays=1)  # an update has old and new side by side
    site._args["engine_args"]["max-num-seqs"] = 48
    with site.load() as answered:
        site.deploy()
        site.wait_for_others(before)
        then = len(answered)
        wait_until(lambda: len(answered) > then + 2, 60, "the new engines answer")
    assert before.isdisjoint(engine["incarnation"] for engine in site.pool())


def test_streams_go_on_when_a_node_is_lost(site: Site) -> None:
    """The node that is lost has a decode engine, and neither a frontend nor Serve's ingress."""
    site.cluster.add("lost", 4, leaves=1)
    site._args["decode"] |= {"resources": {"leaves": 0.01}}
    site.deploy()
    site.wait_for("decode", "prefill")
    (old,) = [e["incarnation"] for e in site.pool() if e["role"] == "decode"]
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(6) as threads:
        answers = [threads.submit(site.ask, i, begun) for i in range(6)]
        assert all(begun.acquire(timeout=60) for _ in answers)
        site.cluster.add("other", 4, leaves=1)
        site.cluster.lose("lost")
        # Nobody decodes until Serve has started another engine, on another node.
        assert [answer.result(300) for answer in answers] == site.expected
    site.wait_for("decode", "prefill")
    assert old not in {engine["incarnation"] for engine in site.pool()}


def test_engines_outlive_the_head(site: Site) -> None:
    before = {engine["incarnation"] for engine in site.pool()}
    site.cluster.lose("head")
    site.cluster.start_head()
    site.wait_for("decode", "prefill")
    assert {engine["incarnation"] for engine in site.pool()} == before
    assert [site.ask(index) for index in range(6)] == site.expected
