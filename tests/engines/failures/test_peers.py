"""A peer that hangs, dies or comes back: every wait ends, nothing leaks, nothing is wrong."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import httpx
import pytest

from tests.engine import PRODUCE, at_once, hand_off, hand_off_at_once
from tests.engines.conftest import random_prompt
from tests.engines.failures.cluster import (
    LEASE_S,
    Cluster,
    address_of,
    assert_fails,
    assert_recomputes,
    failures,
    leave_after,
    produce,
    retries,
    slowed,
    wait_until,
)
from tests.http_client import HTTP
from tests.parity import FLOAT32, compare

pytestmark = pytest.mark.engine


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
    HTTP.post(reset, timeout=30).raise_for_status()  # it knows the prompts by now
    with ThreadPoolExecutor(8) as pool:
        answers = [
            pool.submit(hand_off_at_once, cluster.producer, cluster.failing, prompt, 4)
            for prompt in prompts
        ]
        for _ in range(20):
            time.sleep(0.1)
            HTTP.post(reset, timeout=30)  # preempts, and says so with an error if KV is held
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
