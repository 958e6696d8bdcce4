"""Everything that a frontend has under way, over connections that do nothing by themselves."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.fakes.courses import PROMPT, make_request
from tests.fakes.engines import make_kv
from vllm_pd_plugin.engine_port.messages import EngineLoad
from vllm_pd_plugin.memory.identity import KvIdentity, Weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import (
        EngineCoreEvent,
        EngineCoreEventType,
        EngineCoreOutput,
        EngineCoreOutputs,
        EngineCoreRequest,
        FinishReason,
    )
    from vllm.v1.metrics.stats import PrefillStats

    from tests.fakes.engine_core import describe
    from tests.fakes.links import (
        FakeLink,
        SkippingLoop,
        link_of,
        make_member,
        output_of,
        outputs_of,
    )
    from vllm_pd_plugin.frontend.dispatch import Dispatch
    from vllm_pd_plugin.frontend.pool.membership import Wanted
    from vllm_pd_plugin.frontend.requests.course import Course
    from vllm_pd_plugin.frontend.requests.endings import Ending
    from vllm_pd_plugin.frontend.routing.choice import NoPrefill, Policy, Role
    from vllm_pd_plugin.frontend.underway import Limits

LENGTH, STOP = FinishReason.LENGTH, FinishReason.STOP
ERROR, ABORT = FinishReason.ERROR, FinishReason.ABORT
LIMITS = Limits(request_s=100.0, first_token_s=20.0, stall_s=10.0, queue_s=5.0)
SWEEP_S = 0.25
BACKOFF_S = 0.5
HANDED_OFF = Policy(local_below=0)


class Counts:
    """Takes what a frontend counts, and calls every class of requests the same."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.to_compute: tuple[int, ...] = ()

    def slo_class(self, wanted: str | None) -> str:
        return "default"

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: self._note(name, args)

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        self.calls.append(name)
        if name == "is_to_compute":
            self.to_compute += args


class World:
    """A dispatch, its engines, and what its clients get."""

    def __init__(self, policy: Policy = HANDED_OFF) -> None:
        self.batches: list[list[EngineCoreOutput]] = []
        self.failed: list[tuple[str, Ending]] = []
        self.on_failed: Callable[[Course, Ending], None] = lambda course, ending: None
        self.metrics = Counts()
        metrics: Any = self.metrics
        self.dispatch = Dispatch(policy, LIMITS, metrics, self._give, self._fail)

    def engine(self, url: str, role: Role, started_as: str | None = None) -> FakeLink:
        """An engine comes up."""
        member = make_member(url, role)
        if started_as is not None:
            link_of(member).description = describe(role=started_as)
        self.dispatch.pool.add(member)
        self.dispatch.attached(member.link, EngineLoad())
        return link_of(member)

    def pair(self) -> tuple[FakeLink, FakeLink]:
        return self.engine("p", Role.PREFILL), self.engine("d", Role.DECODE)

    def add(self, request_id: str = "r", **sampling: Any) -> None:
        self.dispatch.add(make_request(request_id, **sampling))

    def give(self, link: FakeLink, *outputs: EngineCoreOutput, timestamp: float = 1.0) -> None:
        """A step of an engine gives something out."""
        there: Any = link
        self.dispatch.gave_out(there, outputs_of(*outputs, timestamp=timestamp))

    def lose(self, link: FakeLink) -> None:
        link.is_attached = False
        there: Any = link
        self.dispatch.lost(there, "silence")

    def come_back(self, link: FakeLink) -> None:
        link.is_attached = True
        there: Any = link
        self.dispatch.attached(there, EngineLoad())

    @property
    def tokens(self) -> list[int]:
        return [t for batch in self.batches for each in batch for t in each.new_token_ids]

    def _give(self, outputs: EngineCoreOutputs) -> None:
        self.batches.append(list(outputs.outputs))

    def _fail(self, course: Course, ending: Ending) -> None:
        self.failed.append((course.id, ending))
        self.on_failed(course, ending)


def run(story: Callable[[World], Coroutine[Any, Any, None]], policy: Policy = HANDED_OFF) -> None:
    """Let a story happen in a loop that does not wait."""

    async def tell() -> None:
        world = World(policy)
        await story(world)
        await world.dispatch.close()

    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(tell())


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


# --- engines that are lost -------------------------------------------------------------------


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_what_was_on_a_lost_engine_goes_on_elsewhere(role: Role) -> None:
    async def story(world: World) -> None:
        links = {
            Role.PREFILL: [world.engine(url, Role.PREFILL) for url in "pq"],
            Role.DECODE: [world.engine(url, Role.DECODE) for url in "de"],
        }
        world.add("r")
        lost, spare = sorted(links[role], key=lambda link: not link.sent)
        world.lose(lost)
        world.come_back(lost)
        await asyncio.sleep(BACKOFF_S + 0.1)
        assert (len(lost.sent), lost.aborted) == (1, [])
        assert spare.sent == [f"r-2{role[0]}"]
        assert len(world.dispatch) == 1

    run(story)


def test_a_retry_waits_a_little() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("r")
        world.give(p, output_of("r-1p", finish=ERROR))
        assert d.aborted == ["r-1d"]
        await asyncio.sleep(0.04)
        assert p.sent == ["r-1p"]
        await asyncio.sleep(BACKOFF_S)
        assert p.sent == ["r-1p", "r-2p"]

    run(story)


def test_a_request_that_is_aborted_while_it_waits_to_be_tried_again_is_not() -> None:
    async def story(world: World) -> None:
        p, _ = world.pair()
        world.add("r")
        world.give(p, output_of("r-1p", finish=ERROR))
        world.dispatch.abort(["r"])
        await asyncio.sleep(BACKOFF_S + 0.1)
        assert p.sent == ["r-1p"]
        assert len(world.dispatch) == 0

    run(story)


def test_an_engine_that_fails_three_requests_is_spared() -> None:
    async def story(world: World) -> None:
        p, _ = world.pair()
        q = world.engine("q", Role.PREFILL)
        for number in range(3):
            name = f"r{number}"
            q.is_attached = False
            world.add(name)
            q.is_attached = True
            world.give(p, output_of(f"{name}-1p", finish=ERROR))
        assert world.dispatch.pool["p"].is_broken(world.dispatch.now())
        world.add("s")
        assert "s-1p" in q.sent

    run(story)


def test_engines_that_stop_are_not_counted_as_broken() -> None:
    async def story(world: World) -> None:
        p, _ = world.pair()
        for number in range(3):
            world.add(f"r{number}")
            world.give(p, output_of(f"r{number}-1p", finish=ABORT))
        assert not world.dispatch.pool["p"].is_broken(world.dispatch.now())

    run(story)


def test_an_engine_that_is_named_for_another_role_is_not_used() -> None:
    async def story(world: World) -> None:
        world.engine("p", Role.PREFILL)
        world.engine("d", Role.DECODE, started_as="prefill")
        assert "--kv-role prefill" in world.dispatch.pool["d"].problem
        assert world.dispatch.serves() == "no_decode"
        world.engine("b", Role.DECODE, started_as="both")
        assert world.dispatch.serves() is None

    run(story)


# --- waiting for engines ---------------------------------------------------------------------


def test_a_request_waits_until_an_engine_comes() -> None:
    async def story(world: World) -> None:
        world.add("r")
        assert (world.dispatch.num_waiting, world.failed) == (1, [])
        await asyncio.sleep(LIMITS.queue_s - 1)
        p, d = world.pair()
        await asyncio.sleep(SWEEP_S)
        assert world.dispatch.num_waiting == 0
        assert d.sent
        assert len(p.sent) <= 1

    run(story)


def test_a_request_does_not_wait_for_ever() -> None:
    async def story(world: World) -> None:
        world.add("r")
        await asyncio.sleep(LIMITS.queue_s - 1)
        assert world.failed == []
        world.engine("p", Role.PREFILL)  # of no help, and no reason to wait longer
        await asyncio.sleep(1 + 2 * SWEEP_S)
        assert world.failed == [("r", Ending.NO_ENGINE)]
        assert (world.dispatch.num_waiting, len(world.dispatch)) == (0, 0)

    run(story)


def test_without_prefill_engines_a_request_fails_at_once_if_that_is_the_policy() -> None:
    async def story(world: World) -> None:
        world.engine("d", Role.DECODE)
        world.add("r")
        assert world.failed == [("r", Ending.NO_ENGINE)]

    run(story, Policy(no_prefill=NoPrefill.FAIL))


def test_without_prefill_engines_a_request_waits_if_that_is_the_policy() -> None:
    async def story(world: World) -> None:
        d = world.engine("d", Role.DECODE)
        world.add("r")
        assert (d.sent, world.failed) == ([], [])
        assert world.dispatch.serves() == "queue_for_prefill"
        p = world.engine("p", Role.PREFILL)
        assert (p.sent, d.sent) == (["r-1p"], ["r-1d"])

    run(story, Policy(no_prefill=NoPrefill.QUEUE, local_below=0))


def test_choices_of_one_request_that_wait_may_all_be_given_up_at_once() -> None:
    """The first to fail ends its siblings, while the others are still being looked at."""

    async def story(world: World) -> None:
        world.on_failed = lambda course, ending: world.dispatch.abort(["0_r", "1_r", "2_r"])
        for number in range(3):
            world.add(f"{number}_r")
        assert world.dispatch.num_waiting == 3
        world.engine("d", Role.DECODE)
        assert world.failed == [("0_r", Ending.NO_ENGINE)]
        assert (world.dispatch.num_waiting, len(world.dispatch)) == (0, 0)

    run(story, Policy(no_prefill=NoPrefill.FAIL))


# --- what takes too long ---------------------------------------------------------------------


def test_a_request_that_takes_too_long_is_ended() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("r")
        world.give(p, output_of("r-1p", 50, finish=LENGTH))
        token = 51
        while not world.failed:
            world.give(d, output_of("r-1d", token))
            token += 1
            await asyncio.sleep(1.0)
        assert world.failed == [("r", Ending.DEADLINE)]
        assert d.aborted == ["r-1d"]
        assert LIMITS.request_s <= world.dispatch.now() - 1000.0 <= LIMITS.request_s + 2

    run(story)


def test_an_attempt_without_a_first_token_is_given_up() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("r")
        await asyncio.sleep(LIMITS.first_token_s - 1)
        assert (p.aborted, d.aborted) == ([], [])
        await asyncio.sleep(1 + SWEEP_S + BACKOFF_S + 0.1)
        assert (p.aborted, d.aborted) == (["r-1p"], ["r-1d"])
        assert (p.sent, d.sent) == (["r-1p", "r-2p"], ["r-1d", "r-2d"])

    run(story)


def test_an_answer_that_stands_still_is_continued_elsewhere() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.add("r")
        world.give(p, output_of("r-1p", 50, finish=LENGTH))
        world.give(d, output_of("r-1d", 51))
        await asyncio.sleep(LIMITS.stall_s - 1)
        assert d.aborted == []
        await asyncio.sleep(1 + SWEEP_S + BACKOFF_S + 0.1)
        assert d.aborted == ["r-1d"]
        assert d.requests["r-2d"].prompt_token_ids == [*PROMPT, 50, 51]
        assert world.tokens == [50, 51]

    run(story)


# --- what is learnt --------------------------------------------------------------------------


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
        world.dispatch.loaded(there, EngineLoad(running=1, waiting_tokens=100))
        world.add("r")
        member = world.dispatch.pool["p"]
        assert member.snapshot().prefill_tokens == 100 + len(PROMPT)
        world.give(p, output_of("r-1p", 50, finish=LENGTH))
        assert member.snapshot().prefill_tokens == 100

    run(story)


# --- roles and kinds -------------------------------------------------------------------------


def use(world: World, **roles: Role) -> None:
    nobody: Any = None
    world.dispatch.use({url: Wanted(role) for url, role in roles.items()}, nobody)


def test_an_engine_that_changes_its_role_keeps_what_it_works_on() -> None:
    async def story(world: World) -> None:
        world.engine("p", Role.PREFILL)
        d = world.engine("d", Role.DECODE, started_as="both")
        e = world.engine("e", Role.BOTH)
        world.add("r", max_tokens=4)
        decoding = d if d.sent else e
        assert decoding.sent == ["r-1d"]
        use(world, p=Role.PREFILL, d=Role.PREFILL, e=Role.DECODE)
        assert decoding.aborted == []
        world.give(decoding, output_of("r-1d", 51))
        world.add("s")
        assert e.sent[-1] == "s-1d"
        assert "s-1d" not in d.sent

    run(story)


def test_an_engine_cannot_take_a_role_that_it_was_not_started_for() -> None:
    async def story(world: World) -> None:
        world.engine("p", Role.PREFILL)
        d = world.engine("d", Role.DECODE)
        e = world.engine("e", Role.DECODE)
        use(world, p=Role.PREFILL, d=Role.PREFILL, e=Role.DECODE)
        assert "was started with --kv-role decode" in world.dispatch.pool["d"].problem
        world.add("r")
        assert (d.sent, e.sent) == ([], ["r-1d"])
        use(world, p=Role.PREFILL, d=Role.DECODE, e=Role.PREFILL)
        assert world.dispatch.pool["d"].problem == ""
        assert e.aborted == ["r-1d"]  # it is there, and would go on

    run(story)


def test_a_pool_without_prefill_engines_serves_if_they_come_when_one_is_wanted() -> None:
    async def story(world: World) -> None:
        world.engine("d", Role.DECODE)
        assert world.dispatch.serves() == "queue_for_prefill"
        world.dispatch.prefill_may_be_empty = True
        assert world.dispatch.serves() is None
        world.add("r")
        assert world.dispatch.num_waiting == 1
        world.engine("p", Role.PREFILL)
        assert world.dispatch.num_waiting == 0

    run(story, Policy(no_prefill=NoPrefill.QUEUE, local_below=0))


def test_kv_stays_within_a_generation() -> None:
    async def story(world: World) -> None:
        roles = {"p": Role.PREFILL, "q": Role.PREFILL, "d": Role.DECODE}
        for url, role in roles.items():
            world.engine(url, role)
        nobody: Any = None
        generations = {"p": "old", "q": "new", "d": "new"}
        engines = {u: Wanted(role, None, generations[u]) for u, role in roles.items()}
        world.dispatch.use(engines, nobody)
        world.dispatch.pool["q"].load = EngineLoad(waiting_tokens=9000)
        world.add("r")
        assert [member.key for member in world.dispatch.pool if member.legs] == ["q", "d"]

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


# --- unlike engines --------------------------------------------------------------------------

OTHER_KV = make_kv(weights=Weights("sampled:2"))


def come_up_with(world: World, url: str, role: Role, kv: KvIdentity) -> FakeLink:
    member = make_member(url, role, kv=kv)
    world.dispatch.pool.add(member)
    world.dispatch.attached(member.link, EngineLoad())
    return link_of(member)


def test_a_prefill_engine_of_other_weights_is_refused_whoever_came_first() -> None:
    async def story(world: World) -> None:
        p = come_up_with(world, "p", Role.PREFILL, OTHER_KV)
        d = world.engine("d", Role.DECODE)
        problem = world.dispatch.pool["p"].problem
        assert "weights are sampled:2, expected sampled:1" in problem
        assert world.dispatch.pool["d"].problem == ""
        world.add("r")
        assert (p.sent, d.sent) == ([], ["r-1w"])

    run(story)


def test_of_unlike_decode_engines_the_one_named_first_counts() -> None:
    async def story(world: World) -> None:
        world.engine("p", Role.PREFILL)
        first = make_member("d1", Role.DECODE)
        world.dispatch.pool.add(first)
        come_up_with(world, "d2", Role.DECODE, OTHER_KV)
        world.dispatch.attached(first.link, EngineLoad())
        assert world.dispatch.pool["d1"].problem == ""
        assert "weights" in world.dispatch.pool["d2"].problem

    run(story)


def test_a_decode_engine_that_comes_back_with_other_weights_makes_the_pool_s_others_unfit() -> None:
    async def story(world: World) -> None:
        p, d = world.pair()
        world.lose(d)
        d.description = describe(role="decode", kv=OTHER_KV)
        world.come_back(d)
        assert "weights" in world.dispatch.pool["p"].problem
        world.add("r")
        assert (p.sent, d.sent) == ([], ["r-1w"])
        p.description = describe(role="prefill", kv=OTHER_KV)
        world.come_back(p)
        assert world.dispatch.pool["p"].problem == ""

    run(story)


def test_what_is_under_way_on_an_engine_that_becomes_unfit_stays_there() -> None:
    async def story(world: World) -> None:
        world.engine("p", Role.PREFILL)
        world.engine("d", Role.DECODE)
        e = world.engine("e", Role.DECODE)
        world.add("r")
        world.add("s")
        assert e.sent
        e.description = describe(role="decode", kv=OTHER_KV)
        world.dispatch.attached(world.dispatch.pool["e"].link, EngineLoad())
        assert "weights" in world.dispatch.pool["e"].problem
        assert e.aborted == []

    run(story)
