"""Everything that a frontend has under way, over connections that do nothing by themselves."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

import pytest

from tests.fakes.courses import PROMPT
from tests.fakes.dispatching import BACKOFF_S, World, run
from vllm_pd_plugin.engine_port.messages import Blocks, EngineLoad, State, Stored

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreRequest, FinishReason
    from vllm.v1.metrics.stats import PrefillStats

    from tests.fakes.links import output_of
    from vllm_pd_plugin.frontend.requests.endings import Ending
    from vllm_pd_plugin.frontend.routing.choice import Role

LENGTH, STOP = FinishReason.LENGTH, FinishReason.STOP


# --- requests --------------------------------------------------------------------------------


def test_a_request_finds_its_way_over_two_engines() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("r")
        assert (p.sent, d.sent) == (["r-1p"], ["r-1d"])
        assert d.requests["r-1d"].prompt_token_ids == PROMPT
        world.give(p, output_of("r-1p", 50, finish=LENGTH))
        world.give(d, output_of("r-1d", 51))
        world.give(d, output_of("r-1d", 52, finish=STOP))
        assert world.tokens == [50, 51, 52]
        assert (p.aborted, d.aborted) == ([], [])
        assert (len(world.dispatch), world.failed) == (0, [])
        assert all(not member.legs for member in world.dispatch.pool)

    run(story)


def test_what_a_step_gives_out_for_several_requests_stays_together() -> None:
    async def story(world: World) -> None:
        p, _ = world.pair()
        for request_id in "abc":
            world.add(request_id)
        outputs = [output_of(f"{name}-1p", 50, finish=LENGTH) for name in "abc"]
        world.give(p, *outputs, output_of("nobody's", 99))
        assert [[each.request_id for each in batch] for batch in world.batches] == [["a", "b", "c"]]

    run(story)


def test_a_step_that_gives_out_nothing_for_clients_is_not_told() -> None:
    async def story(world: World) -> None:
        p, _ = world.pair()
        world.add("r", presence_penalty=0.5)
        world.give(p, output_of("r-1p", 99, finish=LENGTH))
        assert world.batches == []

    run(story)


def test_an_engine_s_times_are_moved_to_this_machine_s_clock() -> None:
    async def story(world: World) -> None:
        p, _ = world.pair()
        world.add("r")
        event = EngineCoreEvent(EngineCoreEventType.SCHEDULED, 7.5)
        output = output_of("r-1p", 50, finish=LENGTH, events=[event])
        world.give(p, output, timestamp=8.0)
        ((given,),) = world.batches
        assert given.events is not None
        assert given.events[0].timestamp == world.dispatch.now() - 0.5

    run(story)


def test_an_aborted_request_ends_on_every_engine() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("r")
        world.add("s")
        world.dispatch.abort(["r", "unknown"])
        assert (p.aborted, d.aborted) == (["r-1p"], ["r-1d"])
        assert len(world.dispatch) == 1
        world.give(p, output_of("r-1p", 50, finish=LENGTH))
        assert (world.batches, world.failed) == ([], [])

    run(story)


def test_a_request_that_cannot_be_written_down_is_refused_and_no_other() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()

        def refuse(request: EngineCoreRequest) -> None:
            if request.request_id.startswith("bad"):
                raise TypeError("not data")

        p.on_encode = refuse
        world.add("bad")
        world.add("good")
        assert world.failed == [("bad", Ending.UNSENDABLE)]
        assert (p.sent, d.sent) == (["good-1p"], ["good-1d"])
        assert len(world.dispatch) == 1

    run(story)


def test_at_the_end_nothing_goes_on() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("r")
        await world.dispatch.close()
        assert world.failed == [("r", Ending.SHUTDOWN)]
        assert (p.aborted, d.aborted) == (["r-1p"], ["r-1d"])
        assert (p.is_closed, d.is_closed) == (True, True)

    run(story)


# --- what is learnt and counted --------------------------------------------------------------


def test_how_fast_an_engine_computes_is_learnt_from_its_first_outputs() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("r")
        stats = PrefillStats(num_prompt_tokens=1000, num_computed_tokens=1000)
        scheduled = EngineCoreEvent(EngineCoreEventType.SCHEDULED, 7.5)
        output = output_of("r-1p", 50, finish=LENGTH, prefill_stats=stats, events=[scheduled])
        world.give(p, output, timestamp=8.0)
        assert world.dispatch.pool["p"].prefill_rate == pytest.approx(2000.0)
        fetched = output_of("r-1d", 51, prefill_stats=stats, events=[scheduled])
        world.give(d, fetched, timestamp=8.0)
        assert world.dispatch.pool["d"].prefill_rate is None

    run(story)


def test_engines_are_as_busy_as_they_say_and_as_they_are_made() -> None:
    async def story(world: World) -> None:
        p, _ = world.pair()
        there: Any = p
        world.dispatch.loaded(there, State(EngineLoad(running=1, waiting_tokens=100), 0))
        world.add("r")
        member = world.dispatch.pool["p"]
        assert member.snapshot().prefill_tokens == 100 + len(PROMPT)
        world.give(p, output_of("r-1p", 50, finish=LENGTH))
        assert member.snapshot().prefill_tokens == 100

    run(story)


def test_what_is_cached_of_a_prompt_is_no_part_of_an_engine_s_queue() -> None:
    async def story(world: World) -> None:
        p, _ = world.pair()
        there: Any = p
        block = PROMPT[:3]
        world.dispatch.cached(there, Blocks((Stored(None, (b"a",), tuple(block), len(block)),)))
        world.add("r")
        world.add("s")
        member = world.dispatch.pool["p"]
        assert member.snapshot().prefill_tokens == 2 * (len(PROMPT) - len(block))
        world.give(p, output_of("r-1p", 50, finish=LENGTH))
        world.dispatch.abort(["s"])
        assert member.snapshot().prefill_tokens == 0

    run(story)


def test_prompts_of_requests_that_wait_are_counted() -> None:
    async def story(world: World) -> None:
        world.add("r")
        world.add("s")
        assert (world.dispatch.num_waiting, world.dispatch.waiting_tokens) == (2, 2 * len(PROMPT))

    run(story)


def test_what_is_to_be_computed_counts_once_for_each_request() -> None:
    async def story(world: World) -> None:
        world.engine("p", Role.PREFILL)
        decodes = [world.engine(url, Role.DECODE) for url in ("d", "e")]
        world.add("r", max_tokens=4)
        assert world.metrics.to_compute == (len(PROMPT),)
        world.lose(next(link for link in decodes if link.sent))
        await asyncio.sleep(BACKOFF_S)
        assert all(link.sent for link in decodes)
        assert world.metrics.to_compute == (len(PROMPT),)

    run(story)
