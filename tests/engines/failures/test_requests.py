"""Requests that ask for what they must not have: they fail alone, and nothing leaks."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.engine import PRODUCE, Engine, at_once
from tests.engines.conftest import random_prompt
from tests.engines.control_client import ControlClient, corrupt_handoff
from tests.engines.failures.cluster import (
    LEASE_S,
    Cluster,
    assert_fails,
    assert_recomputes,
    leave_after,
    produce,
)
from tests.http_client import HTTP
from tests.parity import FLOAT32, compare
from vllm_pd_plugin.protocol import framing, wire

pytestmark = pytest.mark.engine


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
    answer = HTTP.post(f"{cluster.failing.url}/v1/completions", json=body, timeout=60)
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
    good = framing.encode(wire.Want(params["remote_handoff_id"]), params["remote_incarnation"], "")
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
