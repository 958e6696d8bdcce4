"""Servers with several engine cores: a frontend uses each of them, and keeps them alike."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.fakes.engine_core import describe
    from tests.fakes.links import FakeLink
    from vllm_pd_plugin.engine_port.link import Link
    from vllm_pd_plugin.engine_port.messages import FrontendError
    from vllm_pd_plugin.frontend.keeper import Keeper
    from vllm_pd_plugin.frontend.pool.members import Pool
    from vllm_pd_plugin.frontend.pool.membership import Engines, Wanted
    from vllm_pd_plugin.frontend.routing.choice import Role

SERVER = "http://10.0.0.1:8100"
RANKS = [SERVER, f"{SERVER}#1", f"{SERVER}#2"]


class World:
    """A pool with its keeper; links attach when they are told to."""

    def __init__(self) -> None:
        self.pool = Pool(time.monotonic)
        self.left: list[str] = []
        self.keeper = Keeper(self.pool, lambda member: self.left.append(member.key))
        self.links: dict[str, FakeLink] = {}

    def use(self, engines: Engines) -> None:
        make_link: Any = self._make_link
        self.keeper.use(engines, make_link)

    def _make_link(self, url: str) -> FakeLink:
        assert url not in self.links or self.links[url].is_closed, "two links to one engine"
        self.links[url] = FakeLink(url, is_attached=False, role="both")
        return self.links[url]

    def attach(self, url: str, *others: str) -> None:
        self.links[url].is_attached, self.links[url].others = True, others
        self.keeper.judge()

    @property
    def keys(self) -> list[str]:
        return [member.key for member in self.pool]


def run(story: Callable[[World], None]) -> None:
    async def within() -> None:
        story(World())
        await asyncio.sleep(0)

    asyncio.run(within())


def test_the_others_are_used_when_the_first_has_said_that_they_are_there() -> None:
    def story(world: World) -> None:
        world.use({SERVER: Wanted(Role.PREFILL, generation="g")})
        assert world.keys == [SERVER]
        world.attach(SERVER, *RANKS[1:])
        assert world.keys == RANKS
        world.keeper.judge()
        assert world.keys == RANKS
        others = [world.pool[key] for key in RANKS[1:]]
        assert [(m.role, m.generation, m.is_up) for m in others] == [(Role.PREFILL, "g", False)] * 2
        world.attach(RANKS[1])
        assert world.pool[RANKS[1]].is_up

    run(story)


def test_they_are_what_their_server_is_to_be() -> None:
    def story(world: World) -> None:
        world.use({SERVER: Wanted(Role.PREFILL)})
        world.attach(SERVER, *RANKS[1:])
        world.use({SERVER: Wanted(Role.DECODE, time.time() + 60)})
        assert [(m.role, m.is_draining) for m in world.pool] == [(Role.DECODE, True)] * 3

    run(story)


def test_they_drain_with_their_server_also_while_its_first_is_not_there() -> None:
    def story(world: World) -> None:
        world.use({SERVER: Wanted(Role.PREFILL)})
        world.attach(SERVER, *RANKS[1:])
        world.links[SERVER].is_attached = False
        world.use({SERVER: Wanted(Role.DECODE, time.time() + 60, generation="new")})
        kept = [(m.role, m.is_draining, m.generation) for m in world.pool]
        assert kept == [(Role.DECODE, True, "new")] * 3

    run(story)


def test_they_leave_with_their_server() -> None:
    def story(world: World) -> None:
        world.use({SERVER: Wanted(Role.BOTH), "http://other:1": Wanted(Role.BOTH)})
        world.attach(SERVER, *RANKS[1:])
        world.use({"http://other:1": Wanted(Role.BOTH)})
        assert world.keys == ["http://other:1"]
        assert world.left == RANKS

    run(story)


def test_one_that_its_server_does_not_have_any_more_leaves() -> None:
    def story(world: World) -> None:
        world.use({SERVER: Wanted(Role.BOTH)})
        world.attach(SERVER, *RANKS[1:])
        world.attach(SERVER, RANKS[1])
        assert world.keys == RANKS[:2]

    run(story)


def test_they_stay_while_their_first_is_not_there() -> None:
    """It may be the one that is lost; each has a connection of its own."""

    def story(world: World) -> None:
        world.use({SERVER: Wanted(Role.BOTH)})
        world.attach(SERVER, *RANKS[1:])
        world.links[SERVER].is_attached = False
        world.keeper.judge()
        assert world.keys == RANKS

    run(story)


# --- which of a server's descriptions is a link's ----------------------------------------------


def chosen(url: str, *ranks: int) -> Link:
    link = Link.__new__(Link)
    link.url, link.others = url, ()
    link._choose([describe(data_parallel_rank=rank, control_port=7000 + rank) for rank in ranks])
    return link


@pytest.mark.parametrize(
    ("url", "ranks", "port", "others"),
    [
        (SERVER, (0,), 7000, ()),
        (SERVER, (0, 1, 2), 7000, (f"{SERVER}#1", f"{SERVER}#2")),
        (f"{SERVER}#2", (0, 1, 2), 7002, ()),
        # Of a node that has the last ranks of a deployment.
        (SERVER, (4, 5), 7004, (f"{SERVER}#5",)),
        (f"{SERVER}#5", (4, 5), 7005, ()),
    ],
)
def test_a_link_goes_to_its_own_rank(
    url: str, ranks: tuple[int, ...], port: int, others: tuple[str, ...]
) -> None:
    link = chosen(url, *ranks)
    assert link.description.control_port == port
    assert link.others == others


@pytest.mark.parametrize(("url", "ranks"), [(f"{SERVER}#3", (0, 1)), (SERVER, ())])
def test_a_rank_that_is_not_there_is_missed(url: str, ranks: tuple[int, ...]) -> None:
    with pytest.raises(FrontendError, match="no such engine"):
        chosen(url, *ranks)
