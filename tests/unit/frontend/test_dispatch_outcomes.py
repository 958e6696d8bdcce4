"""How what a frontend has under way ends up in its counts."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Coroutine
from typing import Any

from tests.fakes import dispatching
from tests.fakes.dispatching import LIMITS, World
from tests.fakes.series import counting, value, values

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import FinishReason
    from vllm.v1.metrics.stats import RequestSpecDecodeMetrics

    from tests.fakes.links import output_of
    from vllm_pd_plugin.frontend.requests.context import _CURRENT, RequestContext
    from vllm_pd_plugin.frontend.routing.choice import NoPrefill, Policy, Role
    from vllm_pd_plugin.frontend.telemetry.outcomes import Objectives

LENGTH, STOP, ERROR = FinishReason.LENGTH, FinishReason.STOP, FinishReason.ERROR


def run(story: Callable[[World], Coroutine[Any, Any, None]], policy: Policy | None = None) -> None:
    """Let a story happen, and look at the series when its frontend has closed."""
    with counting({"fast": Objectives(0.5, 0.1)}) as metrics:
        dispatching.run(story, policy or dispatching.HANDED_OFF, metrics)


def outcomes() -> dict[str, float]:
    return values("pd_frontend_requests_total", "outcome")


def good() -> dict[str, float]:
    return values("pd_frontend_goodput_requests_total", "slo_class")


def test_an_answer_is_one_request_though_two_engines_worked_on_it() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("r")
        world.give(p, output_of("r-1p", 50, finish=LENGTH))
        assert outcomes() == {}
        world.give(d, output_of("r-1d", 51, finish=STOP))
        assert outcomes() == {"answered": 1}
        assert good() == {"default": 1}

    run(story)


def test_a_stop_string_ends_an_answer_and_a_client_that_leaves_does_not() -> None:
    async def story(world: World) -> None:
        p, _ = world.pair()
        for request_id in ("stopped", "left", "waits in vain"):
            world.add(request_id)
        for request_id in ("stopped", "left"):
            world.give(p, output_of(f"{request_id}-1p", 50, finish=LENGTH))
        world.dispatch.stop(["stopped"])
        world.dispatch.abort(["left", "waits in vain"])
        assert outcomes() == {"answered": 1, "gone": 2}
        assert good() == {"default": 1}

    run(story)


def test_an_outage_shows_in_the_goodput_of_its_class() -> None:
    async def story(world: World) -> None:
        _CURRENT.set(RequestContext("fast"))
        world.engine("d", Role.DECODE)
        world.add("no prefill engine")
        assert world.failed
        assert outcomes() == {"failed": 1}
        assert good() == {}
        assert value("pd_frontend_failures_total", slo_class="fast", reason="no_engine") == 1
        assert value("pd_frontend_requests_total", slo_class="fast", outcome="failed") == 1

    run(story, Policy(no_prefill=NoPrefill.FAIL))


def test_an_attempt_that_failed_is_no_request_that_failed() -> None:
    async def story(world: World) -> None:
        _, d = world.pair()
        world.add("r")
        world.give(d, output_of("r-1d", finish=ERROR))
        await asyncio.sleep(1)
        assert outcomes() == {}
        assert d.sent == ["r-1d", "r-2w"]
        world.give(d, output_of("r-2w", 51, finish=STOP))
        assert outcomes() == {"answered": 1}
        assert values("pd_frontend_retries_total", "reason") == {"request_failed": 1}

    run(story)


def test_what_is_open_at_the_end_has_failed() -> None:
    async def story(world: World) -> None:
        world.pair()
        world.add("r")
        await asyncio.sleep(LIMITS.first_token_s / 2)
        await world.dispatch.close()
        assert values("pd_frontend_failures_total", "reason") == {"shutdown": 1}

    run(story)


def test_drafts_that_were_rejected_are_no_tokens() -> None:
    async def story(world: World) -> None:
        d = world.engine("d", Role.DECODE)
        world.add("r")
        (leg,) = d.sent
        world.give(d, output_of(leg, 50))
        drafts = RequestSpecDecodeMetrics.new(4)
        drafts.observe(num_draft_tokens=4, num_accepted=1)
        world.give(d, output_of(leg, 51, 52, finish=STOP, spec_decode_metrics=drafts))
        assert world.metrics.totals.answer_tokens == 3
        assert world.metrics.totals.intervals == 2
        (member,) = world.dispatch.pool
        assert member.tokens_given == 3

    run(story, Policy(no_prefill=NoPrefill.LOCAL))
