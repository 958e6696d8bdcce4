"""Fetches that are of use only with the token that the producer samples: both engines, on fakes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from tests.fakes.engines import STAGING_BYTES
from tests.fakes.producer import RANK_0, RANK_1, SEAL_TABLES, Producer
from tests.fakes.producer import TOKENS as SEALED_TOKENS
from tests.fakes.streaming import ELSEWHERE, HERE, PROMPT, THERE, TIMEOUTS, TOKENS, StreamingCluster
from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import Source, new_handoff_id, new_incarnation
from vllm_pd_plugin.mapping.kv_cache import RankPlace
from vllm_pd_plugin.packing.incoming import Packing
from vllm_pd_plugin.protocol import framing, wire
from vllm_pd_plugin.transfer.specs import FetchCounts, FetchResult

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.edge.worker import WorkerSide

SAMPLED = 777
ASK_AGAIN_S = 2.0


@pytest.fixture
def cluster() -> StreamingCluster:
    return StreamingCluster()


def start(cluster: StreamingCluster, first_token: int = 0) -> Source:
    source = cluster.producer.begin("p", TOKENS)
    cluster.consumer.fetch("c", source, HERE, TOKENS, first_token, seeds=True)
    cluster.settle()
    return source


def compute(cluster: StreamingCluster) -> None:
    """The whole prompt is computed, and read."""
    cluster.compute(range(TOKENS))
    cluster.settle()


def seal(cluster: StreamingCluster, sampled: int | None = SAMPLED) -> None:
    cluster.producer.seal("p", THERE, sampled=sampled)
    cluster.settle()


def assert_seeded(cluster: StreamingCluster, sampled: int = SAMPLED) -> None:
    result = cluster.consumer.result("c")
    assert (result.reason, result.sampled) == (None, sampled)
    assert cluster.has_arrived()
    assert cluster.producer.released() == ["p"]


# --- waiting for the token -------------------------------------------------------------------


def test_nothing_is_committed_before_the_token_has_come(cluster: StreamingCluster) -> None:
    start(cluster)
    compute(cluster)
    assert cluster.has_arrived()
    assert "commit" not in cluster.network.delivered
    assert not cluster.consumer.is_reported("c")
    seal(cluster)
    assert_seeded(cluster)
    assert cluster.network.delivered.count("commit") == 1


def test_an_ordinary_fetch_does_not_wait_for_it(cluster: StreamingCluster) -> None:
    cluster.start()
    compute(cluster)
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.result("c").sampled is None


def test_an_ordinary_fetch_of_a_sealed_handoff_hears_of_the_token(
    cluster: StreamingCluster,
) -> None:
    source = cluster.producer.begin("p", TOKENS)
    cluster.compute(range(TOKENS))
    cluster.producer.seal("p", THERE, sampled=SAMPLED)
    cluster.consumer.fetch("c", source, HERE, TOKENS)
    cluster.settle()
    assert_seeded(cluster)


def test_a_token_may_be_the_first_of_the_vocabulary(cluster: StreamingCluster) -> None:
    start(cluster)
    compute(cluster)
    seal(cluster, sampled=0)
    assert_seeded(cluster, sampled=0)


def test_a_token_that_comes_before_the_last_bytes_waits_for_them(
    cluster: StreamingCluster,
) -> None:
    cluster.consumer.transport.holds_reads = True
    start(cluster)
    cluster.compute(range(TOKENS))
    seal(cluster)
    assert "commit" not in cluster.network.delivered
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert_seeded(cluster)


def test_of_a_prompt_that_is_here_but_for_one_token_that_and_the_next_are_fetched(
    cluster: StreamingCluster,
) -> None:
    for layer in range(cluster.consumer.num_layers):
        cluster.consumer.write_kv(PROMPT, (HERE,), range(12), layer)
    start(cluster, first_token=TOKENS - 1)
    compute(cluster)
    assert not cluster.consumer.is_reported("c")
    seal(cluster)
    assert_seeded(cluster)


def test_a_preemption_of_the_producer_costs_time_only(cluster: StreamingCluster) -> None:
    start(cluster)
    compute(cluster)
    cluster.producer.preempt("p")
    cluster.settle()
    cluster.compute(range(TOKENS), blocks=ELSEWHERE)
    cluster.settle()
    assert not cluster.consumer.is_reported("c")
    cluster.producer.seal("p", ELSEWHERE, sampled=SAMPLED)
    cluster.settle()
    assert_seeded(cluster)


@pytest.mark.parametrize("checks_bytes", [False, True])
@pytest.mark.parametrize("packing", [None, Packing.ALWAYS])
def test_however_the_bytes_come_the_token_is_waited_for(
    checks_bytes: bool, packing: Packing | None
) -> None:
    cluster = StreamingCluster(
        checks_bytes=checks_bytes, packing=packing, staging_bytes=STAGING_BYTES
    )
    start(cluster)
    compute(cluster)
    assert not cluster.consumer.is_reported("c")
    assert {"commit", "check"}.isdisjoint(cluster.network.delivered)
    seal(cluster)
    assert_seeded(cluster)


# --- the token does not come -----------------------------------------------------------------


@pytest.mark.parametrize("is_read", [False, True])
def test_a_producer_that_sampled_nothing_fails_the_fetch(
    cluster: StreamingCluster, is_read: bool
) -> None:
    cluster.consumer.transport.holds_reads = not is_read
    start(cluster)
    compute(cluster)
    seal(cluster, sampled=None)
    if not is_read:
        cluster.consumer.transport.finish_reads()
        cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.PRODUCER_ENDED
    assert cluster.consumer.result("c").sampled is None
    assert "commit" not in cluster.network.delivered


def test_a_token_that_is_lost_on_the_way_is_asked_for_again(cluster: StreamingCluster) -> None:
    start(cluster)
    compute(cluster)
    cluster.producer.seal("p", THERE, sampled=SAMPLED)
    assert cluster.network.lose("seal") == 1
    cluster.settle()
    assert not cluster.consumer.is_reported("c")
    cluster.clock.advance(ASK_AGAIN_S)
    cluster.settle()
    assert_seeded(cluster)


def test_the_thread_wakes_to_ask_for_it(cluster: StreamingCluster) -> None:
    start(cluster)
    compute(cluster)
    cluster.clock.advance(0.75)
    cluster.settle()  # it has asked whether what has arrived is valid
    wait = cluster.consumer.plane.turn()
    assert wait is not None
    assert 0 < wait <= ASK_AGAIN_S


def test_a_token_that_comes_twice_counts_once(cluster: StreamingCluster) -> None:
    start(cluster)
    compute(cluster)
    cluster.producer.seal("p", THERE, sampled=SAMPLED)
    cluster.settle_with_every_message_twice()
    assert_seeded(cluster)


def test_a_producer_that_never_samples_is_not_waited_for_for_ever(
    cluster: StreamingCluster,
) -> None:
    start(cluster)
    compute(cluster)
    cluster.pass_time(TIMEOUTS.queue_s + 1)
    assert cluster.consumer.outcome("c") is Reason.FETCH_TIMEOUT


def test_a_producer_that_is_gone_fails_the_fetch(cluster: StreamingCluster) -> None:
    start(cluster)
    compute(cluster)
    cluster.producer.drop("p")
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.PRODUCER_ENDED


# --- the producer ----------------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [None, 0, SAMPLED])
def test_every_rank_is_told_what_was_sampled(sampled: int | None) -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.wanted()
    producer.subscribe(handoff, 0, RANK_0)
    producer.subscribe(handoff, 1, RANK_1)
    answers = producer.table.seal(handoff, "r", SEALED_TOKENS, ([1, 2, 3], [4]), sampled)
    told = {who: message for who, message in answers if isinstance(message, wire.Seal)}
    assert {who: seal.sampled for who, seal in told.items()} == {RANK_0: sampled, RANK_1: sampled}


def test_a_rank_that_comes_later_is_told_what_was_sampled() -> None:
    producer = Producer()
    handoff = producer.open()
    producer.table.seal(handoff, "r", SEALED_TOKENS, ([1, 2, 3], [4]), SAMPLED)
    seal = wire.Seal(handoff, 0, SEALED_TOKENS, SEAL_TABLES, SAMPLED)
    assert producer.subscribe(handoff, 0, RANK_0) == seal


@pytest.mark.parametrize("sampled", [None, 0, SAMPLED])
def test_the_token_goes_over_the_wire(sampled: int | None) -> None:
    seal = wire.Seal(new_handoff_id(), 1, TOKENS, SEAL_TABLES, sampled)
    frames = framing.encode(seal, new_incarnation(), new_incarnation())
    assert framing.decode(frames)[1] == seal


# --- the worker's report ---------------------------------------------------------------------


@pytest.fixture
def worker() -> Iterator[WorkerSide]:
    worker = WorkerSide(PdConfig(), "engine", RankPlace(0, 0, 1, 1))
    yield worker
    worker._loop.close()


def result_of(request_id: str, reason: Reason | None, sampled: int | None) -> FetchResult:
    return FetchResult(request_id, reason, FetchCounts(), Codec.RAW, 0.1, 0, sampled=sampled)


def test_a_worker_reports_the_tokens_of_what_went_well(worker: WorkerSide) -> None:
    for result in (
        result_of("a", None, SAMPLED),
        result_of("b", None, 0),
        result_of("c", None, None),
        result_of("d", Reason.READ_FAILED, SAMPLED),
    ):
        worker._results.append(result)
    finished = worker.take_results().finished_recving
    report = worker.take_report()
    assert finished == {"a", "b", "c", "d"}
    assert report is not None
    assert report.sampled == {"a": SAMPLED, "b": 0}
    assert report.reasons == {"d": Reason.READ_FAILED}
    assert worker.take_report() is None


def test_a_worker_has_nothing_to_say_of_successes_without_a_token(worker: WorkerSide) -> None:
    worker._results.append(result_of("a", None, None))
    worker.take_results()
    assert worker.take_report() is None
