"""A frontend's dispatch while KV cannot be handed over, though both engines do well."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

import pytest

from tests.fakes.dispatching import BACKOFF_S, World, run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import FinishReason
    from vllm.v1.metrics.stats import PrefillStats

    from tests.fakes.links import FakeLink, output_of
    from vllm_pd_plugin.frontend.pool.members import MemberState
    from vllm_pd_plugin.frontend.routing.choice import Role

ERROR, LENGTH, STOP = FinishReason.ERROR, FinishReason.LENGTH, FinishReason.STOP
COOL_DOWN_S = 5.0


class Outage:
    """Engines, none of which can read another one's KV. answered: in how many attempts each."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.answered: dict[str, int] = {}
        self._seen: set[str] = set()

    def step(self, link: FakeLink) -> None:
        """An engine does what it can for all that it has got."""
        for leg_id in list(link.sent):
            if leg_id in self._seen or leg_id in link.aborted:
                continue
            self._seen.add(leg_id)
            if leg_id.endswith("p"):
                self.world.give(link, output_of(leg_id, 50, finish=LENGTH))
            elif leg_id.endswith("d"):
                self.world.give(link, output_of(leg_id, finish=ERROR))
            else:
                self.world.give(link, output_of(leg_id, 51, finish=STOP))
                name, attempt = leg_id[:-1].split("-")
                self.answered[name] = int(attempt)

    async def ask(self, name: str, *links: FakeLink, **sampling: Any) -> None:
        self.world.add(name, **sampling)
        for _ in range(4):
            for link in links:
                self.step(link)
            await asyncio.sleep(BACKOFF_S / 2)


def states(world: World) -> set[MemberState]:
    return {member.state(world.dispatch.now()) for member in world.dispatch.pool}


@pytest.mark.parametrize("sampling", [{}, {"presence_penalty": 0.5}])
def test_every_request_is_answered_and_from_the_fourth_on_without_an_attempt_in_vain(
    sampling: dict[str, Any],
) -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        outage = Outage(world)
        for number in range(3):
            await outage.ask(f"r{number}", p, d, **sampling)
        for number in range(3, 50):
            world.add(f"r{number}", **sampling)
            outage.step(d)
        assert world.failed == []
        assert [outage.answered[f"r{number}"] for number in range(50)] == [2] * 3 + [1] * 47
        assert len(p.sent) == 3
        assert states(world) == {MemberState.UP}
        assert world.dispatch.pairs.num_open == 1
        assert world.metrics.calls.count("pair_opened") == 1

    run(story)


def test_the_pair_is_tried_again_by_one_request_at_a_time() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        outage = Outage(world)
        for number in range(3):
            await outage.ask(f"r{number}", p, d)
        await asyncio.sleep(COOL_DOWN_S + 1)
        world.add("probe")
        world.add("beside")
        assert (p.sent[-1], d.sent[-1]) == ("probe-1p", "beside-1w")
        world.give(d, output_of("probe-1d", finish=ERROR))
        world.add("after")
        assert d.sent[-1] == "after-1w"
        await asyncio.sleep(COOL_DOWN_S)
        world.add("still")
        assert d.sent[-1] == "still-1w", "the time has doubled"
        await asyncio.sleep(COOL_DOWN_S + 1)
        world.add("again")
        world.dispatch.abort(["again"])
        world.add("at last")
        assert p.sent[-1] == "at last-1p"
        world.give(p, output_of("at last-1p", 50, finish=LENGTH))
        world.give(d, output_of("at last-1d", 51))
        assert world.dispatch.pairs.num_open == 0
        world.add("well")
        assert p.sent[-1] == "well-1p"

    run(story)


def test_an_engine_that_computes_what_it_did_not_get_has_not_mended_the_pair() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        outage = Outage(world)
        for number in range(3):
            await outage.ask(f"r{number}", p, d)
        await asyncio.sleep(COOL_DOWN_S + 1)
        world.add("probe", presence_penalty=0.5)
        computed = PrefillStats(num_prompt_tokens=4, num_computed_tokens=4)
        world.give(d, output_of("probe-1d", 50, prefill_stats=computed))
        assert world.dispatch.pairs.num_open == 1
        world.give(d, output_of("probe-1d", 51, finish=STOP))
        await asyncio.sleep(2 * COOL_DOWN_S + 1)
        world.add("next")
        assert p.sent[-1] == "next-1p"
        fetched = PrefillStats(num_prompt_tokens=4, num_external_cached_tokens=3)
        world.give(p, output_of("next-1p", 50, finish=LENGTH))
        world.give(d, output_of("next-1d", 51, prefill_stats=fetched))
        assert world.dispatch.pairs.num_open == 0

    run(story)


def test_three_prompts_that_are_computed_after_all_open_the_pair() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        computed = PrefillStats(num_prompt_tokens=4, num_computed_tokens=4)
        for number in range(3):
            assert world.dispatch.pairs.num_open == 0
            world.add(f"r{number}", presence_penalty=0.5)
            world.give(p, output_of(f"r{number}-1p", 50, finish=LENGTH))
            world.give(d, output_of(f"r{number}-1d", 50, prefill_stats=computed))
            world.give(d, output_of(f"r{number}-1d", 51, finish=STOP))
        assert world.dispatch.pairs.num_open == 1
        world.add("next")
        assert d.sent[-1] == "next-1w"

    run(story)


def test_a_prompt_that_the_decode_engine_had_already_says_nothing_of_the_pair() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        had = PrefillStats(num_prompt_tokens=4, num_computed_tokens=1, num_local_cached_tokens=3)
        for number in range(4):
            world.add(f"r{number}", presence_penalty=0.5)
            world.give(p, output_of(f"r{number}-1p", 50, finish=LENGTH))
            world.give(d, output_of(f"r{number}-1d", 50, finish=STOP, prefill_stats=had))
        assert world.dispatch.pairs.num_open == 0

    run(story)


def test_another_prefill_engine_hands_off_where_one_cannot() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        outage = Outage(world)
        for number in range(3):
            await outage.ask(f"r{number}", p, d)
        q = world.engine("q", Role.PREFILL)
        world.add("r")
        assert (q.sent, d.sent[-1]) == (["r-1p"], "r-1d")

    run(story)


def test_an_engine_that_was_restarted_is_tried_at_once() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        outage = Outage(world)
        for number in range(3):
            await outage.ask(f"r{number}", p, d)
        world.come_back(d)
        assert world.dispatch.pairs.num_open == 1, "it is the same one"
        world.lose(d)
        d.incarnation = p.incarnation
        world.come_back(d)
        world.add("r")
        assert (p.sent[-1], d.sent[-1]) == ("r-1p", "r-1d")

    run(story)


def test_a_prefill_engine_that_fails_costs_nobody_the_answer() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        outage = Outage(world)
        for number in range(5):
            world.add(f"r{number}")
            if number < 3:
                world.give(p, output_of(f"r{number}-1p", finish=ERROR))
            await asyncio.sleep(BACKOFF_S)
            outage.step(d)
        assert world.failed == []
        assert (len(p.sent), len(outage.answered)) == (3, 5)
        assert world.dispatch.pool["p"].state(world.dispatch.now()) is MemberState.BROKEN
        assert world.dispatch.pairs.num_open == 0
        world.add("one", max_tokens=1)
        assert d.sent[-1] == "one-1w"

    run(story)
