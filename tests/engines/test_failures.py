"""Every failure ends: the request fails or is computed again, nothing leaks, nothing is wrong."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from threading import Event, Thread
from typing import Any

import httpx
import psutil
import pytest

from tests import models
from tests.engine import (
    PRODUCE,
    Completion,
    Engine,
    at_once,
    connector_arguments,
    free_port,
    hand_off,
    hand_off_at_once,
    running,
    start,
)
from tests.engines.conftest import ARGUMENTS, CHUNKED, STRETCH_BYTES, random_prompt
from tests.engines.control_client import ControlClient, corrupt_handoff
from tests.parity import FLOAT32, compare
from vllm_pd_plugin.protocol import wire

pytestmark = pytest.mark.engine

LEASE_S, PEER_TIMEOUT_S, FETCH_TIMEOUT_S = 4.0, 3.0, 8.0
OPTIONS = {
    "lease_s": LEASE_S,
    "peer_timeout_s": PEER_TIMEOUT_S,
    "fetch_timeout_s": FETCH_TIMEOUT_S,
}


class Cluster:
    """A producer that may be killed and restarted, and a consumer of each failure policy."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._control_port = free_port()
        self.producer = self._start_producer()
        self.failing = self._start_failing()
        self.recomputing = self._start_recomputing()

    def _start_producer(self) -> Engine:
        options = {**OPTIONS, "port": self._control_port, "stretch_bytes": STRETCH_BYTES}
        arguments = (*ARGUMENTS["tiny-llama"], *CHUNKED, *connector_arguments("prefill", **options))
        return start(
            "producer",
            models.tiny_llama(),
            arguments,
            cores="0",
            folder=self._logs,
            control_port=self._control_port,
            environ={"VLLM_SERVER_DEV_MODE": "1"},
        )

    def _start_failing(self) -> Engine:
        """Also the one that compares what it has read with what the producer holds."""
        options = connector_arguments("decode", **OPTIONS, integrity="digest")
        arguments = (*ARGUMENTS["tiny-llama"], *options)
        return start("failing", models.tiny_llama(), arguments, cores="1", folder=self._logs)

    def _start_recomputing(self) -> Engine:
        """Also the producer that a consumer may turn to when the first one fails."""
        port = free_port()
        options = {**OPTIONS, "kv_load_failure_policy": "recompute", "port": port}
        arguments = (*ARGUMENTS["tiny-llama"], *connector_arguments("both", **options))
        return start(
            "recomputing",
            models.tiny_llama(),
            arguments,
            cores="1",
            folder=self._logs,
            control_port=port,
        )

    def engines(self) -> list[Engine]:
        return [self.producer, self.failing, self.recomputing]

    def restart_producer(self) -> None:
        """Bring up another producer on the same control address."""
        self.producer = self._start_producer()
        self.producer.wait_until_ready()

    def prefill_s(self, num_tokens: int, seed: int) -> float:
        """Return how long the producer needs for a prompt; its prefix cache is empty afterwards."""
        started = time.monotonic()
        self.producer.complete(random_prompt(num_tokens, seed), 1)
        taken = time.monotonic() - started
        self.producer.forget_prefixes()
        return taken

    def assert_at_rest(self) -> None:
        for engine in self.engines():
            engine.wait_until_at_rest(LEASE_S + FETCH_TIMEOUT_S + 10)

    def assert_healthy(self, seed: int) -> None:
        """Both consumers still fetch from the producer, and answer right."""
        prompt = random_prompt(300, seed)
        expected = self.producer.complete(prompt, 8)
        for consumer in (self.failing, self.recomputing):
            before = failures(consumer)
            compare(expected, hand_off(self.producer, consumer, prompt, 8), FLOAT32)
            assert failures(consumer) == before


@pytest.fixture(scope="module")
def cluster(logs: Path) -> Iterator[Cluster]:
    cluster = Cluster(logs)
    with running(cluster.engines()):
        yield cluster
        cluster.producer.stop()  # perhaps not the one that was started first


@pytest.fixture(autouse=True)
def _living_producer(cluster: Cluster) -> None:
    """A test that failed may have left a dead one."""
    if cluster.producer.process.poll() is not None:
        cluster.restart_producer()


@contextmanager
def slowed(engine: Engine) -> Iterator[None]:
    """Let an engine compute a fifth of the time, so that a prefill has a middle on any machine."""
    worker, ended = psutil.Process(engine.worker_pid()), Event()

    def hold_back() -> None:
        try:
            while not ended.wait(0.01):
                worker.suspend()
                ended.wait(0.04)
                worker.resume()
        except psutil.NoSuchProcess:
            return  # the test has killed it

    thread = Thread(target=hold_back)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def failures(engine: Engine) -> dict[str, float]:
    """Return the failed handoffs by reason."""
    name = "pd_handoff_failures_total{reason="
    return {
        key.removeprefix(name).strip('"}'): value
        for key, value in engine.metrics().items()
        if key.startswith(name)
    }


def new_failures(engine: Engine, before: dict[str, float]) -> set[str]:
    return {reason for reason, count in failures(engine).items() if count > before.get(reason, 0)}


def assert_fails(engine: Engine, prompt: list[int], params: Any) -> set[str]:
    """The request is refused within the deadlines, and counted; returns the reasons."""
    before = failures(engine)
    started = time.monotonic()
    with pytest.raises(httpx.HTTPStatusError) as error:
        engine.complete(prompt, 4, kv_transfer_params=params)
    assert error.value.response.status_code in (400, 500)
    assert time.monotonic() - started < FETCH_TIMEOUT_S + 2 * PEER_TIMEOUT_S + 5
    engine.wait_until_at_rest()
    return new_failures(engine, before)


def assert_recomputes(
    engine: Engine, prompt: list[int], params: Any, expected: Completion
) -> set[str]:
    """The request is answered right all the same, and the failure counted."""
    before = failures(engine)
    compare(expected, engine.complete(prompt, 4, kv_transfer_params=params), FLOAT32)
    engine.wait_until_at_rest()
    return new_failures(engine, before)


def produce(cluster: Cluster, prompt: list[int]) -> dict[str, Any]:
    params = cluster.producer.complete(prompt, 1, kv_transfer_params=PRODUCE).kv_transfer_params
    assert params is not None
    return dict(params)


HOSTILE: dict[str, dict[str, Any]] = {
    "flag of another type": {"do_remote_prefill": "yes"},
    "both flags": {"do_remote_decode": True, "do_remote_prefill": True},
    "no address": {"remote_host": None, "remote_port": None},
    "nested": {"remote_host": {"a": [1, 2]}},
    "huge port": {"remote_port": 2**63 - 1},
    "number of a thousand bits": {"remote_port": 2**1000},
    "negative port": {"remote_port": -1},
    "port as text": {"remote_port": "80"},
    "foreign host": {"remote_host": "192.0.2.1"},
    "host with control characters": {"remote_host": "127.0.0.1\r\nX: y"},
    "huge host": {"remote_host": "a" * 100_000},
    "handoff of nobody": {"remote_handoff_id": "0" * 32},
    "handoff as number": {"remote_handoff_id": 7},
    "incarnation of nobody": {"remote_incarnation": "0" * 16},
    "nobody listens": {"remote_port": 1},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_parameters_fail_only_their_request(cluster: Cluster, name: str) -> None:
    prompt = random_prompt(200, 1)
    params = {**produce(cluster, prompt), **HOSTILE[name]}
    reasons = assert_fails(cluster.failing, prompt, params)
    # vLLM itself refuses a number that does not fit its own messages.
    assert reasons or name == "number of a thousand bits"


@pytest.mark.parametrize("value", ["x", 7, ["a"], 0])
def test_parameters_that_are_no_object_do_not_kill_the_engine(
    cluster: Cluster, value: object
) -> None:
    body = cluster.failing.body(random_prompt(50, 26), 2)
    body["vllm_xargs"] = {"kv_transfer_params": value}
    answer = httpx.post(f"{cluster.failing.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code in (200, 400, 500)
    cluster.assert_at_rest()
    cluster.assert_healthy(27)


def test_hostile_parameters_are_recomputed_where_configured(cluster: Cluster) -> None:
    prompt = random_prompt(200, 2)
    expected = cluster.producer.complete(prompt, 4)
    good = produce(cluster, prompt)
    for name in ("nested", "handoff of nobody", "incarnation of nobody", "nobody listens"):
        assert assert_recomputes(cluster.recomputing, prompt, {**good, **HOSTILE[name]}, expected)
    cluster.assert_at_rest()
    cluster.assert_healthy(3)


def test_another_prompts_handoff_is_never_used(cluster: Cluster) -> None:
    mine, theirs = random_prompt(256, 4), random_prompt(256, 5)
    expected = cluster.producer.complete(mine, 4)
    params = produce(cluster, theirs)
    assert assert_fails(cluster.failing, mine, params) == {"prompt_mismatch"}
    params = produce(cluster, theirs)  # vLLM has cancelled the first one after its failure
    assert assert_recomputes(cluster.recomputing, mine, params, expected) == {"prompt_mismatch"}
    cluster.assert_at_rest()


def test_an_engine_refuses_the_other_role(cluster: Cluster) -> None:
    prompt = random_prompt(50, 6)
    assert assert_fails(cluster.failing, prompt, PRODUCE) == {"wrong_role"}
    params = produce(cluster, prompt)
    assert assert_fails(cluster.producer, prompt, params) == {"wrong_role"}
    cluster.assert_at_rest()


def test_an_expired_lease_frees_the_blocks_and_refuses_the_consumer(cluster: Cluster) -> None:
    prompt = random_prompt(400, 7)
    before = cluster.producer.metrics()["pd_leases_expired_total"]
    params = produce(cluster, prompt)
    assert not cluster.producer.is_at_rest()
    cluster.producer.wait_until_at_rest(LEASE_S + 5)
    assert cluster.producer.metrics()["pd_leases_expired_total"] == before + 1
    assert assert_fails(cluster.failing, prompt, params) == {"lease_expired"}
    cluster.assert_healthy(8)


def test_malformed_control_messages_are_dropped_and_counted(cluster: Cluster) -> None:
    params = produce(cluster, random_prompt(64, 9))
    before = cluster.producer.metrics()["pd_dropped_messages_total"]
    good = wire.encode(wire.Want(params["remote_handoff_id"]), params["remote_incarnation"], "")
    garbage = [
        [b""], [b"", b""], [b"\xff" * 40, b"\x00" * 40], [good[0]], [good[0], b"\xc1"],
        [good[1], good[0]], [good[0], good[1], b"more"], [good[0], b"\x80" * 1_000_000],
    ]  # fmt: skip
    with ControlClient(params) as client:
        for frames in garbage:
            client.send_frames(frames)
        assert isinstance(client.ask(wire.Hello("test")), wire.Welcome)
    cluster.producer.complete(random_prompt(20, 10), 2)  # a step carries the count out
    assert cluster.producer.metrics()["pd_dropped_messages_total"] == before + len(garbage)
    cluster.assert_at_rest()
    cluster.assert_healthy(11)


def test_a_corrupted_block_makes_the_parity_check_fail(cluster: Cluster) -> None:
    prompt = random_prompt(600, 12)
    expected = cluster.producer.complete(prompt, 8)
    params = produce(cluster, prompt)
    assert corrupt_handoff(params, cluster.producer.worker_pid()) > 0
    answer = cluster.failing.complete(prompt, 8, kv_transfer_params=params)
    with pytest.raises(AssertionError, match=r"log-probability|token"):
        compare(expected, answer, FLOAT32)
    cluster.producer.forget_prefixes()


def test_a_block_that_changes_after_it_was_read_is_noticed(cluster: Cluster) -> None:
    """By the digest: the commit would be granted."""
    known = produce(cluster, random_prompt(20, 72))
    prompt = random_prompt(4000, 73)
    prefill_s = cluster.prefill_s(4000, 74)
    produce_params, consume = at_once(cluster.producer)
    with ThreadPoolExecutor(2) as pool:
        pool.submit(cluster.producer.complete, prompt, 1, kv_transfer_params=produce_params)
        reasons = pool.submit(assert_fails, cluster.failing, prompt, consume)
        time.sleep(0.6 * prefill_s)
        assert corrupt_handoff({**known, **consume}, cluster.producer.worker_pid()) > 0
        assert reasons.result(60) == {"digest_mismatch"}
    cluster.producer.forget_prefixes()
    cluster.assert_at_rest()
    cluster.assert_healthy(75)


@pytest.mark.parametrize("policy", ["failing", "recomputing"])
def test_a_client_that_leaves_the_consumer_frees_both_sides(cluster: Cluster, policy: str) -> None:
    consumer: Engine = getattr(cluster, policy)
    for delay_s in (0.0, 0.002, 0.01, 0.05, 0.2):
        prompt = random_prompt(1500, 13 + int(delay_s * 1000))
        params = produce(cluster, prompt)
        leave_after(consumer, prompt, 200, params, delay_s)
    cluster.assert_at_rest()
    cluster.assert_healthy(14)


def test_a_client_that_leaves_the_producer_frees_it(cluster: Cluster) -> None:
    for delay_s in (0.0, 0.02, 0.1, 0.3):
        leave_after(cluster.producer, random_prompt(3000, 15), 1, PRODUCE, delay_s)
    cluster.assert_at_rest()
    cluster.assert_healthy(16)


def leave_after(
    engine: Engine, prompt: list[int], max_tokens: int, params: Any, delay_s: float
) -> None:
    """Send a request and drop the connection after a while, as an impatient client does."""
    body = engine.body(prompt, max_tokens, params)
    with httpx.Client(timeout=httpx.Timeout(delay_s + 0.01, connect=5)) as client:
        try:
            client.post(f"{engine.url}/v1/completions", json=body)
        except httpx.TimeoutException:
            return


def test_a_stopped_producer_fails_waiting_requests_in_time(cluster: Cluster) -> None:
    """The producer hangs before the consumer asks; a client also leaves meanwhile."""
    prompt = random_prompt(300, 17)
    expected = cluster.producer.complete(prompt, 4)
    params = [produce(cluster, prompt) for _ in range(3)]
    cluster.producer.signal_all(signal.SIGSTOP)
    try:
        assert assert_fails(cluster.failing, prompt, params[0]) == {"peer_unreachable"}
        leave_after(cluster.failing, prompt, 4, params[1], 0.2)
        reasons = assert_recomputes(cluster.recomputing, prompt, params[2], expected)
        assert reasons == {"peer_unreachable"}
    finally:
        cluster.producer.signal_all(signal.SIGCONT)
    cluster.assert_at_rest()
    cluster.assert_healthy(18)


def test_a_handoff_that_the_producer_never_hears_of_fails_within_a_lease(cluster: Cluster) -> None:
    prompt = random_prompt(200, 30)
    _, consume = at_once(cluster.producer)
    assert assert_fails(cluster.failing, prompt, consume) == {"unknown_handoff"}
    expected = cluster.producer.complete(prompt, 4)
    _, consume = at_once(cluster.producer)
    reasons = assert_recomputes(cluster.recomputing, prompt, consume, expected)
    assert reasons == {"unknown_handoff"}
    cluster.assert_at_rest()


def test_a_producer_stops_computing_what_nobody_wants_any_more(cluster: Cluster) -> None:
    name = 'pd_producer_handoffs_total{state="cancelled"}'
    prompt = random_prompt(4000, 31)
    before = cluster.producer.metrics().get(name, 0)
    produce, consume = at_once(cluster.producer)
    with slowed(cluster.producer), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(cluster.producer.complete, prompt, 1, kv_transfer_params=produce)
        leave_after(cluster.failing, prompt, 4, consume, 0.3)
        error = answer.exception(60)
    assert isinstance(error, httpx.HTTPStatusError)
    assert cluster.producer.metrics()[name] == before + 1
    cluster.assert_at_rest()
    cluster.assert_healthy(32)


def test_a_preempted_producer_computes_afresh_and_nothing_stale_is_used(cluster: Cluster) -> None:
    """Between two requests of a storm all running ones are preempted, again and again."""
    prompts = [random_prompt(1500 + 100 * i, 33 + i) for i in range(8)]
    expected = [cluster.producer.complete(prompt, 4) for prompt in prompts]
    name = "pd_withdrawals_total"
    before = cluster.producer.metrics()[name]
    reset = f"{cluster.producer.url}/reset_prefix_cache?reset_running_requests=true"
    httpx.post(reset, timeout=30).raise_for_status()  # it knows the prompts by now
    with ThreadPoolExecutor(8) as pool:
        answers = [
            pool.submit(hand_off_at_once, cluster.producer, cluster.failing, prompt, 4)
            for prompt in prompts
        ]
        for _ in range(20):
            time.sleep(0.1)
            httpx.post(reset, timeout=30)  # preempts, and says so with an error if KV is held
    for one, other in zip(expected, answers, strict=True):
        compare(one, other.result(), FLOAT32)
    assert cluster.producer.metrics()[name] > before
    cluster.assert_at_rest()


def test_a_producer_killed_in_the_middle_costs_only_what_is_missing(cluster: Cluster) -> None:
    prompt = random_prompt(4000, 50)
    expected = cluster.producer.complete(prompt, 4)
    with slowed(cluster.producer), ThreadPoolExecutor(4) as pool:
        prefill_s = cluster.prefill_s(4000, 51)
        produce, consume = at_once(cluster.producer)
        pool.submit(cluster.producer.complete, prompt, 1, kv_transfer_params=produce)
        answer = pool.submit(assert_recomputes, cluster.recomputing, prompt, consume, expected)
        time.sleep(0.8 * prefill_s)
        cluster.producer.kill()
        assert answer.result(60) == {"peer_unreachable"}
    assert cluster.recomputing.metrics()["pd_kept_tokens_total"] >= 768
    cluster.restart_producer()
    cluster.assert_at_rest()
    cluster.assert_healthy(52)


def test_a_consumer_turns_to_another_producer_when_one_is_not_there(cluster: Cluster) -> None:
    prompt, there = random_prompt(500, 60), cluster.producer
    expected = there.complete(prompt, 4)
    produce_params, consume = at_once(there)
    failed, retried = failures(cluster.failing), retries(cluster.failing)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(there.complete, prompt, 1, kv_transfer_params=produce_params)
        params = {**consume, "remote_port": 1, "remote_alternatives": [address_of(there)]}
        answer = cluster.failing.complete(prompt, 4, kv_transfer_params=params)
        first.result(60)
    compare(expected, answer, FLOAT32)
    assert retries(cluster.failing) == retried + 1
    assert failures(cluster.failing) == failed
    cluster.assert_at_rest()


def test_a_consumer_turns_to_another_producer_when_one_is_killed_in_the_middle(
    cluster: Cluster,
) -> None:
    """The dispatcher names both, and asks the second when the first one's request has failed."""
    prompt, other = random_prompt(4000, 62), cluster.recomputing
    expected = other.complete(prompt, 4)
    produce_params, consume = at_once(cluster.producer)
    failed, retried = failures(cluster.failing), retries(cluster.failing)
    with slowed(cluster.producer), ThreadPoolExecutor(2) as pool:
        first = pool.submit(cluster.producer.complete, prompt, 1, kv_transfer_params=produce_params)
        params = {**consume, "remote_alternatives": [address_of(other)]}
        answer = pool.submit(cluster.failing.complete, prompt, 4, kv_transfer_params=params)
        wait_until(cluster.failing.holds_blocks)  # it fetches
        cluster.producer.kill()
        assert first.exception(30) is not None
        wait_until(lambda: retries(cluster.failing) == retried + 1)
        other.complete(prompt, 1, kv_transfer_params=produce_params)
        compare(expected, answer.result(60), FLOAT32)
    assert failures(cluster.failing) == failed
    cluster.restart_producer()
    cluster.assert_at_rest()
    cluster.assert_healthy(65)


def address_of(producer: Engine) -> dict[str, Any]:
    return {"remote_host": "127.0.0.1", "remote_port": producer.control_port}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def retries(engine: Engine) -> float:
    """Return how often it turned to another producer because one could not be reached."""
    return engine.metrics().get('pd_handoff_retries_total{reason="peer_unreachable"}', 0)


def test_a_producer_killed_and_restarted_works_without_restarting_the_consumer(
    cluster: Cluster,
) -> None:
    prompt = random_prompt(500, 19)
    expected = cluster.producer.complete(prompt, 4)
    stale = [produce(cluster, prompt) for _ in range(4)]
    cluster.producer.kill()
    assert assert_fails(cluster.failing, prompt, stale[0]) == {"peer_unreachable"}
    assert assert_recomputes(cluster.recomputing, prompt, stale[1], expected) == {
        "peer_unreachable"
    }
    cluster.restart_producer()
    assert assert_fails(cluster.failing, prompt, stale[2]) == {"peer_restarted"}
    cluster.assert_healthy(20)
    # Once more, with the restarted one known to the consumers.
    assert assert_fails(cluster.failing, prompt, stale[3]) == {"peer_restarted"}
    cluster.assert_at_rest()


def test_a_producer_killed_after_the_handoff_does_not_disturb_the_decode(cluster: Cluster) -> None:
    prompt = random_prompt(500, 21)
    expected = cluster.producer.complete(prompt, 200)
    params = produce(cluster, prompt)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(cluster.failing.complete, prompt, 200, kv_transfer_params=params)
        wait_until(cluster.producer.is_at_rest)
        cluster.producer.kill()
        compare(expected, answer.result(60), FLOAT32)
    cluster.failing.wait_until_at_rest()
    cluster.restart_producer()
    cluster.assert_healthy(22)


def test_a_storm_of_handoffs_aborts_and_stale_requests_leaks_nothing(cluster: Cluster) -> None:
    chooser = Random(23)

    def one(index: int) -> None:
        prompt = random_prompt(chooser.randrange(1, 1200), 1000 + index)
        consumer = (cluster.failing, cluster.recomputing)[index % 2]
        fate = index % 4
        if fate == 0:
            leave_after(cluster.producer, prompt, 1, PRODUCE, chooser.random() * 0.2)
            return
        params = produce(cluster, prompt)
        if fate == 1:
            leave_after(consumer, prompt, 50, params, chooser.random() * 0.3)
        elif fate == 2:
            consumer.complete(prompt, 4, kv_transfer_params=params)
        # else: nobody ever fetches it

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(60)))
    cluster.assert_at_rest()
    cluster.assert_healthy(24)


def test_a_killed_consumer_leaves_nothing_on_the_producer(cluster: Cluster, logs: Path) -> None:
    """Last: it kills a consumer that no other test needs any more."""
    prompt = random_prompt(800, 25)
    with ThreadPoolExecutor(8) as pool:
        waiting = [produce(cluster, prompt) for _ in range(8)]
        for params in waiting:
            pool.submit(leave_after, cluster.failing, prompt, 400, params, 5)
        cluster.failing.kill()
    cluster.producer.wait_until_at_rest(LEASE_S + 10)
    expected = cluster.producer.complete(prompt, 8)
    compare(expected, hand_off(cluster.producer, cluster.recomputing, prompt, 8), FLOAT32)
