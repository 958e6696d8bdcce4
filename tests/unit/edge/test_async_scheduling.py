"""Handoffs where one step is scheduled while another is in flight: vLLM's own scheduler, its own
code around a forward pass, and our connector in both; only the GPU is a fake."""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.request import Request, RequestStatus

    from tests.fakes.forward import Graphs, RunnerV1, RunnerV2
    from tests.fakes.stepping_engine import BLOCK, EOS, SteppingEngine, has_kv_of

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = list(range(100, 250))
"""Three steps' worth."""
PATIENCE_S = 20.0


class Pair:
    """A producer and a consumer; ``make`` adds one more engine."""

    def __init__(self) -> None:
        self.engines: list[SteppingEngine] = []
        self.blocks: list[int] = []

    def make(self, role: str, *args: Any, **kwargs: Any) -> SteppingEngine:
        engine = SteppingEngine(role, *args, stretch_bytes=1, **kwargs)
        self.engines.append(engine)
        return engine

    def ask(self, prompt: list[int], seeds: bool = True, max_tokens: int = 1) -> Request:
        """Ask both engines for a prompt, at the same time."""
        producer, consumer = self.engines
        handoff_id = secrets.token_hex(16)
        host, port = producer.address
        request = consumer.add(
            "r",
            prompt,
            {
                "do_remote_prefill": True, "remote_host": host, "remote_port": port,
                "remote_handoff_id": handoff_id, "seed_first_token": seeds,
            },
        )  # fmt: skip
        params = {"do_remote_decode": True, "handoff_id": handoff_id}
        producer.add("r", prompt, params, max_tokens)
        return request

    def consume(self, done: Callable[[], object], seconds: float = PATIENCE_S) -> None:
        """Step the consumer until then, or for so long."""
        deadline = time.monotonic() + seconds
        while not done() and time.monotonic() < deadline:
            self.engines[1].step()
            if "r" not in self.engines[1].ended:
                self.blocks = self.engines[1].blocks_of("r") or self.blocks

    def waits(self) -> bool:
        status = self.engines[1].scheduler.requests["r"].status
        return status is RequestStatus.WAITING_FOR_REMOTE_KVS

    def assert_fetched(self, prompt: list[int]) -> None:
        consumer = self.engines[1]
        self.consume(lambda: "r" in consumer.ended)
        assert consumer.ended.get("r") == "length"
        assert has_kv_of(consumer, self.blocks, prompt)


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    for engine in pair.engines:
        engine.close()


def until(done: Callable[[], object], *steps: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline
        for step in steps:
            step()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("runner", [RunnerV1, RunnerV2], ids=["V1", "V2"])
@pytest.mark.parametrize("graphs", list(Graphs))
def test_what_is_read_while_it_is_computed_is_right(
    pair: Pair, graphs: Graphs, runner: type[RunnerV1] | type[RunnerV2], is_async: bool
) -> None:
    """The consumer reads as early as it may; the GPU is always behind."""
    producer = pair.make("prefill", is_async, runner)
    consumer = pair.make("decode", is_async, runner)
    producer.graphs = consumer.graphs = graphs
    producer.stream.op_s = 0.002
    request = pair.ask(PROMPT)
    producer.schedule()
    pair.consume(pair.waits)
    while "r" not in producer.ended:
        producer.schedule()
        pair.consume(lambda: False, seconds=0.05)
        producer.finish()
        pair.consume(lambda: has_kv_of(consumer, pair.blocks[:2], PROMPT[:64]))
        assert has_kv_of(consumer, pair.blocks[:2], PROMPT[:64]), "it waits for the end"
    pair.assert_fetched(PROMPT)
    assert request.prompt_token_ids == [*PROMPT, 100]
    until(lambda: producer.free_blocks == 39, producer.step)


@pytest.mark.parametrize("runner", [RunnerV1, RunnerV2], ids=["V1", "V2"])
def test_a_runner_is_told_of_the_token_that_its_request_goes_on_after(
    pair: Pair, runner: type[RunnerV1] | type[RunnerV2]
) -> None:
    pair.make("prefill", runner=runner)
    consumer = pair.make("decode", runner=runner)
    pair.ask(PROMPT)
    until(lambda: "r" in pair.engines[0].ended, pair.engines[0].step)
    told: list[tuple[list[int], list[int], int]] = []
    until(lambda: told, lambda: told.extend(first_steps(consumer)), consumer.finish)
    seeded = [*PROMPT, 100]
    assert told == [(seeded, seeded, len(PROMPT))]
    until(lambda: consumer.ended, consumer.step)
    assert consumer.outputs["r"] == [100], "the consumer's own first, after the producer's"


def first_steps(engine: SteppingEngine) -> list[tuple[list[int], list[int], int]]:
    """Return what the runner is told, in the next step, of requests that are new to it: their
    prompt, what is to be computed, and how much of that is there."""
    scheduled = engine.schedule()
    return [
        (list(new.prompt_token_ids or ()), list(all_tokens or ()), new.num_computed_tokens)
        for new in (scheduled.scheduled_new_reqs if scheduled else ())
        for all_tokens in (new.prefill_token_ids or new.prompt_token_ids,)
    ]


def test_a_prompt_is_sealed_though_a_step_after_it_is_in_flight(pair: Pair) -> None:
    """It was launched before it was known that the first token is the last."""
    producer = pair.make("prefill")
    pair.make("decode")
    producer.answers["r"] = iter([EOS, 555])
    request = pair.ask(PROMPT[:40], max_tokens=5)
    producer.schedule()
    producer.schedule()
    producer.finish()
    assert producer.ended == {"r": "stop"}
    assert producer.params["r"]["remote_num_tokens"] == 40
    assert producer.free_blocks == 37, "the blocks are held"
    producer.finish()
    assert producer.outputs["r"] == [EOS]
    pair.consume(lambda: "r" in pair.engines[1].ended)
    pair.assert_fetched(PROMPT[:40])
    assert request.prompt_token_ids == [*PROMPT[:40], EOS]


def test_a_token_of_a_prompt_that_lost_its_blocks_meanwhile_seals_nothing(pair: Pair) -> None:
    """The step in flight samples the first token of a prompt whose blocks are taken away: it is
    computed again, and what is sampled then counts, at the client and at the consumer."""
    producer = pair.make("prefill", num_blocks=4)
    pair.make("decode")
    assert producer.scheduler.requires_kv_delivery
    producer.add("grows", list(range(300, 331)), max_tokens=3)
    request = pair.ask(PROMPT[:60])
    producer.schedule()
    producer.schedule()
    assert not producer.scheduler.requests["r"].is_prefill_chunk, "all of it is in flight"
    producer.finish()
    pair.consume(pair.waits)
    producer.schedule()
    assert producer.scheduler.requests["r"].status is RequestStatus.PREEMPTED
    open_handoffs = producer.scheduler_side._scheduler._producing._open
    assert open_handoffs["r"].epoch == 1, "what was read of it is void, before any other step"
    producer.finish()
    assert "r" not in producer.ended
    until(lambda: "r" in producer.ended, producer.step, pair.engines[1].step)
    assert producer.outputs["r"] == [101]
    pair.assert_fetched(PROMPT[:60])
    assert request.prompt_token_ids == [*PROMPT[:60], 101]


@pytest.mark.parametrize("role", ["decode", "both"])
def test_blocks_that_a_step_in_flight_writes_to_are_not_read_into(pair: Pair, role: str) -> None:
    """A read is not ordered after what a GPU still has to do; vLLM keeps the blocks back."""
    engine = pair.make(role)
    engine.answers["local"] = iter([EOS, 555])
    engine.add("local", PROMPT[:40], max_tokens=5)
    engine.schedule()
    engine.schedule()
    engine.finish()
    assert engine.ended == {"local": "stop"}
    assert engine.free_blocks == 37
    engine.finish()
    assert engine.free_blocks == 39


def test_a_request_that_is_aborted_with_a_step_in_flight_is_not_handed_off(pair: Pair) -> None:
    producer = pair.make("prefill")
    consumer = pair.make("decode")
    pair.ask(PROMPT[:40])
    producer.schedule()
    producer.scheduler.finish_requests(["r"], RequestStatus.FINISHED_ABORTED)
    producer.finish()
    assert producer.outputs["r"] == []
    assert producer.free_blocks == 39
    until(lambda: "r" in consumer.ended, consumer.step)
    assert consumer.ended == {"r": "error"}


def test_a_prefix_that_a_step_in_flight_computes_is_not_announced_before(pair: Pair) -> None:
    """vLLM takes a block for cached once it is scheduled; its KV comes later."""
    producer = pair.make("prefill")
    consumer = pair.make("decode")
    producer.add("before", PROMPT[:64])
    producer.schedule()
    pair.ask([*PROMPT[:64], *range(400, 440)])
    scheduled = producer.schedule()
    assert scheduled is not None
    assert scheduled.num_scheduled_tokens["r"] == 40, "the rest is in the prefix cache"
    pair.consume(pair.waits)
    pair.consume(lambda: False, seconds=0.1)
    until(lambda: "r" in producer.ended, producer.step)
    assert len(pair.blocks) * BLOCK >= 104
    pair.assert_fetched([*PROMPT[:64], *range(400, 440)])
    assert consumer.outputs["r"] == [100]
