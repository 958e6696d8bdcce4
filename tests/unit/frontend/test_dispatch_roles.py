"""A frontend's dispatch: which engines it uses, by role, generation and weights."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

from tests.fakes.dispatching import World, run
from tests.fakes.engines import make_kv
from vllm_pd_plugin.engine_port.messages import EngineLoad
from vllm_pd_plugin.memory.identity import KvIdentity, Weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.fakes.engine_core import describe
    from tests.fakes.links import FakeLink, link_of, make_member, output_of
    from vllm_pd_plugin.frontend.pool.fitness import Requirement
    from vllm_pd_plugin.frontend.pool.membership import Wanted
    from vllm_pd_plugin.frontend.routing.choice import NoPrefill, Policy, Role


# --- roles and generations -------------------------------------------------------------------


def use(world: World, **roles: Role) -> None:
    nobody: Any = None
    world.dispatch.use({url: Wanted(role) for url, role in roles.items()}, nobody)


def test_an_engine_that_is_named_for_another_role_is_not_used() -> None:
    async def story(world: World) -> None:
        world.engine("p", Role.PREFILL)
        world.engine("d", Role.DECODE, started_as="prefill")
        assert "--kv-role prefill" in world.dispatch.pool["d"].problem
        assert world.dispatch.serves() == "no_decode"
        world.engine("b", Role.DECODE, started_as="both")
        assert world.dispatch.serves() is None

    run(story)


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
        await asyncio.sleep(0)
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


def allow_several_kinds(world: World) -> None:
    """As on Ray."""
    any_of = describe()
    requirement = Requirement(
        any_of.max_model_len, any_of.vocab_size, several_kinds=True,
        vllm_version=any_of.vllm_version,
    )  # fmt: skip
    world.dispatch.require(requirement)


def test_an_engine_that_is_changed_in_place_does_not_speak_for_the_pool() -> None:
    async def story(world: World) -> None:
        first = world.engine("d1", Role.DECODE)
        second = world.engine("d2", Role.DECODE)
        p = world.engine("p", Role.PREFILL)
        changed = make_kv(weights=Weights("unknown:boot, being changed"))
        first.description = describe(role="decode", kv=changed)
        world.come_back(first)
        problems = [world.dispatch.pool[key].problem for key in ("d1", "d2", "p")]
        assert "weights are unknown:boot" in problems[0]
        assert problems[1:] == ["", ""]
        world.add("r")
        assert (first.sent, second.sent, p.sent) == ([], ["r-1d"], ["r-1p"])

    run(story)


def test_a_pool_of_several_kinds_hands_off_within_each() -> None:
    """On Ray, while an update replaces one model by another."""

    async def story(world: World) -> None:
        allow_several_kinds(world)
        d1 = world.engine("d1", Role.DECODE)
        d2 = come_up_with(world, "d2", Role.DECODE, OTHER_KV)
        p2 = come_up_with(world, "p2", Role.PREFILL, OTHER_KV)
        assert [world.dispatch.pool[key].problem for key in ("d1", "d2", "p2")] == [""] * 3
        world.add("r")
        assert (d1.sent, d2.sent, p2.sent) == ([], ["r-1d"], ["r-1p"])

    run(story)


def test_prompts_go_to_a_prefill_engine_whose_kv_the_decode_engine_converts() -> None:
    """Whichever of them is there first."""
    for first in ("p", "d"):

        async def story(world: World, first: str = first) -> None:
            engines = {}
            for name in sorted("pd", key=lambda name: name != first):
                role, dtype = (
                    (Role.PREFILL, "float32") if name == "p" else (Role.DECODE, "bfloat16")
                )
                kv = make_kv(dtype=dtype, kv_cache_dtype=dtype)
                engines[name] = come_up_with(world, name, role, kv)
            assert [world.dispatch.pool[name].problem for name in "pd"] == ["", ""]
            world.add("r")
            assert (engines["d"].sent, engines["p"].sent) == (["r-1d"], ["r-1p"])

        run(story)


def test_of_several_kinds_a_prefill_engine_serves_the_one_that_is_like_it() -> None:
    """Where there is none, the first for which its KV can be converted."""

    async def story(world: World) -> None:
        allow_several_kinds(world)
        kvs = [make_kv(dtype=name, kv_cache_dtype=name) for name in ("bfloat16", "float16")]
        come_up_with(world, "d1", Role.DECODE, kvs[0])
        come_up_with(world, "d2", Role.DECODE, kvs[1])
        come_up_with(world, "p2", Role.PREFILL, kvs[1])
        come_up_with(world, "p3", Role.PREFILL, make_kv(dtype="float32", kv_cache_dtype="float32"))
        come_up_with(world, "p4", Role.PREFILL, OTHER_KV)
        kinds = {name: world.dispatch.pool[name].kind for name in ("d1", "d2", "p2", "p3", "p4")}
        assert kinds == {"d1": "d1", "d2": "d2", "p2": "d2", "p3": "d1", "p4": "p4"}

    run(story)


def test_kinds_that_only_the_full_hash_tells_apart_are_told_apart_when_it_is_there() -> None:
    def kv(full: str) -> KvIdentity:
        return make_kv(weights=Weights("sampled:1", full=full))

    async def story(world: World) -> None:
        allow_several_kinds(world)
        come_up_with(world, "d1", Role.DECODE, kv("full:1"))
        d2 = come_up_with(world, "d2", Role.DECODE, kv(""))
        p2 = come_up_with(world, "p2", Role.PREFILL, kv("full:2"))
        world.lose(world.dispatch.pool["d1"].link)  # type: ignore[arg-type]
        world.add("r")
        assert (d2.sent, p2.sent) == (["r-1d"], ["r-1p"])  # as far as is known
        world.give(d2, output_of("r-1d", 51))
        d2.description = describe(role="decode", kv=kv("full:3"))
        world.dispatch.attached(world.dispatch.pool["d2"].link, EngineLoad())
        world.add("s")
        assert d2.sent[-1] == "s-1w"

    run(story)


def test_a_decode_engine_that_is_gone_does_not_speak_for_those_that_are_there() -> None:
    async def story(world: World) -> None:
        first = world.engine("d1", Role.DECODE)
        come_up_with(world, "d2", Role.DECODE, OTHER_KV)
        come_up_with(world, "p", Role.PREFILL, OTHER_KV)
        assert "weights" in world.dispatch.pool["d2"].problem
        world.lose(first)
        assert world.dispatch.pool["d2"].problem == ""
        assert world.dispatch.pool["p"].problem == ""

    run(story)
